"""Weights & Biases: one W&B run for the whole life of a run, offline unless a key is there.

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
UNNAMED = {"eval", "fingerprint"}  # an evaluation has names of its own; a fingerprint is not a number to draw
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
KEPT = "wandb.json"  # in the run directory
EXIT_CODES = {"finished": 0, "interrupted": 75}
INIT_S = 30.0  # how long the server may take to answer at the start, before it goes on offline
FINISH_S = 25.0  # and to take what is left at the end; the rest can be synced later
SLACK_S = 5.0  # for W&B's own process to start or end


class WandB:
    """Logs to W&B from the main rank, into RUN_DIR/wandb; RUN_DIR/wandb.json keeps the run's id.

    mode: `auto` is W&B's own WANDB_MODE, else online when W&B finds a key (WANDB_API_KEY, netrc, its
    settings), else offline. It never asks for a key: `online` without one goes offline and says so.
    What is None is as W&B's own variables say. Rows that a killed attempt did not get to W&B are logged by the next.
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
        kept = identity(info.folder)
        self.id, self.last = kept["id"], info.step
        local = self._files("*run-*")
        arguments: dict[str, Any] = {
            "project": self.project,
            "id": self.id,
            "name": self.name or info.name,
            "group": self.group,
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
        if kept.get("logged", 0) < info.step:
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
            write_json(self.folder / KEPT, {**identity(self.folder), "logged": self.last})
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
        return [path.parent for path in self._files("offline-run-*")]

    def _files(self, folders: str) -> list[Path]:
        """W&B's own files of this run: a copied run directory has another's, too."""
        return sorted(self.folder.glob(f"wandb/{folders}/run-{self.id}.wandb"))

    def _on_disk(self) -> list[Path]:
        """What may not be on the server: also of this life, whatever it is."""
        own = [Path(self.run.settings.sync_dir)] if self.run else [path.parent for path in self._files("run-*")]
        return list(dict.fromkeys([*self._offline(), *own]))


def wandb_names(row: Row) -> dict[str, Any]:
    """A row under its W&B names: slashes, units, numbers only.

    >>> named({"step": 3, "loss": 1.5, "eval": {"loss": 2.0}})
    {'progress/step': 3, 'train/loss': 1.5, 'val/loss': 2.0}
    """
    values = {NAMES.get(name, f"train/{name}"): value for name, value in row.items() if name not in UNNAMED}
    values |= {f"val/{name}": value for name, value in (row.get("eval") or {}).items()}
    if row.get("step_s"):
        values["perf/data_wait_frac"] = row["data_wait_s"] / row["step_s"]
    return {name: value + 0 for name, value in values.items() if value is not None}  # + 0: True is 1


def identity(folder: Path) -> Row:
    """What RUN_DIR/wandb.json says: the W&B `id` of the run, made at its birth, the same in all its attempts; the
    `path` of its directory; and the last step that was `logged`, if the attempt before ended in order.

    A copy of a run directory gets an id of its own: the one that it was copied from is still where the file says.
    """
    kept = _kept(folder)
    origin = Path(kept.get("path", folder))
    is_copy = _kept(origin).get("id") == kept.get("id") and not origin.samefile(folder)
    if not kept or is_copy:
        kept = {"id": secrets.token_hex(6)}
    if kept.get("path") != str(folder.absolute()):
        kept["path"] = str(folder.absolute())
        write_json(folder / KEPT, kept)
    return kept


def _kept(folder: Path) -> Row:
    try:
        kept = json.loads((folder / KEPT).read_bytes())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) and isinstance(kept.get("id"), str) else {}


def _last_step(run: Any, local: Iterable[Path]) -> int:
    """The last step that W&B has of the attempts before, or may be given by `wandb sync` of these files; 0: none."""
    steps = [0]
    with suppress(TypeError, ValueError):  # a server that knows nothing of it
        steps.append(int(run.summary.get("progress/step") or 0))
    for path in local:
        if run.offline or path.parent.name.startswith("offline-"):
            steps += _steps_in(path)
    return max(steps)


def _steps_in(path: Path) -> Iterator[int]:
    """The steps that one of W&B's own files has rows of; a killed attempt's lacks its last ones."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace", **quiet) as process:
        for line in process.stdout or ():
            with suppress(ValueError, KeyError, TypeError):  # no row, or a line that is cut short
                yield int(json.loads(line)["history"]["item"]["progress/step"])


def _open(wandb: Any, arguments: dict[str, Any], say: PrintLine) -> Any:
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
