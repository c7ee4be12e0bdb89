"""onecurve: kill it anywhere, resume it anywhere, the same curve."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> Any:
        """Imports a submodule when it is first used: `trainer.config.Plugin` works after `import trainer`."""
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
