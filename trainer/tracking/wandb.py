"""Logs to Weights & Biases: one W&B run for all attempts of a run, offline unless an API key is found.

`wandb` is imported when the run starts, never before. Its errors are raised; `Trackers` makes them a warning.
Our own counters are the x-axes: W&B's own step cannot go back to where a run was resumed.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from trainer.tracking import jsonl
from trainer.tracking.base import Row, RunInfo
from trainer.tracking.jsonl import write_json

PrintLine = Callable[[str], None]
Mode = Literal["auto", "offline", "online", "disabled"]

ALERTS = {
    "checkpoint_failed": "a checkpoint could not be saved",
    "checkpoint_not_mirrored": "a checkpoint could not be copied",
    "checkpoint_damaged": "a checkpoint is damaged",
    "disk_failed": "the run's folder cannot be written",
    "restart": "the run was restarted",
    "bad_step": "a step was bad",
    "corrupted": "a process has wrong weights",
}
UNNAMED = {"eval", "fingerprint"}  # an evaluation has its own names; a fingerprint is not a number to plot
NAMES = {
    "step": "progress/step",
    "tokens": "progress/tokens",
    "samples": "progress/samples",
    "step_s": "perf/step_s",
    "data_wait_s": "perf/data_wait_s",
    "tokens_per_s": "perf/tokens_per_s",
    "mfu": "perf/mfu",
    "mem_gib": "mem/peak_gib",
}  # every other number of a row is under train/, of an evaluation under val/
STATE_FILE = "wandb.json"  # in the run directory
EXIT_CODES = {"finished": 0, "interrupted": 75}
INIT_S = 30.0  # how long the server may take to answer at the start, before it goes on offline
FINISH_S = 25.0  # and to accept the rest at the end; what remains can be synced later
SLACK_S = 5.0  # for W&B's own process to start or end


class WandB:
    """Logs to W&B from the main rank, into RUN_DIR/wandb; RUN_DIR/wandb.json keeps the run's id.

    mode: `auto` is W&B's own WANDB_MODE, else online when W&B finds a key (WANDB_API_KEY, netrc, its
    settings), else offline. It never asks for a key: `online` without one goes offline and says so.
    Arguments that are None follow W&B's own variables. The next attempt logs rows that a killed one did not send.
    """

    def __init__(
        self,
        mode: Mode = "auto",
        project: str | None = None,
        say: PrintLine | None = None,
        group: str | None = None,
        name: str | None = None,
    ):
        self.mode = mode
        self.project = project or os.environ.get("WANDB_PROJECT") or "onecurve"
        self.group, self.name = group, name or os.environ.get("WANDB_NAME")
        self.id, self.last = "*", 0
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self.run: Any = None
        self.is_closed = False

    @property
    def requested_mode(self) -> str:
        return os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode

    def load(self) -> None:
        if self.requested_mode != "disabled":
            import wandb  # noqa: F401

    def start(self, info: RunInfo) -> None:
        self.folder, requested_mode = info.folder, self.requested_mode
        if requested_mode == "disabled":
            self.is_closed = True
            return
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it waits for its server at the end of the process
        import wandb

        quiet: dict[str, Any] = {
            "silent": True,
            "quiet": True,
            "console": "off",
            "show_info": False,
            "show_warnings": False,
        }
        wandb.setup(settings=wandb.Settings(**quiet))
        online = requested_mode != "offline" and has_credentials(wandb)
        if requested_mode == "online" and not online:
            self.say("W&B: no API key is configured (`wandb login`): logging offline")
        settings = wandb.Settings(
            **quiet,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            init_timeout=_init_s(),
            finish_timeout=FINISH_S,
            finish_timeout_raises=True,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        state = identity(info.folder)
        self.id, self.last = state["id"], info.step
        local = self._files("*run-*")
        arguments: dict[str, Any] = {
            "project": self.project,
            "id": self.id,
            "name": self.name or info.name,
            "group": self.group,
            "dir": str(info.folder),
            "config": {**info.config, **{f"env/{name}": value for name, value in info.environment.items()}},
            "resume": "allow",
            "allow_val_change": True,  # keys that may change between two attempts of a run
            "settings": settings,
        }
        self.run = _open(wandb, arguments, self.say) if online else wandb.init(mode="offline", **arguments)
        self.run.define_metric("progress/step")
        self.run.define_metric("*", step_metric="progress/step")
        self.run.define_metric("val/loss", step_metric="progress/step", summary="min")
        if state.get("logged", 0) < info.step:
            self._fill(_last_step(self.run, local), info.step)

    def _fill(self, since: int, step: int) -> None:
        """Logs the recorded rows after step `since`, up to the restored one."""
        rows = jsonl.read(self.folder / "metrics.jsonl") if since < step else []
        self.rows([row for row in rows if since < row["step"] <= step])

    def rows(self, rows: list[Row]) -> None:
        for row in rows if self.run else ():
            self.run.log(wandb_names(row))
            self.last = row["step"]

    def event(self, event: Row) -> None:
        """Alerts about events that need attention; the others are in events.jsonl, evaluations in their rows."""
        if self.run and (title := ALERTS.get(event["kind"])):
            self.run.alert(f"{title} at step {event.get('step')}", str(event.get("reason", "")), level="WARN")

    def close(self, status: Row) -> None:
        """Ends the W&B run and says how to upload data that is only on this disk."""
        if self.is_closed or not self.run:
            return
        self.is_closed = True
        if status["state"] == "interrupted":
            self.run.mark_preempting()
        try:
            self.run.finish(exit_code=EXIT_CODES.get(status["state"], 4))
        except TimeoutError:
            self.say(f"W&B did not take everything within {FINISH_S:.0f} s; {self.advice}")
        else:
            write_json(self.folder / STATE_FILE, {**identity(self.folder), "logged": self.last})
            if self._offline():
                self.say(f"W&B was offline; {self.advice}")

    @property
    def patience_s(self) -> float:
        return SLACK_S + FINISH_S + (0 if self.run or self.is_closed else _init_s())

    @property
    def advice(self) -> str:
        return f"to upload this run:\n  {shlex.join(['wandb', 'sync', *map(str, self._on_disk())])}"

    def _offline(self) -> list[Path]:
        """Returns the folders that were logged offline, in this attempt or before."""
        return [path.parent for path in self._files("offline-run-*")]

    def _files(self, folders: str) -> list[Path]:
        """Returns W&B's own files of this run: a copied run directory also has those of the original."""
        return sorted(self.folder.glob(f"wandb/{folders}/run-{self.id}.wandb"))

    def _on_disk(self) -> list[Path]:
        """Returns the folders that may not be on the server, that of this attempt included in any mode."""
        live_folders = (
            [Path(self.run.settings.sync_dir)] if self.run else [path.parent for path in self._files("run-*")]
        )
        return list(dict.fromkeys([*self._offline(), *live_folders]))


def wandb_names(row: Row) -> dict[str, Any]:
    """Returns a row under its W&B names: slashes, units, numbers only.

    >>> wandb_names({"step": 3, "loss": 1.5, "eval": {"loss": 2.0}})
    {'progress/step': 3, 'train/loss': 1.5, 'val/loss': 2.0}
    """
    values = {NAMES.get(name, f"train/{name}"): value for name, value in row.items() if name not in UNNAMED}
    values |= {f"val/{name}": value for name, value in (row.get("eval") or {}).items()}
    if row.get("step_s"):
        values["perf/data_wait_frac"] = row["data_wait_s"] / row["step_s"]
    return {name: value + 0 for name, value in values.items() if value is not None}  # + 0: True is 1


def identity(folder: Path) -> Row:
    """Returns RUN_DIR/wandb.json: the W&B `id` of the run, made at its start, the same in all attempts; the `path` of
    its directory; and the last step `logged`, if the previous attempt ended cleanly.

    A copy of a run directory gets its own id: the original still exists at `path`.
    """
    state = _read_state(folder)
    origin = Path(state.get("path", folder))
    is_copy = _read_state(origin).get("id") == state.get("id") and not origin.samefile(folder)
    if not state or is_copy:
        state = {"id": secrets.token_hex(6)}
    if state.get("path") != str(folder.absolute()):
        state["path"] = str(folder.absolute())
        write_json(folder / STATE_FILE, state)
    return state


def _read_state(folder: Path) -> Row:
    try:
        state = json.loads((folder / STATE_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) and isinstance(state.get("id"), str) else {}


def _last_step(run: Any, local: Iterable[Path]) -> int:
    """Returns the last step that W&B has of earlier attempts, or may get by `wandb sync` of these files; 0: none."""
    steps = [0]
    with suppress(TypeError, ValueError):  # a server that does not know the run
        steps.append(int(run.summary.get("progress/step") or 0))
    for path in local:
        if run.offline or path.parent.name.startswith("offline-"):
            steps += _steps_in(path)
    return max(steps)


def _steps_in(path: Path) -> Iterator[int]:
    """Yields the steps in one of W&B's own files; that of a killed attempt lacks the last ones."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace", **quiet) as process:
        for line in process.stdout or ():
            with suppress(ValueError, KeyError, TypeError):  # not a row, or a torn line
                yield int(json.loads(line)["history"]["item"]["progress/step"])


def _open(wandb: Any, arguments: dict[str, Any], say: PrintLine) -> Any:
    """Starts the W&B run: online if the server answers, else offline."""
    try:
        return wandb.init(mode="online", **arguments)
    except wandb.Error as error:
        say(f"W&B: cannot go online, logging offline: {error}")
        wandb.teardown()  # its service keeps the run id in use
        return wandb.init(mode="offline", **arguments)


def has_credentials(wandb: Any) -> bool:
    """Returns whether W&B finds an API key anywhere. Never prompts for one."""
    try:
        return wandb.login(prompt=False, verify=False)
    except wandb.Error:  # malformed: the same as none
        return False


def _init_s() -> float:
    return float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_S))
