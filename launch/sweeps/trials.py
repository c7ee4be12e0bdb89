"""What a sweep consists of: its trials, checked before anything starts, and the file that says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config import sweep
from trainer.config.compose import compose, load
from trainer.errors import ConfigError
from trainer.tracking.jsonl import read_status, write_json

FILE = "sweep.json"
MOST = 10_000  # more is a mistake


@dataclass(frozen=True)
class Trial:
    """A run of a sweep. `overrides` are those of the run, with its folder; `values`: what the swept keys are."""

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
        write_json(self.folder / FILE, {**asdict(self), "folder": str(self.folder)})


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
                name = " ".join(f"{key}={value}" for key, value in sweep.values_of(job, swept).items())
                problems.setdefault(problem, []).append(name)
    if wrong or problems:
        raise ConfigError([*wrong, *(_of_some(problem, names, len(jobs)) for problem, names in problems.items())])
    return trials


def trial_of(number: int, job: Sequence[str], swept: Sequence[str], procs: int, config_dir: str | None) -> Trial:
    """One trial, checked. Raises ConfigError."""
    config = load(job, procs, config_dir)
    folder = str(Path(config.run.dir).expanduser() / sweep.name_of(job))
    escaped = folder.replace("\\", "\\\\").replace("'", "\\'")
    return Trial(number, folder, [*job, f"run.dir='{escaped}'"], sweep.values_of(job, swept), config.train.steps)


def folder_of(overrides: Sequence[str], config_dir: str | None) -> Path:
    """The sweep's own: `run.dir` of what is not swept."""
    raw, problems = compose(sweep.plain_of(overrides), config_dir)
    if not raw or not isinstance(folder := raw["run"].get("dir"), str):
        raise ConfigError(problems or "run.dir: is not text")
    return Path(folder).expanduser()


def read(folder: Path) -> Sweep:
    """Of a sweep's folder. Raises ConfigError."""
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
