"""Named points of the program at which `debug.faults` makes something go wrong, to test it or to rehearse.

Without faults a point costs a call and a look at an empty dict.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.checkpoint.state import FlatShard, State, local_values
from trainer.config.faults import Fault

DONE = "logs/faults"  # in the run directory: one file for each fault that happened
_armed: dict[str, list[Fault]] = {}
_passed: defaultdict[str, int] = defaultdict(int)
_context: tuple[Path, int] = (Path(), 0)
_lock = threading.Lock()


class Provoked(RuntimeError):
    """Is raised by the action `raise`."""


def arm(faults: Sequence[str], folder: Path, rank: int) -> None:
    """Arms these faults in this process, except those that already happened in this run."""
    global _context
    _armed.clear()
    _passed.clear()
    _context = folder, rank
    for fault in map(Fault.parse, faults):
        if fault.rank in (None, rank) and not _mark(fault).exists():
            _armed.setdefault(fault.point, []).append(fault)


def point(name: str, tensors: Iterable[Tensor] | Callable[[], State] = ()) -> None:
    """Provokes the faults that are due at this point. `tensors`: what they may change, in place."""
    if not _armed or name not in _armed:
        return
    with _lock:  # several threads read data
        _passed[name] += 1
        number = _passed[name]
        due = [fault for fault in _armed[name] if number == fault.n or (fault.again and number > fault.n)]
        for fault in due:
            if not fault.again:
                _armed[name].remove(fault)
                _mark(fault).parent.mkdir(exist_ok=True)
                _mark(fault).write_text(json.dumps({"fault": fault.text, "time": time.time(), "pid": os.getpid()}))
    for fault in due:
        _do(fault, tensors)


def _mark(fault: Fault) -> Path:
    folder, rank = _context
    return folder / DONE / f"{fault.text}@{rank}"


def _do(fault: Fault, tensors: Iterable[Tensor] | Callable[[], State]) -> None:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise Provoked(f"provoked by debug.faults: {fault.text}")
        case "errno":
            number = getattr(errno, fault.argument)
            raise OSError(number, f"{os.strerror(number)} (provoked by debug.faults: {fault.text})")
        case "delay":
            time.sleep(float(fault.argument))
        case "nan" | "flip":
            candidates = tensors().values() if callable(tensors) else tensors
            _corrupt(fault, [tensor for tensor in map(_local, candidates) if tensor.numel()])


@torch.no_grad()
def _corrupt(fault: Fault, tensors: list[Tensor]) -> None:
    """Changes one value of one tensor: the same one at each rehearsal."""
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not floating:
        return
    draw = random.Random(fault.text)
    tensor = draw.choice(floating)
    place = tuple(draw.randrange(size) for size in tensor.shape)
    before = tensor[place].item()
    tensor[place] = torch.nan if fault.action == "nan" else _flip_bit(tensor[place])
    factor = tensor[place].item() / before if before else 1.0
    if tensor.requires_grad:  # a loss: what follows from it is as wrong as it is
        tensor.register_hook(lambda gradient: gradient * factor)


def _flip_bit(value: Tensor) -> Tensor:
    """Returns the value with the lowest zero bit of its exponent's upper part set: at least four times as large."""
    value = value.detach().cpu().clone().reshape(1)
    top = value.view(torch.uint8)[-1:]
    top |= (top + 1) & ~top
    return value[0]


def _local(tensor: Tensor | FlatShard) -> Tensor:
    values = local_values(tensor)
    return values.to_local() if isinstance(values, DTensor) else values
