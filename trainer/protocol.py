"""What a class of a user's has to offer as model, objective, optimizer or schedule: looked at before anything starts.

What would fail at the first evaluation, hours later, is told here, with what else is missing. Whether it computes what
it should is seen on one batch: `Watched` looks at the first sums of an objective, `rehearse` evaluates before step 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.config import Config
from trainer.config.check import import_plugin
from trainer.errors import ConfigError
from trainer.objectives import Batch, Objective, Sums

if TYPE_CHECKING:
    from trainer.loop import Job

MADE_OF = {
    "model": ("config", "vocab_size", "sequence_length"),
    "objective": ("config", "token_bytes", "token_chars"),
    "optimizer": ("config", "model"),
    "schedule": ("config", "lr", "steps"),
}
METHODS = {
    "model": {"forward": ("batch",), "initialise": ("name", "parameter", "generator")},
    "objective": {
        "count": ("batch",),
        "loss": ("outputs", "batch"),
        "evaluate": ("outputs", "batch"),
        "summary": ("sums",),
    },
}
INHERITED = ("_forward_unimplemented",)  # what nn.Module has for what a model must bring
SEE = "docs/EXTEND.md has one of each"


def check_plugins(config: Config) -> None:
    """Raises ConfigError with all that the classes of users' lack."""
    if problems := [problem for group in MADE_OF if _is_users(config, group) for problem in _lacking(config, group)]:
        raise ConfigError([*problems[:-1], f"{problems[-1]} ({SEE})"])


def watched(config: Config, objective: Objective) -> Objective:
    """Returns the objective; of a user's the first results are looked at."""
    return Watched(objective, config.objective.name) if _is_users(config, "objective") else objective


def rehearse(job: Job) -> None:
    """Evaluates one batch before the first step of a run with an objective or model of a user's. It is a forward pass
    without gradients: weights, buffers and draws are untouched by it. Raises ConfigError."""
    config = job.config
    if job.folder.found or job.validation is None or not (_is_users(config, "objective") or _is_users(config, "model")):
        return
    with closing(job.validation.batches()) as batches:
        sums = job.strategy.eval_step(next(batches))
    totals = job.strategy.reduce({name: value.reshape(1) for name, value in sums.items()})
    numbers = job.strategy.objective.summary({name: value[0] for name, value in totals.items()})
    if not (isinstance(numbers, Mapping) and "loss" in numbers and all(map(_is_number, numbers.values()))):
        wanted = "numbers by name, `loss` among them"
        raise ConfigError(f"objective.name={config.objective.name}: `summary` should return {wanted}, not {numbers!r}")
    if config.train.compile:  # else its sizes would count as those of training
        torch._dynamo.reset()


class Watched:
    """An objective of a user's: that `loss` and `evaluate` return what they should is checked once each."""

    def __init__(self, objective: Objective, name: str):
        self._objective, self._name = objective, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._objective)  # who asks what it is means the objective

    def loss(self, outputs: Tensor, batch: Batch) -> Sums:
        self.loss = self._objective.loss  # type: ignore[method-assign]  # from the second call on
        return self._sums("loss", self.loss(outputs, batch))

    def evaluate(self, outputs: Tensor, batch: Batch) -> Sums:
        self.evaluate = self._objective.evaluate  # type: ignore[method-assign]
        return self._sums("evaluate", self.evaluate(outputs, batch))

    def _sums(self, method: str, sums: Any) -> Sums:
        wanted = "a dict of scalar tensors, `loss` (a sum over targets) and `count` (of targets) among them"
        if not isinstance(sums, dict):
            problem = f"not {type(sums).__name__}"
        elif missing := [name for name in ("loss", "count") if name not in sums]:
            problem = f"which lacks {' and '.join(missing)}"
        elif wrong := [name for name, value in sums.items() if not isinstance(value, Tensor) or value.ndim]:
            problem = f"which {', '.join(map(repr, wrong))} is not"
        else:
            return sums
        raise ConfigError(f"objective.name={self._name}: `{method}` should return {wanted}, {problem} ({SEE})")


def _is_users(config: Config, group: str) -> bool:
    return ":" in getattr(config, group).name


def _lacking(config: Config, group: str) -> Iterator[str]:
    name = getattr(config, group).name
    key = f"{group}.name={name}"
    target = import_plugin(f"{group}.name", name, config.run.plugins)
    if not _takes(target, MADE_OF[group]):
        yield f"{key}: should be made of ({', '.join(MADE_OF[group])})"
    methods = METHODS.get(group, {})
    if group == "objective" and hasattr(target, "__getattr__"):  # it hands on to another one
        methods = {}
    for method, arguments in methods.items():
        found = inspect.getattr_static(target, method, None)
        if not (_is_bound(found) or callable(found)):
            yield f"{key}: has no method `{method}({', '.join(arguments)})`"
        elif getattr(found, "__name__", "") in INHERITED:
            yield f"{key}: has no method `{method}({', '.join(arguments)})` of its own"
        elif not _takes(getattr(target, method), arguments if _is_bound(found) else ("self", *arguments)):
            yield f"{key}: its method `{method}` should take ({', '.join(arguments)})"
    if group == "optimizer" and "lr" not in target.Config.model_fields:
        yield f"{key}: its Config has no `lr`, the peak learning rate; a subclass of onecurve.Optimizer has"


def _is_bound(method: Any) -> bool:
    return isinstance(method, (staticmethod, classmethod))


def _takes(target: Callable[..., Any], arguments: tuple[str, ...]) -> bool:
    """Returns whether `target` can be called with so many arguments, as far as Python knows."""
    try:
        inspect.signature(target).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # code that is not Python's has no signature
        pass
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
