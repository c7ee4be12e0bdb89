"""A sweep's trials, which are checked before anything starts, and the file that lists them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config import sweep
from trainer.config.compose import compose, load
from trainer.errors import ConfigError
from trainer.secrets import masked, shown_override
from trainer.tracking.jsonl import read_status, write_json

FILE = "sweep.json"
MOST = 10_000  # more is a mistake
LONGEST_NAME = 128  # that W&B takes


@dataclass(frozen=True)
class Trial:
    """A run of a sweep. `overrides` are the run's, with its folder and secrets; `values` are those of the swept keys,
    with secrets masked."""

    number: int
    folder: str
    overrides: list[str]
    values: dict[str, str]
    steps: int

    @property
    def name(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or "the only one"

    @property
    def is_finished(self) -> bool:
        status = read_status(Path(self.folder))
        return status.get("state") == "finished" and status.get("steps") == self.steps


@dataclass
class Sweep:
    """What `sweep.json` contains. `search` says how values are chosen if that depends on earlier results."""

    folder: Path
    swept: list[str]
    procs: int
    config_dir: str | None
    trials: list[Trial]
    search: dict[str, Any] | None = None

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {**asdict(self), "folder": str(self.folder)}
        for trial in values["trials"]:
            trial["overrides"] = [shown_override(text) for text in trial["overrides"]]
        write_json(self.folder / FILE, values)


def expand(overrides: Sequence[str], procs: int, config_dir: str | None = None) -> list[Trial]:
    """Returns the trials of a command line with sweeps, each composed and checked for `procs` processes.

    Raises ConfigError with all problems of all trials, each once.
    """
    swept, jobs, errors = sweep.jobs(overrides)
    if not 1 <= len(jobs) <= MOST:
        raise ConfigError([*errors, f"{len(jobs)} trials: at least one, at most {MOST}"])
    problems: dict[str, list[str]] = {}
    trials = []
    for number, job in enumerate(jobs):
        try:
            trials.append(trial_of(number, job, swept, procs, config_dir))
        except ConfigError as error:
            for problem in error.problems:
                name = " ".join(f"{key}={value}" for key, value in _values(job, swept).items())
                problems.setdefault(problem, []).append(name)
    if len({trial.folder for trial in trials}) < len(trials):
        errors.append("two trials differ in secrets alone, or not at all: they would share a folder")
    if errors or problems:
        raise ConfigError([*errors, *(_with_trials(problem, names, len(jobs)) for problem, names in problems.items())])
    return trials


def trial_of(number: int, job: Sequence[str], swept: Sequence[str], procs: int, config_dir: str | None) -> Trial:
    """Composes and checks one trial. Raises ConfigError."""
    config = load(job, procs, config_dir)
    folder = str(Path(config.run.dir).expanduser() / sweep.name_of(job))
    trial = Trial(number, folder, [*job, _override("run.dir", folder)], _values(job, swept), config.train.steps)
    labels = {"group": config.run.name, "name": trial.name[:LONGEST_NAME]}
    label_overrides = [
        _override(f"track.wandb.{key}", text) for key, text in labels.items() if not getattr(config.track.wandb, key)
    ]
    # Names, not what they would resolve to, which may be secret.
    label_overrides = [text.replace("${", r"\${") for text in label_overrides]
    return replace(trial, overrides=[*trial.overrides, *label_overrides])


def _override(key: str, text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def _values(job: Sequence[str], swept: Sequence[str]) -> dict[str, str]:
    return masked(sweep.values_of(job, swept))


def folder_of(overrides: Sequence[str], config_dir: str | None) -> Path:
    """Returns the sweep's folder: the `run.dir` of the overrides that are not swept."""
    raw, problems = compose(sweep.plain_of(overrides), config_dir)
    if not raw or not isinstance(folder := raw["run"].get("dir"), str):
        raise ConfigError(problems or "run.dir: is not text")
    return Path(folder).expanduser()


def read(folder: Path) -> Sweep:
    """Reads the sweep of a folder. Raises ConfigError."""
    try:
        values = json.loads((folder / FILE).read_bytes())
        trials = [Trial(**trial) for trial in values.pop("trials")]
        return Sweep(**{**values, "folder": folder, "trials": trials})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{folder / FILE}: cannot be read ({error}); run the sweep again to have it renewed"
        ) from None


def _with_trials(problem: str, names: Sequence[str], count: int) -> str:
    if len(names) == count:
        return problem
    return f"{problem} (with {'; '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''})"
