"""Where a process is, in words: what one rank reports of a hang."""

from __future__ import annotations

import json
import operator
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed

Entry = Mapping[str, Any]  # of a flight recorder: one collective

_RECORDERS = {"gloo": "_dump_fr_trace_json", "nccl": "_dump_nccl_trace_json"}
_HOME = str(Path(__file__).parents[2]) + os.sep
_FOREIGN = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}", f"lib{os.sep}python3")
_LOOK_S = 0.3  # how long a thread is watched to see whether it computes


def report(thread_name: str) -> dict[str, Any]:
    """Of the thread of that name: `where` it is, whether it `waits` for other processes and in which `collective`,
    whether it is `busy`; and the last collective of this process, if torch kept record."""
    thread = next((t for t in threading.enumerate() if t.name.startswith(thread_name)), threading.main_thread())
    busy = _busy(thread)
    frame = sys._current_frames().get(thread.ident or 0)
    frames = list(_walk(frame))
    inside = [_module(frame) for frame in frames]
    collective = next(
        (f.f_code.co_name for f, name in zip(frames, inside, strict=True) if name.startswith("torch/distributed")), None
    )
    backward = any(name.startswith("torch/autograd") for name in inside)
    return {
        "where": _where(frames),
        "reader": _reader() if any("loader.py" in name for name in inside) else None,
        "collective": collective and collective.strip("_"),
        # CUDA's host spins while it waits for the device.
        "waits": (not busy or torch.cuda.is_initialized()) and bool(collective or backward or _in_native(frames)),
        "backward": backward and collective is None,
        "busy": busy,
        "stack": traceback.format_stack(frame) if frame else [],
        "threads": {t.name: _stack_of(t) for t in threading.enumerate() if t is not thread},
        **_recorded(),
    }


def _walk(frame: FrameType | None) -> Any:
    """Walks the frames from the innermost outwards."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _where(frames: list[FrameType]) -> str:
    """The innermost place that is the project's or the user's own."""
    own = [frame for frame in frames if _own(frame.f_code.co_filename)]
    if not own:
        return "nowhere that can be named"
    code = own[0].f_code
    return f"{code.co_filename.removeprefix(_HOME)} {code.co_name}() line {own[0].f_lineno}"


def _own(file: str) -> bool:
    if file.startswith((f"{_HOME}trainer{os.sep}", f"{_HOME}launch{os.sep}")):  # wherever it is installed
        return True
    return not file.startswith("<") and not any(part in file for part in _FOREIGN)


def _module(frame: FrameType) -> str:
    return frame.f_code.co_filename.rpartition(f"{os.sep}site-packages{os.sep}")[2].removeprefix(_HOME)


def _in_native(frames: list[FrameType]) -> bool:
    """Whether the innermost call went into torch: on GPUs the host waits there for what the device waits for."""
    return bool(frames) and _module(frames[0]).startswith(("torch/", "trainer/strategies"))


def _reader() -> str | None:
    """What a thread that reads ahead is at, where it is in code of the project's or the user's own."""
    for thread in threading.enumerate():
        if thread.name.startswith("read-ahead"):
            frames = list(_walk(sys._current_frames().get(thread.ident or 0)))
            if frames and "loader.py" not in _where(frames):
                return _where(frames)
    return None


def _busy(thread: threading.Thread) -> bool:
    """Whether a thread computes, rather than sleeps or waits."""
    before = _cpu_seconds(thread)
    time.sleep(_LOOK_S)
    after = _cpu_seconds(thread)
    return before is not None and after is not None and after - before > _LOOK_S / 4


def _cpu_seconds(thread: threading.Thread) -> float | None:
    try:
        fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _stack_of(thread: threading.Thread) -> list[str]:
    frame = sys._current_frames().get(thread.ident or 0)
    return traceback.format_stack(frame) if frame else []


def _recorded() -> dict[str, Any]:
    """What torch's flight recorders tell: of gloo and of NCCL each has its own."""
    library = getattr(torch._C, "_distributed_c10d", None)
    dumps = {backend: _entries(getattr(library, name, None)) for backend, name in _RECORDERS.items()}
    world = getattr(torch.distributed.distributed_c10d, "_world", None)
    return last_collective(dumps, getattr(world, "pg_names", {}).values())


def _entries(dump: Callable[[], str] | None) -> list[Entry]:
    """A recorder's entries, the oldest first; none where torch was built without it, or it kept no record."""
    try:
        return json.loads(dump()).get("entries", []) if dump else []
    except (RuntimeError, ValueError):
        return []


def last_collective(dumps: Mapping[str, Sequence[Entry]], groups: Iterable[str]) -> dict[str, Any]:
    """The collective that this process waits in, or else its newest, and how many each group has had.

    `dumps`: entries by backend; `groups`: names of all that this process is in, also of those it never used. A group of
    two backends counts the collectives of each apart. NCCL's are on record once they are in the device's queue, far
    ahead of what the device does: the oldest that has not ended is the one that holds it up.
    """
    entries = [(f"{backend}/{entry['process_group'][0]}", entry) for backend in dumps for entry in dumps[backend]]
    if not entries:
        return {"last": None, "counts": {}, "flight_recorder": {}}
    counts = {f"{backend}/{group}": 0 for backend in dumps for group in groups}
    for group, entry in entries:
        counts[group] = max(counts.get(group, 0), entry["collective_seq_id"])
    age = operator.itemgetter("time_created_ns")
    pending = [(group, entry) for group, entry in entries if not (entry["retired"] or entry["state"] == "completed")]
    group, entry = (
        min(pending, key=lambda item: age(item[1])) if pending else max(entries, key=lambda item: age(item[1]))
    )
    last = {
        "group": group, "number": entry["collective_seq_id"],
        "name": entry["profiling_name"], "time": entry["time_created_ns"] / 1e9,
    }  # fmt: skip
    return {"last": last, "counts": counts, "flight_recorder": dict(dumps)}
