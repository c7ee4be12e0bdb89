"""Weights & Biases: one W&B run for the whole life of a run, offline unless a key is there.

`wandb` is imported when the run starts, never before. Its errors are raised; `Trackers` makes them a warning.
Our own counters are the x-axes: W&B's own step cannot go back to where a run was resumed.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from trainer.tracking.base import Row, RunInfo
from trainer.tracking.jsonl import write_json

Say = Callable[[str], None]
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
UNNAMED = {"eval", "fingerprint"}  # an evaluation has names of its own; a fingerprint is no number to draw
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
EXIT_CODES = {"finished": 0, "interrupted": 75}
INIT_S = 30.0  # how long the server may take to answer at the start, before it goes on offline
FINISH_S = 25.0  # and to take what is left at the end; the rest can be synced later
SLACK_S = 5.0  # for W&B's own process to start or end


class WandB:
    """Logs to W&B from the main rank, into RUN_DIR/wandb; RUN_DIR/wandb.json keeps the run's id.

    mode: `auto` is W&B's own WANDB_MODE, else online when W&B finds a key (WANDB_API_KEY, netrc, its
    settings), else offline. It never asks for a key: `online` without one goes offline and says so.
    """

    def __init__(self, mode: Mode = "auto", project: str | None = None, say: Say | None = None):
        self.mode = mode
        self.project = project or os.environ.get("WANDB_PROJECT") or "onecurve"
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self.run: Any = None
        self.ended = False

    @property
    def wanted(self) -> str:
        return os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode

    def load(self) -> None:
        if self.wanted != "disabled":
            import wandb  # noqa: F401

    def start(self, info: RunInfo) -> None:
        self.folder, wanted = info.folder, self.wanted
        if wanted == "disabled":
            self.ended = True
            return
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it waits for its server when the process ends
        import wandb

        quiet: dict[str, Any] = {
            "silent": True,
            "quiet": True,
            "console": "off",
            "show_info": False,
            "show_warnings": False,
        }
        wandb.setup(settings=wandb.Settings(**quiet))
        online = wanted != "offline" and has_credentials(wandb)
        if wanted == "online" and not online:
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
        arguments: dict[str, Any] = {
            "project": self.project,
            "id": run_id(info.folder),
            "name": info.name,
            "dir": str(info.folder),
            "config": {**info.config, **{f"env/{name}": value for name, value in info.environment.items()}},
            "resume": "allow",
            "allow_val_change": True,  # what may change between two lives of a run
            "settings": settings,
        }
        self.run = _open(wandb, arguments, self.say) if online else wandb.init(mode="offline", **arguments)
        self.run.define_metric("progress/step")
        self.run.define_metric("*", step_metric="progress/step")
        self.run.define_metric("val/loss", step_metric="progress/step", summary="min")

    def rows(self, rows: list[Row]) -> None:
        for row in rows if self.run else ():
            self.run.log(named(row))

    def event(self, event: Row) -> None:
        """Alerts of what somebody should look at; the others are in events.jsonl, evaluations in their rows."""
        if self.run and (title := ALERTS.get(event["kind"])):
            self.run.alert(f"{title} at step {event.get('step')}", str(event.get("reason", "")), level="WARN")

    def close(self, status: Row) -> None:
        """Ends the W&B run and says how to upload what is on this disk alone."""
        if self.ended or not self.run:
            return
        self.ended = True
        if status["state"] == "interrupted":
            self.run.mark_preempting()
        try:
            self.run.finish(exit_code=EXIT_CODES.get(status["state"], 4))
        except TimeoutError:
            self.say(f"W&B did not take everything within {FINISH_S:.0f} s; {self.advice}")
        else:
            if self._offline():
                self.say(f"W&B was offline; {self.advice}")

    @property
    def patience_s(self) -> float:
        return SLACK_S + FINISH_S + (0 if self.run or self.ended else _init_s())

    @property
    def advice(self) -> str:
        return f"to upload this run:\n  {shlex.join(['wandb', 'sync', *map(str, self._on_disk())])}"

    def _offline(self) -> list[Path]:
        """What was logged offline, in this life or before."""
        return sorted(self.folder.glob("wandb/offline-run-*"))

    def _on_disk(self) -> list[Path]:
        """What may not be on the server: also of this life, whatever it is."""
        own = [Path(self.run.settings.sync_dir)] if self.run else sorted(self.folder.glob("wandb/run-*"))
        return list(dict.fromkeys([*self._offline(), *own]))


def named(row: Row) -> dict[str, Any]:
    """A row under its W&B names: slashes, units, numbers only.

    >>> named({"step": 3, "loss": 1.5, "eval": {"loss": 2.0}})
    {'progress/step': 3, 'train/loss': 1.5, 'val/loss': 2.0}
    """
    values = {NAMES.get(name, f"train/{name}"): value for name, value in row.items() if name not in UNNAMED}
    values |= {f"val/{name}": value for name, value in (row.get("eval") or {}).items()}
    if row.get("step_s"):
        values["perf/data_wait_frac"] = row["data_wait_s"] / row["step_s"]
    return {name: value + 0 for name, value in values.items() if value is not None}  # + 0: True is 1


def run_id(folder: Path) -> str:
    """The W&B id of the run in `folder`: made at its birth, the same in all its lives."""
    path = folder / "wandb.json"
    if not path.exists():
        write_json(path, {"id": secrets.token_hex(6)})
    return json.loads(path.read_text(encoding="utf-8"))["id"]


def _open(wandb: Any, arguments: dict[str, Any], say: Say) -> Any:
    """Online if the server answers, else offline."""
    try:
        return wandb.init(mode="online", **arguments)
    except wandb.Error as error:
        say(f"W&B: cannot go online, logging offline: {error}")
        wandb.teardown()  # its service holds on to the run id
        return wandb.init(mode="offline", **arguments)


def has_credentials(wandb: Any) -> bool:
    """Whether W&B finds a key, wherever it looks. Asks nobody."""
    try:
        return wandb.login(prompt=False, verify=False)
    except wandb.Error:  # malformed: the same as none
        return False


def _init_s() -> float:
    return float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_S))
