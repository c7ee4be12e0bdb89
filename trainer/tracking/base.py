"""The interface of a tracker: it receives metrics and events, and must never stop a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]


@dataclass(frozen=True)
class RunInfo:
    """The facts about the run that a tracker gets when it starts or resumes."""

    name: str
    folder: Path
    steps: int
    step: int  # the restored step; 0 at the start
    config: dict[str, Any]  # resolved, JSON-able, without secrets
    environment: dict[str, Any]  # versions, devices, topology; JSON-able


class Tracker(Protocol):
    """A sink for the run's metrics and events. Only the main rank has trackers."""

    def start(self, info: RunInfo) -> None: ...

    def rows(self, rows: list[Row]) -> None:
        """Records the optimizer steps since the last call, one row each, in rising order.

        step, tokens, samples: counts since the start of the run. loss: the objective's; for text in nats per target.
        grad_norm: unclipped. lr. step_s: wall seconds of the step with its wait for data, without evaluation and
        checkpoints. data_wait_s: the part of it spent waiting for data. tokens_per_s. skipped: whether the update
        was skipped.
        Optional: mfu (model FLOPs over the devices' dense bf16 arithmetic, 0 to 1), mem_gib (the most that any device
        held since the last reading), eval: {"loss", ...}. Also, here and in eval, the metrics of the objective's
        `summary`; those of a second trained model are prefixed with its name, `critic/loss`.
        """

    def event(self, event: Row) -> None:
        """Records an event: {"time": ISO 8601 in UTC, "kind", "step", ...free fields}.

        Kinds: start, resume, config_changed, checkpoint, checkpoint_failed, checkpoint_damaged, tracker_off,
        disk_failed, disk_recovered, interrupted, finished, failed, optimizer_state_reset.
        """

    def close(self, status: Row) -> None:
        """Ends the tracker with the final status, as in `status.json`."""
