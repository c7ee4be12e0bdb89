"""Utilities for processes: one that ends with its parent, prints safely, and is identified among all others."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from trainer.files import replace_file

ATTEMPT = ".attempt"
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Makes the (Linux) kernel kill this process when its parent ends, however it ends. `parent`: its process id, where
    it may be gone already."""
    if sys.platform != "linux":
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(4)


def make_printing_safe() -> None:
    """Lets stdout and stderr take any text: `?` stands for what their encoding lacks, and nothing is written where they
    are closed. Closed ones are opened on /dev/null, so that no file gets a descriptor that other processes
    write to."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))
        elif number and hasattr(stream, "reconfigure"):  # a notebook's stream lacks it
            stream.reconfigure(errors="replace")


def remove_afterwards(path: Path) -> None:
    """Removes a file or folder once this process has ended, however it ends."""
    waiting = ["/bin/sh", "-c", 'trap "" INT TERM HUP USR1; read -r _; rm -rf -- "$1"', "sh", str(path)]
    # The pipe's other end is ours, and closed by the kernel.
    subprocess.Popen(waiting, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def start_time(pid: int) -> str | None:
    """Returns when a process began, which with its id identifies it; None if that is unknown."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def process_exists(pid: int, start: str | None) -> bool:
    """Returns whether a process of this machine that began at `start` still exists. The start times of other users'
    processes may be hidden, but not that they exist."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return start is None or start_time(pid) in (None, start)


@cache
def boot_id() -> str:
    """Returns the id of the boot that process ids belong to."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return platform.node()


def record_attempt(run: Path) -> None:
    """Records in a run directory, if it is one, which process works on the run: it may read data for long before it
    writes anything else."""
    process = {"host": platform.node(), "boot": boot_id(), "pid": os.getpid(), "started": start_time(os.getpid())}
    with suppress(OSError):
        if (run / "config.yaml").exists():
            replace_file(run / ATTEMPT, json.dumps(process).encode())
