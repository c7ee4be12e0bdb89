"""onecurve for programs: load a config, train in this process, read what a run left, write plugins.

Each name is imported when it is first used: `import onecurve` is fast, and torch is imported only where it is needed.
`trainer` is not imported either before `onecurve.paths` has made sure that the right one is found.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # not by an import of `typing`, which a file in the working folder may be called
if TYPE_CHECKING:
    from typing import Any

    from onecurve.running import Result, run
    from trainer import __version__
    from trainer.config import Config, Plugin, Strategy
    from trainer.config.compose import load
    from trainer.config.optim import Optimizer, Schedule
    from trainer.data.ordered_samples import OrderedSamples
    from trainer.errors import ConfigError, DataError, OnecurveError, TrainingError
    from trainer.facts import Facts
    from trainer.models import Model
    from trainer.objectives import Objective, Update
    from trainer.sampling import load_run
    from trainer.transforms import Transform

_HOMES = {
    "Config": "trainer.config",
    "ConfigError": "trainer.errors",
    "DataError": "trainer.errors",
    "Facts": "trainer.facts",
    "Model": "trainer.models",
    "Objective": "trainer.objectives",
    "OnecurveError": "trainer.errors",
    "Optimizer": "trainer.config.optim",
    "OrderedSamples": "trainer.data.ordered_samples",
    "Plugin": "trainer.config",
    "Result": "onecurve.running",
    "Schedule": "trainer.config.optim",
    "Strategy": "trainer.config",
    "TrainingError": "trainer.errors",
    "Transform": "trainer.transforms",
    "Update": "trainer.objectives",
    "__version__": "trainer",
    "load": "trainer.config.compose",
    "load_run": "trainer.sampling",
    "run": "onecurve.running",
}

__all__ = [
    "Config", "ConfigError", "DataError", "Facts", "Model", "Objective", "OnecurveError", "Optimizer", "OrderedSamples",
    "Plugin", "Result", "Schedule", "Strategy", "TrainingError", "Transform", "Update", "__version__", "load",
    "load_run", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onecurve' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
