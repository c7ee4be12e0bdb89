"""What a tracker is: it is told numbers and events, and may never stop a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]


@dataclass(frozen=True)
class RunInfo:
    """What a tracker may know of the run when it starts (or goes on)."""

    name: str
    folder: Path
    steps: int
    step: int  # the restored step; 0 at the start
    config: dict[str, Any]  # resolved, JSON-able, without secrets
    environment: dict[str, Any]  # versions, devices, topology; JSON-able


class Tracker(Protocol):
    """A sink of the run's numbers. Only the main rank has any."""

    def start(self, info: RunInfo) -> None: ...

    def rows(self, rows: list[Row]) -> None:
        """The optimizer steps since the last call, one row each, in rising order.

        step, tokens, samples: counts since the birth of the run. loss: the objective's, of text nats a target.
        grad_norm: unclipped. lr. step_s: wall seconds of the step, waiting for data included, evaluation and
        checkpoints not. data_wait_s: the part of it spent waiting for data. tokens_per_s. skipped: whether the update
        was.
        Optional: mfu (model FLOPs over the devices' dense bf16 arithmetic, 0 to 1), mem_gib (the most that any device
        held since the last reading), eval: {"loss", ...}. Besides these, here and in eval, the numbers of the
        objective's `summary`; those of another model that is trained have its name before them, `critic/loss`.
        """

    def event(self, event: Row) -> None:
        """Something that happened: {"time": ISO 8601 in UTC, "kind", "step", ...free fields}.

        Kinds: start, resume, config_changed, checkpoint, checkpoint_failed, checkpoint_damaged, tracker_off,
        disk_failed, disk_recovered, interrupted, finished, failed, optimizer_state_reset.
        """

    def close(self, status: Row) -> None:
        """The end: what `status.json` says."""
