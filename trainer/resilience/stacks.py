"""Reports where a process is, in words: one rank's report of a hang."""

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
_LOOK_S = 0.3  # how long a thread is observed to see whether it computes


def report(thread_name: str) -> dict[str, Any]:
    """Returns a report of the thread of that name: `where` it is, whether it `waits` for other ranks and in which
    `collective`, and whether it is `busy`; and the last collective of this process, if torch recorded it."""
    thread = next((t for t in threading.enumerate() if t.name.startswith(thread_name)), threading.main_thread())
    busy = _is_busy(thread)
    frame = sys._current_frames().get(thread.ident or 0)
    frames = list(_walk(frame))
    modules = [_module(frame) for frame in frames]
    collective = next(
        (f.f_code.co_name for f, name in zip(frames, modules, strict=True) if name.startswith("torch/distributed")),
        None,
    )
    backward = any(name.startswith("torch/autograd") for name in modules)
    return {
        "where": _locate(frames),
        "reader": _locate_reader() if any("loader.py" in name for name in modules) else None,
        "collective": collective and collective.strip("_"),
        # CUDA's host spins while it waits for the device.
        "waits": (not busy or torch.cuda.is_initialized()) and bool(collective or backward or _is_in_native(frames)),
        "backward": backward and collective is None,
        "busy": busy,
        "stack": traceback.format_stack(frame) if frame else [],
        "threads": {t.name: _stack_of(t) for t in threading.enumerate() if t is not thread},
        **_read_flight_recorders(),
    }


def _walk(frame: FrameType | None) -> Any:
    """Walks the frames from the innermost outwards."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _locate(frames: list[FrameType]) -> str:
    """Returns the innermost frame that is in code of the project or the user."""
    own_frames = [frame for frame in frames if _is_own_code(frame.f_code.co_filename)]
    if not own_frames:
        return "nowhere that can be named"
    code = own_frames[0].f_code
    return f"{code.co_filename.removeprefix(_HOME)} {code.co_name}() line {own_frames[0].f_lineno}"


def _is_own_code(file: str) -> bool:
    if file.startswith((f"{_HOME}trainer{os.sep}", f"{_HOME}launch{os.sep}")):  # wherever it is installed
        return True
    return not file.startswith("<") and not any(part in file for part in _FOREIGN)


def _module(frame: FrameType) -> str:
    return frame.f_code.co_filename.rpartition(f"{os.sep}site-packages{os.sep}")[2].removeprefix(_HOME)


def _is_in_native(frames: list[FrameType]) -> bool:
    """Returns whether the innermost call went into torch: on GPUs the host waits there for the device."""
    return bool(frames) and _module(frames[0]).startswith(("torch/", "trainer/strategies"))


def _locate_reader() -> str | None:
    """Returns where a thread that reads ahead is, if it is in code of the project or the user."""
    for thread in threading.enumerate():
        if thread.name.startswith("read-ahead"):
            frames = list(_walk(sys._current_frames().get(thread.ident or 0)))
            if frames and "loader.py" not in _locate(frames):
                return _locate(frames)
    return None


def _is_busy(thread: threading.Thread) -> bool:
    """Returns whether a thread computes rather than sleeps or waits."""
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


def _read_flight_recorders() -> dict[str, Any]:
    """Reads torch's flight recorders: gloo and NCCL each have their own."""
    library = getattr(torch._C, "_distributed_c10d", None)
    dumps = {backend: _entries(getattr(library, name, None)) for backend, name in _RECORDERS.items()}
    world = getattr(torch.distributed.distributed_c10d, "_world", None)
    return last_collective(dumps, getattr(world, "pg_names", {}).values())


def _entries(dump: Callable[[], str] | None) -> list[Entry]:
    """Returns a recorder's entries, the oldest first; none if torch was built without it or has recorded nothing."""
    try:
        return json.loads(dump()).get("entries", []) if dump else []
    except (RuntimeError, ValueError):
        return []


def last_collective(dumps: Mapping[str, Sequence[Entry]], groups: Iterable[str]) -> dict[str, Any]:
    """Returns the collective that this process waits in, or else its newest one, and the number of collectives a group.

    `dumps` are entries by backend; `groups` are the names of all groups of this process, also of unused ones. A group
    of two backends counts their collectives separately. NCCL's are recorded once they are in the device's queue, far
    ahead of the device: the oldest that has not ended is the one that blocks it.
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
