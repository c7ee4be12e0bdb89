"""Checks users' classes (models, objectives, optimizers, schedules) before anything starts.

A mistake that would fail at the first evaluation, hours later, is reported here, with all others. Whether a class
computes what it should shows on one batch: `CheckedObjective` checks the first sums of an objective, `rehearse`
evaluates before step 1.
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

ARGUMENTS = {
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
INHERITED = (nn.Module.forward, Objective.loss)  # defaults that a class must override
COLUMNS = frozenset(
    ("step", "grad_norm", "lr", "tokens", "samples", "step_s", "data_wait_s", "tokens_per_s", "skipped", "mfu")
) | {"mem_gib", "fingerprint", "eval"}
"""Columns of `metrics.jsonl` besides the sums of an objective."""
SEE = "docs/EXTEND.md has one of each"


def check_plugins(config: Config) -> None:
    """Raises ConfigError with all that users' classes lack, or else where the objective and the models do not match."""
    problems = list(_all_missing_parts(config))
    for name, trained in config.models.trained.items():
        missing_parts = _all_missing_parts(config.model_copy(update=dict(trained)))
        problems += (in_trained(name, problem) for problem in missing_parts)
    if problems := list(dict.fromkeys(problems)):
        raise ConfigError([*problems[:-1], f"{problems[-1]} ({SEE})"])
    if problems := list(_check_models(config)):
        raise ConfigError(problems)


def check_objective(config: Config, objective: Objective) -> Objective:
    """Returns the objective, wrapped to check its first results if it is a user's."""
    if not _is_users(config, "objective"):
        return objective
    return cast(Objective, CheckedObjective(objective, config.objective.name))


def rehearse(job: Job) -> None:
    """Evaluates one batch before the first step of a run with a user's objective or model: a forward pass without
    gradients, which changes no weights, buffers or random draws. Raises ConfigError."""
    config = job.config
    has_users_class = _is_users(config, "objective") or _is_users(config, "model")
    if job.folder.checkpoint or job.validation is None or not has_users_class:
        return
    with closing(job.validation.batches()) as batches:
        evaluation = Evaluation(job.strategy)
        evaluation.add(next(batches))
    numbers = evaluation.end()
    if not (isinstance(numbers, Mapping) and "loss" in numbers and all(map(_is_number, numbers.values()))):
        name, expected = config.objective.name, "numbers by name, `loss` among them"
        raise ConfigError(f"objective.name={name}: `summary` should return {expected}, not {numbers!r}")
    _check_names(config.objective.name, "summary", numbers)
    if config.train.compile:  # else its shapes would count as those of training
        torch._dynamo.reset()


def _check_models(config: Config) -> Iterator[str]:
    """Yields a problem for each model that the objective needs and the config lacks, or the other way round."""
    objective, name = plugin(config, "objective"), f"objective={config.objective.name}"
    for kind, value in (("frozen", "the directory of a run"), ("trained", "{model: {...}}")):
        needed, configured = getattr(objective, kind, ()), getattr(config.models, kind)
        if isinstance(needed, str):
            yield f"objective.name={config.objective.name}: its `{kind}` should be names, such as ({needed!r},)"
            continue
        yield from (f"models.{kind}.{model}: {name} needs it: {value}" for model in needed if model not in configured)
        yield from (f"models.{kind}.{model}: {name} uses no such model" for model in configured if model not in needed)


def _check_names(objective: str, method: str, names: Iterable[str]) -> None:
    """Raises ConfigError for a name that is a column of `metrics.jsonl` already."""
    if duplicates := sorted(COLUMNS & set(names)):
        raise ConfigError(
            f"objective.name={objective}: `{method}` names {', '.join(duplicates)}, which every row has; rename it"
        )


class CheckedObjective:
    """Wraps a user's objective, and checks once for each method that it returns what it should."""

    def __init__(self, objective: Objective, name: str):
        self._objective, self._name = objective, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._objective)  # isinstance() should see the objective

    def counts(self, batch: Batch) -> Mapping[str, float]:
        self.counts = self._objective.counts  # type: ignore[method-assign]  # from the second call on
        counts = self.counts(batch)
        expected = f"a dict of numbers, `{NUM_TARGETS}` among them"
        if not isinstance(counts, Mapping):
            self._refuse("counts", expected, f"not {type(counts).__name__}")
        elif NUM_TARGETS not in counts:
            self._refuse("counts", expected, "which it is not")
        elif wrong := [name for name, value in counts.items() if not _is_number(value)]:
            self._refuse("counts", expected, f"which {', '.join(map(repr, wrong))} is not")
        _check_names(self._name, "counts", counts)
        return counts

    def loss(self, outputs: Outputs, batch: Batch, normalizers: Normalizers) -> tuple[Tensor, Sums]:
        self.loss = self._objective.loss  # type: ignore[method-assign]
        result = self.loss(outputs, batch, normalizers)
        if not (isinstance(result, tuple) and len(result) == 2 and _is_scalar(result[0])):
            expected = "a pair: the loss, a scalar tensor, and a dict of sums to record"
            self._refuse("loss", expected, f"not {_describe(result)}")
        self._check_sums("loss", result[1])
        return result

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        self.evaluate = self._objective.evaluate  # type: ignore[method-assign]
        sums = self.evaluate(outputs, batch)
        self._check_sums("evaluate", sums)
        return sums

    def updates(self, batches: Sequence[Batch], models: Mapping[str, Model]) -> Iterator[Update]:
        updates = self._objective.updates(batches, models)
        if not isinstance(updates, Iterable):
            self._refuse("updates", "an iterator of onecurve.Update", f"not {_describe(updates)}: `yield` each of them")
        for update in updates:
            if not isinstance(update, Update):
                self._refuse("updates", "an iterator of onecurve.Update", f"not of {_describe(update)}")
            yield update._replace(objective=cast(Objective, self)) if update.objective is self._objective else update

    def _check_sums(self, method: str, sums: Any) -> None:
        expected = "a dict of scalar tensors, sums over the batch"
        if not isinstance(sums, dict):
            self._refuse(method, expected, f"not {_describe(sums)}")
        elif wrong := [name for name, value in sums.items() if not _is_scalar(value)]:
            self._refuse(method, expected, f"which {', '.join(map(repr, wrong))} is not")
        _check_names(self._name, method, sums)

    def _refuse(self, method: str, expected: str, problem: str) -> NoReturn:
        raise ConfigError(f"objective.name={self._name}: `{method}` should return {expected}, {problem} ({SEE})")


def _is_users(config: Config, group: str) -> bool:
    return ":" in getattr(config, group).name


def _all_missing_parts(config: Config) -> Iterator[str]:
    for group in ARGUMENTS:
        if _is_users(config, group):
            yield from _missing_parts(config, group)


def _missing_parts(config: Config, group: str) -> Iterator[str]:
    name = getattr(config, group).name
    key = f"{group}.name={name}"
    target = plugin(config, group)
    if group == "objective" and not _is_objective(target):
        yield f"{key}: should be a subclass of onecurve.Objective"
        return
    if not _accepts(target, ARGUMENTS[group]):
        yield f"{key}: should be made of ({', '.join(ARGUMENTS[group])})"
    methods = METHODS.get(group, {})
    if group == "objective" and hasattr(target, "__getattr__"):  # it delegates to another objective
        methods = {}
    for method, arguments in methods.items():
        attribute = inspect.getattr_static(target, method, None)
        if not (_is_bound(attribute) or callable(attribute)):
            yield f"{key}: has no method `{method}({', '.join(arguments)})`"
        elif attribute in INHERITED:
            yield f"{key}: has no method `{method}({', '.join(arguments)})` of its own"
        elif not _accepts(getattr(target, method), arguments if _is_bound(attribute) else ("self", *arguments)):
            yield f"{key}: its method `{method}` should take ({', '.join(arguments)})"
    if group == "optimizer" and "lr" not in target.Config.model_fields:
        yield f"{key}: its Config has no `lr`, the peak learning rate; a subclass of onecurve.Optimizer has"


def _is_objective(target: Any) -> bool:
    return (inspect.isclass(target) and issubclass(target, Objective)) or hasattr(target, "__getattr__")


def _is_bound(method: Any) -> bool:
    return isinstance(method, (staticmethod, classmethod))


def _accepts(target: Callable[..., Any], arguments: tuple[str, ...]) -> bool:
    """Returns whether `target` can be called with so many arguments, as far as Python can tell."""
    try:
        inspect.signature(target).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # code that is not written in Python has no signature
        pass
    return True


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
