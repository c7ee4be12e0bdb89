"""Bad steps: a loss or gradient that is not finite, or a spike. Their update is skipped; a guard decides what follows.

The device decides whether an update is done, by one comparison of the gradient norm with a limit. The host learns it
when it reads the metrics of several steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.config import schema
from trainer.errors import TrainingError

_SIGMA = 1.4826  # a standard deviation, in median deviations of normal numbers
_LEAST = 0.01  # of the median: numbers that hardly vary are no reason to call a small step a spike
Row = dict[str, Any]


class Rollback(Exception):  # not an error: the loop continues from a checkpoint
    """Tells the loop to continue from the last checkpoint."""


class RollingWindow:
    """The values of the last good steps, float64 on the device; nothing here waits for the device."""

    def __init__(self, window: int, sigmas: float, device: torch.device):
        self.values = torch.full((window,), torch.nan, dtype=torch.float64, device=device)
        self.sigmas = sigmas

    def limit(self) -> Tensor:
        """Returns the limit of a value, infinite while less than a quarter of the window is filled."""
        median = self.values.nanmedian()
        deviation = (self.values - median).abs().nanmedian().maximum(_LEAST * median.abs())
        count = self.values.isnan().logical_not().sum()
        return torch.where(4 * count >= len(self.values), median + self.sigmas * _SIGMA * deviation, torch.inf)

    def record(self, value: Tensor, is_good: Tensor) -> None:
        self.values = torch.where(is_good, torch.cat([self.values[1:], value.double().reshape(1)]), self.values)

    def recorded_values(self) -> list[float]:
        return self.values[self.values.isfinite()].tolist()

    def load(self, recorded: Sequence[float]) -> None:
        """Loads recorded values, also those of a window of another length."""
        window = len(self.values)
        newest = torch.tensor(list(recorded)[-window:], dtype=torch.float64)
        self.values = torch.cat([torch.full((window - len(newest),), torch.nan, dtype=torch.float64), newest]).to(
            self.values.device
        )


class Guard:
    def __init__(self, config: schema.Guard, device: torch.device):
        self.config, self.device = config, device
        self.windows = {
            kind: RollingWindow(config.window, sigmas, device)
            for kind, sigmas in (("norm", config.norm_spike), ("loss", config.loss_spike))
            if sigmas is not None
        }
        self.retried_steps: set[int] = set()  # bad steps that the run has rolled back for
        self.skipped_steps: list[int] = []
        self.corruptions = 0

    @property
    def needs_loss(self) -> bool:
        """Returns whether the loss must be known before the update."""
        return "loss" in self.windows

    def limit(self, loss: float | None) -> Tensor | float:
        """Returns the gradient norm from which on an update is skipped. `loss` is the step's mean over all ranks."""
        if loss is not None and not loss < float(self.windows["loss"].limit()):
            return -math.inf
        return self.windows["norm"].limit() if "norm" in self.windows else math.inf

    def record(self, norm: Tensor, loss: float | None, skipped: Tensor) -> None:
        """Records the values of a step."""
        if not self.windows:
            return
        is_good = skipped.logical_not().to(self.device)
        if "norm" in self.windows:
            self.windows["norm"].record(norm.to(self.device), is_good)
        if loss is not None:
            self.windows["loss"].record(torch.tensor(loss, device=self.device), is_good)

    def judge(self, row: Row, may_go_back: bool) -> Row:
        """Decides what follows a bad step, and returns its event; `action` is "rollback", "left out" or "kept".

        Raises TrainingError if the run has to end.
        """
        step, measurements = row["step"], f"loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}"
        advice = f"Lower optimizer.lr (now {row['lr']:g}), lengthen schedule.warmup_steps, or try precision=fp32"
        kind = "not finite" if not math.isfinite(row["loss"] + row["grad_norm"]) else "a spike"
        event = {"kind": "bad_step", "step": step, "reason": f"{measurements}: {kind}"}
        if self.config.bad_step == "stop":
            raise TrainingError(f"step {step}: {measurements}: {kind}. {advice}.")
        if self.config.bad_step == "rollback" and may_go_back and step not in self.retried_steps:
            self.retried_steps.add(step)
            return {**event, "action": "rollback"}
        self.skipped_steps = [
            bad_step for bad_step in self.skipped_steps if step - self.config.window < bad_step < step
        ] + [step]
        if len(self.skipped_steps) > self.config.limit:
            history = f"{len(self.skipped_steps)} bad steps among the last {self.config.window}: {self.skipped_steps}"
            raise TrainingError(f"step {step}: {measurements}: {kind}; {history}. {advice}, or raise guard.limit.")
        # If the loss is not finite but its gradient is, the update was done.
        return {**event, "action": "left out" if row["skipped"] else "kept"}

    def note_good_step(self, step: int) -> None:
        """Forgets that a step was bad: this time it was good, so it may be retried again if it is bad once more."""
        self.retried_steps.discard(step)

    def handle_corruption(self, step: int, differing: Sequence[int], may_go_back: bool) -> Row:
        """Decides what follows if the weights of these ranks differ, and returns the event. May raise TrainingError."""
        finding = (
            f"rank {differing[0]}: its weights differ"
            if len(differing) == 1
            else f"ranks {list(differing)}: their weights differ"
        )
        finding = (
            f"{finding} from those of the processes that hold the same"
            if differing
            else "processes disagree on the gradient"
        )
        reason = f"step {step}: {finding}; memory or processor of one is faulty"
        self.corruptions += 1
        if not may_go_back or self.corruptions > self.config.limit:
            raise TrainingError(f"{reason}; {self.corruptions} times in this life. Replace the hardware and go on.")
        return {"kind": "corrupted", "step": step, "ranks": list(differing), "reason": reason}

    def state(self) -> dict[str, Any]:
        """Returns JSON for the checkpoint, so that a resumed run judges as an uninterrupted one."""
        return {
            "left_out": self.skipped_steps,
            **{kind: window.recorded_values() for kind, window in self.windows.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.skipped_steps = list(state.get("left_out", []))
        for kind, window in self.windows.items():
            window.load(state.get(kind, []))
