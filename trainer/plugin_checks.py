"""What a class of a user's has to offer as model, objective, optimizer or schedule: looked at before anything starts.

What would fail at the first evaluation, hours later, is told here, with what else is missing. Whether it computes what
it should is seen on one batch: `CheckedObjective` looks at the first sums of an objective, `rehearse` evaluates before
step 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from trainer.config import Config
from trainer.config.validate import in_trained
from trainer.errors import ConfigError
from trainer.evaluation import Evaluation
from trainer.job import Job
from trainer.objectives import NUM_TARGETS, Batch, Model, Normalizers, Objective, Outputs, Sums, Update
from trainer.registry import plugin

MADE_OF = {
    "model": ("config", "facts"),
    "objective": ("config", "facts"),
    "optimizer": ("config", "model"),
    "schedule": ("config", "lr", "steps"),
}
METHODS = {
    "model": {"forward": ("batch",), "initialise": ("name", "parameter", "generator")},
    "objective": {
        "counts": ("batch",),
        "loss": ("outputs", "batch", "normalizers"),
        "evaluate": ("outputs", "batch"),
        "rows": ("outputs", "batch"),
        "summary": ("sums", "rows"),
        "example": ("row", "draw"),
        "updates": ("batches", "models"),
    },
}
INHERITED = (nn.Module.forward, Objective.loss)  # what stands where a class must have its own
COLUMNS = frozenset(
    ("step", "grad_norm", "lr", "tokens", "samples", "step_s", "data_wait_s", "tokens_per_s", "skipped", "mfu")
) | {"mem_gib", "fingerprint", "eval"}
"""What a row of `metrics.jsonl` has besides what an objective sums."""
SEE = "docs/EXTEND.md has one of each"


def check_plugins(config: Config) -> None:
    """Raises ConfigError with all that the classes of users' lack, and the objective's models."""
    problems = list(_all_lacking(config))
    for name, other in config.models.trained.items():
        problems += (in_trained(name, problem) for problem in _all_lacking(config.model_copy(update=dict(other))))
    if problems := list(dict.fromkeys(problems)):
        raise ConfigError([*problems[:-1], f"{problems[-1]} ({SEE})"])
    if problems := list(_check_models(config)):
        raise ConfigError(problems)


def check_objective(config: Config, objective: Objective) -> Objective:
    """Returns the objective; of a user's the first results are looked at."""
    if not _is_users(config, "objective"):
        return objective
    return cast(Objective, CheckedObjective(objective, config.objective.name))


def rehearse(job: Job) -> None:
    """Evaluates one batch before the first step of a run with an objective or model of a user's. It is a forward pass
    without gradients: weights, buffers and draws are untouched by it. Raises ConfigError."""
    config = job.config
    if job.folder.found or job.validation is None or not (_is_users(config, "objective") or _is_users(config, "model")):
        return
    with closing(job.validation.batches()) as batches:
        evaluation = Evaluation(job.strategy)
        evaluation.add(next(batches))
    numbers = evaluation.end()
    if not (isinstance(numbers, Mapping) and "loss" in numbers and all(map(_is_number, numbers.values()))):
        wanted = "numbers by name, `loss` among them"
        raise ConfigError(f"objective.name={config.objective.name}: `summary` should return {wanted}, not {numbers!r}")
    _check_names(config.objective.name, "summary", numbers)
    if config.train.compile:  # else its sizes would count as those of training
        torch._dynamo.reset()


def _check_models(config: Config) -> Iterator[str]:
    """Yields models that the objective asks for and the config does not have, or the other way round."""
    objective, name = plugin(config, "objective"), f"objective={config.objective.name}"
    for kind, what in (("frozen", "the directory of a run"), ("trained", "{model: {...}}")):
        asked, given = getattr(objective, kind, ()), getattr(config.models, kind)
        if isinstance(asked, str):
            yield f"objective.name={config.objective.name}: its `{kind}` should be names, such as ({asked!r},)"
            continue
        yield from (f"models.{kind}.{model}: {name} needs it: {what}" for model in asked if model not in given)
        yield from (f"models.{kind}.{model}: {name} uses no such model" for model in given if model not in asked)


def _check_names(objective: str, method: str, names: Iterable[str]) -> None:
    """Raises ConfigError for a number that a row of `metrics.jsonl` has already."""
    if taken := sorted(COLUMNS & set(names)):
        raise ConfigError(
            f"objective.name={objective}: `{method}` names {', '.join(taken)}, which every row has; rename it"
        )


class CheckedObjective:
    """An objective of a user's: that its methods return what they should is checked once each."""

    def __init__(self, objective: Objective, name: str):
        self._objective, self._name = objective, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._objective)  # who asks what it is means the objective

    def counts(self, batch: Batch) -> Mapping[str, float]:
        self.counts = self._objective.counts  # type: ignore[method-assign]  # from the second call on
        counts = self.counts(batch)
        wanted = f"a dict of numbers, `{NUM_TARGETS}` among them"
        if not isinstance(counts, Mapping):
            self._refuse("counts", wanted, f"not {type(counts).__name__}")
        elif NUM_TARGETS not in counts:
            self._refuse("counts", wanted, "which it is not")
        elif wrong := [name for name, value in counts.items() if not _is_number(value)]:
            self._refuse("counts", wanted, f"which {', '.join(map(repr, wrong))} is not")
        _check_names(self._name, "counts", counts)
        return counts

    def loss(self, outputs: Outputs, batch: Batch, normalizers: Normalizers) -> tuple[Tensor, Sums]:
        self.loss = self._objective.loss  # type: ignore[method-assign]
        result = self.loss(outputs, batch, normalizers)
        if not (isinstance(result, tuple) and len(result) == 2 and _is_scalar(result[0])):
            wanted = "a pair: the loss, a scalar tensor, and a dict of sums to record"
            self._refuse("loss", wanted, f"not {_say(result)}")
        self._check_sums("loss", result[1])
        return result

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        self.evaluate = self._objective.evaluate  # type: ignore[method-assign]
        sums = self.evaluate(outputs, batch)
        self._check_sums("evaluate", sums)
        return sums

    def updates(self, batches: Sequence[Batch], models: Mapping[str, Model]) -> Iterator[Update]:
        found = self._objective.updates(batches, models)
        if not isinstance(found, Iterable):
            self._refuse("updates", "an iterator of onecurve.Update", f"not {_say(found)}: `yield` each of them")
        for update in found:
            if not isinstance(update, Update):
                self._refuse("updates", "an iterator of onecurve.Update", f"not of {_say(update)}")
            yield update._replace(objective=cast(Objective, self)) if update.objective is self._objective else update

    def _check_sums(self, method: str, sums: Any) -> None:
        wanted = "a dict of scalar tensors, sums over the batch"
        if not isinstance(sums, dict):
            self._refuse(method, wanted, f"not {_say(sums)}")
        elif wrong := [name for name, value in sums.items() if not _is_scalar(value)]:
            self._refuse(method, wanted, f"which {', '.join(map(repr, wrong))} is not")
        _check_names(self._name, method, sums)

    def _refuse(self, method: str, wanted: str, problem: str) -> NoReturn:
        raise ConfigError(f"objective.name={self._name}: `{method}` should return {wanted}, {problem} ({SEE})")


def _is_users(config: Config, group: str) -> bool:
    return ":" in getattr(config, group).name


def _all_lacking(config: Config) -> Iterator[str]:
    for group in MADE_OF:
        if _is_users(config, group):
            yield from _missing_parts(config, group)


def _missing_parts(config: Config, group: str) -> Iterator[str]:
    name = getattr(config, group).name
    key = f"{group}.name={name}"
    target = plugin(config, group)
    if group == "objective" and not _is_objective(target):
        yield f"{key}: should be a subclass of onecurve.Objective"
        return
    if not _takes(target, MADE_OF[group]):
        yield f"{key}: should be made of ({', '.join(MADE_OF[group])})"
    methods = METHODS.get(group, {})
    if group == "objective" and hasattr(target, "__getattr__"):  # it hands on to another one
        methods = {}
    for method, arguments in methods.items():
        found = inspect.getattr_static(target, method, None)
        if not (_is_bound(found) or callable(found)):
            yield f"{key}: has no method `{method}({', '.join(arguments)})`"
        elif found in INHERITED:
            yield f"{key}: has no method `{method}({', '.join(arguments)})` of its own"
        elif not _takes(getattr(target, method), arguments if _is_bound(found) else ("self", *arguments)):
            yield f"{key}: its method `{method}` should take ({', '.join(arguments)})"
    if group == "optimizer" and "lr" not in target.Config.model_fields:
        yield f"{key}: its Config has no `lr`, the peak learning rate; a subclass of onecurve.Optimizer has"


def _is_objective(target: Any) -> bool:
    return (inspect.isclass(target) and issubclass(target, Objective)) or hasattr(target, "__getattr__")


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


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _say(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
