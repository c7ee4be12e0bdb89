"""The run directory: locked, checked against the identity of the run, and continued or started over."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import Timeout

from trainer import locks
from trainer.checkpoint.load import find_newest_or_fetch
from trainer.checkpoint.mirror import Mirror
from trainer.checkpoint.retention import Retention
from trainer.config import Config
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError, Interrupted, OnecurveError, Outage, TrainingError
from trainer.files import create_file, move, read_file, replace_file
from trainer.models.factory import knows_weights
from trainer.outage import is_outage
from trainer.processes import record_attempt
from trainer.resilience.interruption import STOP
from trainer.secrets import masked
from trainer.topology import Topology
from trainer.tracking.jsonl import read_status, write_status

CATALOG = "shards.json"
CHECKPOINTS = "checkpoints"
FAILURE = "logs/failure.json"
Identity = Callable[[int], dict[str, Any]]  # identifies a run up to step n
_Problem = tuple[str, bool]  # a text, and whether storage does not answer
PATIENCE_S = 3.0  # how long a rank that lost its peers waits for one of them to report why


class RunDirectory:
    """The directory of a run, locked. `checkpoint` is the one to continue from, `events` are those of finding it."""

    def __init__(self, config: Config, identity: Identity, topology: Topology, started_at: float):
        """Takes the directory. Every rank calls it; the main one acts.

        Raises ConfigError where the directory cannot be used or holds another run; TrainingError (on the main rank,
        PeerLost on the others) where its checkpoints are damaged beyond use, Outage where they cannot be read for now.
        """
        self.path = Path(config.run.dir).expanduser().absolute()
        self.topology, self.steps = topology, config.train.steps
        saves = config.checkpoint
        self.retention = Retention(saves.keep, saves.keep_every, saves.keep_best)
        self.mirror = Mirror(saves.mirror, topology, self.retention) if saves.mirror else None
        self.restarted: list[dict[str, Any]] = []  # events of the main rank: why the run was restarted
        self._lock: locks.Lock | None = None
        self._raise_on_all(self._take(config) if topology.is_main else None)
        try:
            blind = [rank for rank, sees in enumerate(topology.gather((self.path / "logs").is_dir())) if not sees]
            if blind:
                raise ConfigError(f"run.dir={self.path}: ranks {blind} do not see it; all nodes must share its storage")
            contents, checkpoints = config.checkpoint.verify == "full", self.path / CHECKPOINTS
            self.checkpoint, self.events = find_newest_or_fetch(checkpoints, topology, contents, self.mirror)
            self.events = self.restarted + self.events
            if self.checkpoint:
                self.events += _refuse_other_run(
                    self.checkpoint.manifest, identity(self.checkpoint.manifest["step"]), config, self.path
                )
            self._raise_on_all(self._begin(config, started_at) if topology.is_main else None)
        except BaseException as error:
            if isinstance(error, (TrainingError, Outage)):
                self.fail(topology.rank, error, lost_peer=False, step=0)
                with suppress(OSError):
                    write_final_status(self.path, str(error), error.exit_code)
            self._release()
            raise

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def keep(self, tokenizer: Tokenizer, catalog: dict[str, Any]) -> None:
        """Saves the tokenizer, so that the run can be sampled without its shards, and the catalog of the data that it
        began with. Raises ConfigError on all ranks where the data has other contents now."""
        problem = None
        if self.topology.is_main:
            tokenizer.save(self.path)
            if self.checkpoint is None:
                replace_file(self.path / CATALOG, json.dumps(catalog).encode())
            problem = _find_changed_contents(self.path, catalog)
        if problem := self.topology.broadcast(problem):
            raise ConfigError(problem)

    def fail(self, rank: int, error: OnecurveError, lost_peer: bool, step: int) -> dict[str, Any]:
        """Records a rank's failure, unless another rank was first; returns the failure that is recorded.

        A rank that only lost a peer first waits a moment for the peer's report.
        """
        failure = {"rank": rank, "step": step, "reason": str(error), "exit_code": error.exit_code, "retry": error.retry}
        failure["cause"] = re.sub(r'/\S+|\d+|["\\]', "", str(error))  # names and numbers differ from attempt to attempt
        failure["life"] = os.environ.get("ONECURVE_LIFE")  # the number of the attempt
        deadline = time.monotonic() + (PATIENCE_S if lost_peer else 0)
        while not (first := read_failure(self.path)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if first:
            return first
        with suppress(OSError):  # the disk may be what failed
            create_file(self.path / FAILURE, json.dumps(failure).encode())
        return read_failure(self.path) or failure

    def _raise_on_all(self, problem: _Problem | None) -> None:
        """Raises the main rank's problem on all ranks."""
        if first_problem := self.topology.broadcast(problem):
            text, is_away = first_problem
            raise (Outage if is_away else ConfigError)(text)

    def _take(self, config: Config) -> _Problem | None:
        """Creates and locks the directory. Returns the problem if that fails."""
        try:
            if config.run.fresh and not is_restarted():
                if self.mirror and self.mirror.steps():
                    return (
                        f"checkpoint.mirror={self.mirror.url}: holds a run; with run.fresh=true choose another",
                        False,
                    )
                if self.path.exists():
                    set_aside(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = locks.acquire_run(self.path)
            failure = read_failure(self.path)
            if failure and failure.get("retry"):  # somebody has taken care of any other failure
                self.restarted = [{"kind": "restart", "rank": failure["rank"], "reason": failure["reason"]}]
            (self.path / FAILURE).unlink(missing_ok=True)
            for name in (CHECKPOINTS, "logs"):
                (self.path / name).mkdir(exist_ok=True)
        except Timeout:
            return (
                f"run.dir={self.path}: {locks.describe_run_lock(self.path)}; stop it, or choose another run.name",
                False,
            )
        except OSError as error:
            return _describe_error(config, error)
        except (ConfigError, TrainingError, Outage) as error:
            return str(error), isinstance(error, Outage)
        return None

    def _begin(self, config: Config, started_at: float) -> _Problem | None:
        """Marks the run as running in its directory. Returns the problem if that fails."""
        stop, started = self.path / STOP, time.time() - (time.monotonic() - started_at)
        step = self.checkpoint.manifest["step"] if self.checkpoint else 0
        try:
            if stop.exists() and stop.stat().st_mtime < started:  # a request to an earlier attempt
                stop.unlink()
            replace_file(self.path / "config.yaml", yaml.safe_dump(config.resolved(), sort_keys=False).encode())
            record_attempt(self.path)
            write_status(self.path, {"state": "running", "step": step, "steps": self.steps, "reason": None})
        except OSError as error:
            return _describe_error(config, error)
        return None


def _describe_error(config: Config, error: OSError) -> _Problem:
    advice = "see to its storage" if is_outage(error) else "choose another run.dir"
    return f"run.dir={config.run.dir}: {locks.describe_refusal(error)}; {advice}", is_outage(error)


def set_aside(path: Path) -> None:
    """Renames the directory of an old run, which it locks meanwhile, and makes an empty one. Raises ConfigError,
    Timeout, OSError."""
    if not (path / "config.yaml").is_file() and not (path / "slurm").is_dir() and any(path.iterdir()):
        raise ConfigError(f"run.dir={path}: is not a run's folder; run.fresh=true does not touch it")
    if os.path.ismount(path := path.resolve()):  # of a link, its target: the new run is there, too
        raise ConfigError(f"run.dir={path}: is a mount point, which cannot be set aside; choose a folder in it")
    lock = locks.acquire_run(path)
    try:
        number = 1
        while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
            number += 1
        move(path, aside)
        path.mkdir(exist_ok=True)  # a link to it stays valid
        locks.lease_of(aside / locks.RUN).unlink(missing_ok=True)  # it was moved, too
    finally:
        lock.release()


def read_failure(folder: Path) -> dict[str, Any] | None:
    """Returns the record of the first rank that failed: {"rank", "step", "reason", "exit_code", "retry", "life"}."""
    try:
        return json.loads((folder / FAILURE).read_bytes())
    except (OSError, ValueError):
        return None


def write_final_status(folder: Path, reason: str, exit_code: int) -> None:
    """Ends a status that still says `running`, so that it does not say so after the end of the run."""
    status = read_status(folder)
    if status.get("state") == "running":
        state = "interrupted" if exit_code == Interrupted.exit_code else "failed"
        write_status(folder, {**status, "state": state, "reason": reason, "exit_code": exit_code})


def is_restarted() -> bool:
    """Returns whether a launcher restarted this command by itself: then it continues, even with run.fresh=true."""
    counts = ("ONECURVE_RESTART", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name, "0")) > 0 for name in counts)


def will_restart() -> bool:
    """Returns whether the launcher restarts this process after a crash. `onecurve train` may, and says so if not."""
    left = [int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("MAX_RESTARTS", "RESTART_COUNT")]
    return "ONECURVE_STORE" in os.environ or left[0] > left[1]


def _refuse_other_run(
    manifest: dict[str, Any], identity: dict[str, Any], config: Config, path: Path
) -> list[dict[str, Any]]:
    """Returns the events of continuing the run of `manifest`. Raises ConfigError where this would be another run."""
    # Earlier versions wrote secrets.
    before, after = dict(_flatten(masked(manifest["identity"]))), dict(_flatten(identity))
    # Earlier versions did not record what a user's model calls `weights`.
    unrecorded = not knows_weights(config) and "weights" not in manifest["identity"].get("model", {})
    differences = [
        _describe_difference(name, before.get(name), after.get(name), path)
        for name in {**before, **after}
        if before.get(name) != after.get(name) and not (unrecorded and f"{name}.".startswith("model.weights."))
    ]
    if differences:
        advice = "undo the change to continue it, or choose another run.name, or run.fresh=true"
        raise ConfigError([*differences, f"{path}: holds another run; {advice}"])
    if config.train.steps < manifest["step"]:
        raise ConfigError(f"train.steps={config.train.steps}: this run has done {manifest['step']} steps already")
    before, after = dict(_flatten(masked(manifest["config"]))), dict(_flatten(config.resolved()))
    changed = {name: [before.get(name), value] for name, value in after.items() if before.get(name) != value}
    return [{"kind": "config_changed", "changes": changed}] if changed else []


def _describe_difference(name: str, before: Any, after: Any, path: Path) -> str:
    """Describes a difference by the keys of the config. Of shards only a checksum is known here."""
    if name.startswith("data.shards."):
        source = name.removeprefix("data.shards.")
        key = "data.shards" if source == "all" else f"data.sources.{source}.shards"
        if before and after:
            changes = "other names, order, keys, counts or sizes"
            return f"{key}: not the shards that the run began with, but {changes}; {path / CATALOG} lists them"
        return (
            f"{key}: the run has {'such' if before else 'no such'} shards, this command {'none' if before else 'has'}"
        )
    if name.startswith("data.weights."):
        step = name.removeprefix("data.weights.")
        name = "data.sources, weights" if step == "0" else f"data.reweight.{step}"
    return f"{name}: the run has {before!r}, this command {after!r}"


def _find_changed_contents(path: Path, catalog: dict[str, Any]) -> list[str]:
    """Returns a problem for each source whose data has changed since the run began, though it has the same sizes."""
    try:
        before = json.loads(read_file(path / CATALOG))
        changed = [name for name in catalog if before[name]["fingerprint"] != catalog[name]["fingerprint"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # no record to compare with
    advice = "restore it, or choose another run.name, or run.fresh=true"
    return [
        f"data source {name!r}: other texts than those that the run in {path} began with; {advice}" for name in changed
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for name, value in tree.items():
        rows += _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return rows
