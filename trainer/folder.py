"""The run's folder: taken, checked against what the run is, and continued or started over."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from trainer.checkpoint.load import newest_everywhere
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.topology import Topology

CHECKPOINTS = "checkpoints"


class RunFolder:
    """`found` is the checkpoint to go on from, `events` what is to be told of finding it."""

    def __init__(self, config: Config, identity: dict[str, Any], topology: Topology):
        """Every rank calls it; the main one acts. Raises ConfigError, with nothing changed in the folder."""
        self.path = Path(config.run.dir).expanduser().absolute()
        self._lock = FileLock(self.path / ".lock", blocking=False)
        problem = None
        if topology.is_main:
            problem = self._take(config)
        if problem := topology.broadcast(problem):
            raise ConfigError(problem)
        self.found, self.events = newest_everywhere(self.path / CHECKPOINTS, topology)
        if self.found:
            _same_run(identity, self.found.manifest["identity"], self.path)
            if config.train.steps < self.found.manifest["step"]:
                raise ConfigError(
                    f"train.steps={config.train.steps}: this run has done {self.found.manifest['step']} steps already"
                )
            self.events += _changes(self.found.manifest["config"], config.resolved())
        if topology.is_main:
            (self.path / CHECKPOINTS).mkdir(exist_ok=True)
            (self.path / "STOP").unlink(missing_ok=True)
            (self.path / "config.yaml").write_text(yaml.safe_dump(config.resolved(), sort_keys=False))

    def close(self) -> None:
        self._lock.release()

    def _take(self, config: Config) -> str | None:
        """Makes the folder ours; gives the problem if it cannot be."""
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        try:
            if config.run.fresh and not restarted and self.path.exists():
                _set_aside(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            return f"run.dir={self.path}: another process trains in this folder; stop it, or choose another run.name"
        except OSError as error:
            return f"run.dir={config.run.dir}: cannot be written: {error.strerror}; choose another run.dir"
        return None


def _set_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(aside)


def _same_run(now: dict[str, Any], then: dict[str, Any], path: Path) -> None:
    """Raises ConfigError naming each part of what the run is that differs."""
    before, after = dict(_flat(then)), dict(_flat(now))
    differences = [
        f"{name}: the run has {before.get(name)!r}, this command {after.get(name)!r}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
    if differences:
        raise ConfigError([
            *differences,
            f"{path}: holds another run; undo the change to continue it, or choose another run.name, or run.fresh=true",
        ])  # fmt: skip


def _changes(then: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """The event that records which keys differ from the life before."""
    before, after = dict(_flat(then)), dict(_flat(now))
    changed = {name: [before.get(name), value] for name, value in after.items() if before.get(name) != value}
    return [{"kind": "config_changed", "changes": changed}] if changed else []


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for name, value in tree.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return rows
