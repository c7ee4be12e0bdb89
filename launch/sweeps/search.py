"""Chooses values by the results of earlier trials: Optuna's TPE, seeded, with its study in the sweep's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from launch.sweeps.trials import Sweep, Trial, trial_of
from trainer.config import sweep as grammar
from trainer.config.compose import in_hydra, load
from trainer.errors import ConfigError
from trainer.secrets import shown_override
from trainer.tracking.jsonl import read

if TYPE_CHECKING:
    import optuna

JOURNAL = "study.journal"


class Search:
    """A search with Optuna. Raises ConfigError if it is not installed, nothing is searched or a range is invalid."""

    def __init__(
        self, overrides: Sequence[str], count: int, metric: str, procs: int, folder: Path, config_dir: str | None
    ):
        try:
            import optuna
        except ImportError:
            raise ConfigError(
                "--trials needs Optuna: pip install 'onecurve[sweep]'; or sweep a=1,2 without it"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with in_hydra():
            parsed, problems = grammar.parse(overrides)
            spaces = {
                override.get_key_element(): _space(override) for override in parsed if override.is_sweep_override()
            }
        if problems:
            raise ConfigError(problems)
        if not spaces:
            raise ConfigError("--trials: nothing is searched; write key=interval(1e-4,1e-2), key=a,b or key=range(1,9)")
        self.optuna, self.count, self.metric = optuna, count, metric
        self.choices = {key: space.choices for key, space in spaces.items() if hasattr(space, "choices")}
        self.spaces = {key: _mask_secrets(key, space) for key, space in spaces.items()}  # as they are written
        self.fixed = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
        self.swept = [key.lstrip("+") for key in spaces]
        self.procs, self.config_dir, self.folder = procs, config_dir, folder
        self.open_trials: dict[int, Any] = {}  # our number -> Optuna's trial
        first_values, last_values = (
            {key: _bound(space, which) for key, space in self.spaces.items()} for which in (0, -1)
        )
        load(self._job(last_values), procs, config_dir)
        seed = load(self._job(first_values), procs, config_dir).run.seed
        folder.mkdir(parents=True, exist_ok=True)
        from optuna.storages.journal import JournalFileBackend

        backend = JournalFileBackend(str(folder / JOURNAL))
        storage = optuna.storages.JournalStorage(backend)
        studies = {study.study_name: study for study in optuna.get_all_study_summaries(storage)}
        num_earlier = studies["sweep"].n_trials if "sweep" in studies else 0
        # Another seed where it goes on: the same would draw the values of the first trials again.
        sampler = optuna.samplers.TPESampler(seed=seed + num_earlier, constant_liar=True)
        self.study = optuna.create_study(study_name="sweep", storage=storage, sampler=sampler, load_if_exists=True)

    def trials(self) -> Iterator[Trial]:
        """Yields the trials of earlier starts first, then new ones, up to `count` in all."""
        states = self.optuna.trial.TrialState
        for earlier in self.study.get_trials(deepcopy=False):
            trial = self._trial(earlier.number, earlier.params)
            if earlier.state == states.RUNNING and set(earlier.params) == set(self.spaces):
                self.open_trials[earlier.number] = earlier.number
            yield trial
        while len(self.study.get_trials(deepcopy=False)) < self.count:
            new = self.study.ask(self.spaces)
            self.open_trials[new.number] = new
            yield self._trial(new.number, new.params)

    def record(self, trial: Trial, code: int) -> None:
        """Records the result of a trial. An interrupted one stays open, and goes on at the next start."""
        if trial.number not in self.open_trials or code == 75:
            return
        value = value_of(trial, self.metric) if code == 0 else None
        state = None if value is not None else self.optuna.trial.TrialState.FAIL
        self.study.tell(self.open_trials.pop(trial.number), value, state=state)

    def _trial(self, number: int, values: dict[str, Any]) -> Trial:
        return trial_of(number, self._job(values), self.swept, self.procs, self.config_dir)

    def _job(self, values: dict[str, Any]) -> list[str]:
        return [*self.fixed, *(f"{key}={_text(self._choice(key, value))}" for key, value in values.items())]

    def _choice(self, key: str, value: Any) -> Any:
        """Returns the value that belongs to the text that the study has of it."""
        return self.choices[key][self.spaces[key].choices.index(value)] if key in self.choices else value


def value_of(trial: Trial, metric: str) -> float | None:
    """Returns the metric's value at the last step that has it, None if no step has. `eval.` names an evaluation's
    metric."""
    group, _, name = metric.rpartition(".")
    rows = read(Path(trial.folder) / "metrics.jsonl")
    values = [(row.get("eval") or {}).get(name) if group == "eval" else row.get(metric) for row in rows]
    return next((float(value) for value in reversed(values) if isinstance(value, (int, float))), None)


def save_trials(sweep: Sweep, trials: Iterator[Trial]) -> Iterator[Trial]:
    """Yields the trials, each after it has been written to `sweep.json`."""
    for trial in trials:
        if trial.number not in {other.number for other in sweep.trials}:
            sweep.trials.append(trial)
            sweep.save()
        yield trial


def _space(override: Override) -> optuna.distributions.BaseDistribution:
    """Returns the search space of an override, read as Hydra's own Optuna plugin reads it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None  # noqa: PT018
        kind: Callable[..., Any] = IntDistribution if isinstance(value.start, int) else FloatDistribution
        try:
            return kind(value.start, value.end, log="log" in value.tags)
        except ValueError as error:
            raise ConfigError(f"{override.input_line}: {error}") from None
    if isinstance(value, RangeSweep) and isinstance(value.start, int) and isinstance(value.step, int):
        numbers = value.range()
        return IntDistribution(numbers[0], numbers[-1], step=value.step) if len(numbers) else _refuse_empty(override)  # type: ignore[arg-type,index]
    if isinstance(value, (ChoiceSweep, RangeSweep)) or override.is_discrete_sweep():
        choices = list(override.sweep_string_iterator())
        return CategoricalDistribution(choices) if choices else _refuse_empty(override)
    raise ConfigError(f"{shown_override(str(override.input_line))}: is not a sweep that can be searched")


def _mask_secrets(key: str, space: Any) -> Any:
    """Returns the space as the study may record it, without secrets. Raises ConfigError if choices then become
    equal."""
    choices = [shown_override(f"{key}={choice}").removeprefix(f"{key}=") for choice in getattr(space, "choices", ())]
    if len(set(choices)) < len(choices):
        raise ConfigError(f"{key}: has choices that are the same but for their secrets; a sweep cannot tell them apart")
    return type(space)(choices) if choices else space


def _refuse_empty(override: Override) -> Any:
    raise ConfigError(f"{override.input_line}: has no values")


def _bound(space: Any, which: int) -> Any:
    return space.choices[which] if hasattr(space, "choices") else (space.low, space.high)[which]


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
