"""Faults to inject by `debug.faults`: at which point, which action, at which pass, on which process."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

POINTS = {
    "start.built": "the model is there, nothing is loaded",
    "start.restored": "the checkpoint is loaded, before the first step",
    "data.read": "before a sequence is read (not in data.processes)",
    "data.next": "before the loop takes the next batch",
    "step.weights": "before each update of the step, all weights and state of its model that are here",
    "step.loss": "the loss of a micro-batch, before its backward pass",
    "step.after_backward": "between backward pass and update, of each update of the step",
    "step.after_update": "after each update of the step",
    "numbers.read": "before the processes add up losses and votes",
    "eval.batch": "before a batch of an evaluation",
    "checkpoint.before_copy": "before the copy to host memory",
    "checkpoint.before_write": "before the tensors are written (in the background)",
    "checkpoint.before_manifest": "the tensors of all are written (main process)",
    "checkpoint.before_rename": "all is written, nothing published (main process)",
    "checkpoint.after_rename": "published, not yet told to the others (main process)",
    "checkpoint.before_prune": "before old checkpoints go (main process)",
    "track.rows": "before steps are recorded",
    "end.finished": "all is done and saved, before the process ends",
}
TENSORS = ("step.weights", "step.loss")  # the points where `nan` and `flip` can change something
ACTIONS = {
    "kill": "SIGKILL to itself",
    "stop": "SIGSTOP to itself: it hangs until somebody ends it",
    "raise": "an exception",
    "errno": "an OSError, such as errno@ENOSPC",
    "delay": "sleeps so many seconds, such as delay@0.5",
    "nan": "not a number, in one value",
    "flip": "one bit of one value flipped",
}
_ARGUMENT = {"errno": "ENOSPC", "delay": "1"}  # the defaults of `errno` and `delay`


@dataclass(frozen=True)
class Fault:
    """A fault that happens once in a run, at the `n`-th pass of an attempt; with `again` at that and each later pass of
    every attempt. `rank` None means on all ranks."""

    text: str
    point: str
    action: str
    argument: str
    n: int
    again: bool
    rank: int | None

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Parses a fault. Raises ValueError that says what is accepted."""
        match = re.fullmatch(r"([a-z_.]+):([a-z]+)(?:@([A-Za-z0-9.]+))?:(\d+)(\+?)(?::(\d+))?", text)
        if not match:
            form = "point:action:n or point:action:n:rank, such as step.after_backward:kill:3:1"
            raise ValueError(f"'{text}' is not a fault: write {form} (n+: each pass from the n-th on)")
        point, action, argument, n, again, rank = match.groups()
        if point not in POINTS:
            raise ValueError(f"'{point}' is not a point; there are: {', '.join(POINTS)}")
        if action not in ACTIONS:
            raise ValueError(f"'{action}' is not an action; there are: {', '.join(ACTIONS)}")
        if action in ("nan", "flip") and point not in TENSORS:
            raise ValueError(f"{action} needs numbers to change; there are some at {' and '.join(TENSORS)}")
        if argument and action not in _ARGUMENT:
            raise ValueError(f"{action} takes no argument")
        argument = argument or _ARGUMENT.get(action, "")
        if action == "errno" and not hasattr(errno, argument):
            raise ValueError(f"'{argument}' is not an error number; write ENOSPC, EIO, EROFS, ...")
        if action == "delay":
            float(argument)
        if int(n) < 1:
            raise ValueError("passes are counted from 1")
        return cls(text, point, action, argument, int(n), bool(again), int(rank) if rank else None)
