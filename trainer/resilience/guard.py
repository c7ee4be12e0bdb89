"""Bad steps: a loss or gradient that is not finite, or a spike. Their update is never done; here is said what follows.

Whether an update is done is decided on the device, by one comparison of the gradient norm with a limit. The host hears
of it when it reads the numbers of several steps.
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


class Rollback(Exception):  # no error: the loop goes on elsewhere
    """Go on from the last checkpoint."""


class RollingWindow:
    """The numbers of the last steps that were fine, float64 on the device; nothing here waits for it."""

    def __init__(self, window: int, sigmas: float, device: torch.device):
        self.values = torch.full((window,), torch.nan, dtype=torch.float64, device=device)
        self.sigmas = sigmas

    def limit(self) -> Tensor:
        """What a number must stay below; infinite while a quarter of the window is not there."""
        median = self.values.nanmedian()
        deviation = (self.values - median).abs().nanmedian().maximum(_LEAST * median.abs())
        known = self.values.isnan().logical_not().sum()
        return torch.where(4 * known >= len(self.values), median + self.sigmas * _SIGMA * deviation, torch.inf)

    def record(self, value: Tensor, fine: Tensor) -> None:
        self.values = torch.where(fine, torch.cat([self.values[1:], value.double().reshape(1)]), self.values)

    def known(self) -> list[float]:
        return self.values[self.values.isfinite()].tolist()

    def load(self, known: Sequence[float]) -> None:
        """Loads recorded numbers, also those of a window of another length."""
        window = len(self.values)
        newest = torch.tensor(list(known)[-window:], dtype=torch.float64)
        self.values = torch.cat([torch.full((window - len(newest),), torch.nan, dtype=torch.float64), newest]).to(
            self.values.device
        )


class Guard:
    def __init__(self, config: schema.Guard, device: torch.device):
        self.config, self.device = config, device
        self.rolling = {
            kind: RollingWindow(config.window, sigmas, device)
            for kind, sigmas in (("norm", config.norm_spike), ("loss", config.loss_spike))
            if sigmas is not None
        }
        self.repeated: set[int] = set()  # steps that were bad the last time, and that the run has gone back for
        self.skipped_steps: list[int] = []
        self.corruptions = 0

    @property
    def needs_loss(self) -> bool:
        """Whether the loss must be known before the update."""
        return "loss" in self.rolling

    def limit(self, loss: float | None) -> Tensor | float:
        """The gradient norm from which on an update is not done. `loss`: of the step, all processes' mean."""
        if loss is not None and not loss < float(self.rolling["loss"].limit()):
            return -math.inf
        return self.rolling["norm"].limit() if "norm" in self.rolling else math.inf

    def record(self, norm: Tensor, loss: float | None, skipped: Tensor) -> None:
        """Notes the numbers of a step."""
        if not self.rolling:
            return
        fine = skipped.logical_not().to(self.device)
        if "norm" in self.rolling:
            self.rolling["norm"].record(norm.to(self.device), fine)
        if loss is not None:
            self.rolling["loss"].record(torch.tensor(loss, device=self.device), fine)

    def judge(self, row: Row, may_go_back: bool) -> Row:
        """What follows a bad step: the event that tells of it. `action` is "rollback", "left out" or "kept".

        Raises TrainingError where the run shall end.
        """
        step, found = row["step"], f"loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}"
        advice = f"Lower optimizer.lr (now {row['lr']:g}), lengthen schedule.warmup_steps, or try precision=fp32"
        kind = "not finite" if not math.isfinite(row["loss"] + row["grad_norm"]) else "a spike"
        event = {"kind": "bad_step", "step": step, "reason": f"{found}: {kind}"}
        if self.config.bad_step == "stop":
            raise TrainingError(f"step {step}: {found}: {kind}. {advice}.")
        if self.config.bad_step == "rollback" and may_go_back and step not in self.repeated:
            self.repeated.add(step)
            return {**event, "action": "rollback"}
        self.skipped_steps = [bad for bad in self.skipped_steps if step - self.config.window < bad < step] + [step]
        if len(self.skipped_steps) > self.config.limit:
            many = f"{len(self.skipped_steps)} bad steps among the last {self.config.window}: {self.skipped_steps}"
            raise TrainingError(f"step {step}: {found}: {kind}; {many}. {advice}, or raise guard.limit.")
        # A loss that is not finite while its gradient is: the update was done, as any process could have done it.
        return {**event, "action": "left out" if row["skipped"] else "kept"}

    def note_good_step(self, step: int) -> None:
        """A step that was fine: if it was bad before, that was an accident, and its next one is another."""
        self.repeated.discard(step)

    def handle_corruption(self, step: int, differing: Sequence[int], may_go_back: bool) -> Row:
        """What follows where these ranks have weights of their own: the event. Raises TrainingError to end the run."""
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
        """For the checkpoint, JSON-able: so a run that goes on judges as if it had not stopped."""
        return {"left_out": self.skipped_steps, **{kind: rolling.known() for kind, rolling in self.rolling.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        self.skipped_steps = list(state.get("left_out", []))
        for kind, rolling in self.rolling.items():
            rolling.load(state.get(kind, []))
