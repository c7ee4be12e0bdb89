"""What a sweep consists of: its trials, checked before anything starts, and the file that says so."""

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
    """A run of a sweep. `overrides` are those of the run, with its folder and its secrets; `values`: of the swept keys,
    as they may be shown."""

    number: int
    folder: str
    overrides: list[str]
    values: dict[str, str]
    steps: int

    @property
    def name(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or "the only one"

    @property
    def finished(self) -> bool:
        status = read_status(Path(self.folder))
        return status.get("state") == "finished" and status.get("steps") == self.steps


@dataclass
class Sweep:
    """`sweep.json`. `search`: how values are chosen, where that depends on what came of others."""

    folder: Path
    swept: list[str]
    procs: int
    config_dir: str | None
    trials: list[Trial]
    search: dict[str, Any] | None = None

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        told = {**asdict(self), "folder": str(self.folder)}
        for trial in told["trials"]:
            trial["overrides"] = [shown_override(text) for text in trial["overrides"]]
        write_json(self.folder / FILE, told)


def expand(overrides: Sequence[str], procs: int, config_dir: str | None = None) -> list[Trial]:
    """The trials of a command line with sweeps, each composed and checked for so many processes.

    Raises ConfigError with all problems of all trials, each once.
    """
    swept, jobs, wrong = sweep.jobs(overrides)
    if not 1 <= len(jobs) <= MOST:
        raise ConfigError([*wrong, f"{len(jobs)} trials: at least one, at most {MOST}"])
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
        wrong.append("two trials differ in secrets alone, or not at all: they would share a folder")
    if wrong or problems:
        raise ConfigError([*wrong, *(_of_some(problem, names, len(jobs)) for problem, names in problems.items())])
    return trials


def trial_of(number: int, job: Sequence[str], swept: Sequence[str], procs: int, config_dir: str | None) -> Trial:
    """One trial, checked. Raises ConfigError."""
    config = load(job, procs, config_dir)
    folder = str(Path(config.run.dir).expanduser() / sweep.name_of(job))
    trial = Trial(number, folder, [*job, _override("run.dir", folder)], _values(job, swept), config.train.steps)
    shown = {"group": config.run.name, "name": trial.name[:LONGEST_NAME]}
    own = [_override(f"track.wandb.{key}", text) for key, text in shown.items() if not getattr(config.track.wandb, key)]
    own = [text.replace("${", r"\${") for text in own]  # names, not what they would resolve to, which may be secret
    return replace(trial, overrides=[*trial.overrides, *own])


def _override(key: str, text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def _values(job: Sequence[str], swept: Sequence[str]) -> dict[str, str]:
    return masked(sweep.values_of(job, swept))


def folder_of(overrides: Sequence[str], config_dir: str | None) -> Path:
    """The sweep's own: `run.dir` of what is not swept."""
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


def _of_some(problem: str, names: Sequence[str], count: int) -> str:
    if len(names) == count:
        return problem
    return f"{problem} (with {'; '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''})"
