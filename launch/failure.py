"""The one block that a person reads when a run has failed: what, since when, what to do, where to look."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer import diagnosis

LINES = 12


def failure_block(
    folder: Path, failure: Mapping[str, Any] | None, ended: Sequence[tuple[int, int]], no_restart: str
) -> str:
    """`failure`: what the first rank that failed wrote (`run_directory.read_failure`); `ended`: (rank, exit code) of
    those that ended without a word, first ones first; `no_restart`: why, where there might have been one."""
    rank = failure["rank"] if failure else ended[0][0] if ended else 0
    log = folder / "logs" / f"rank-{rank}.log"
    if failure:
        first, *more = str(failure["reason"]).splitlines()
        lines = [f"rank {rank} failed at step {failure['step']}: {first}", *(f"  {line}" for line in more)]
    else:
        by = diagnosis.signal_cause(-ended[0][1]) if ended and ended[0][1] < 0 else ""
        lines = [f"{describe_end(ended)}{by and f', probably {by}'}"]
    if no_restart:
        lines.append(f"  no restart: {no_restart}")
    if last := _last_lines(log):
        lines += [f"  the last lines of {os.path.relpath(log)}:", *(f"    {line}" for line in last)]
    return "\n".join(["", f"onecurve: {lines[0]}", *lines[1:]])


def describe_end(ended: Sequence[tuple[int, int]]) -> str:
    """Describes in a few words how ranks ended that gave no reason."""
    for rank, code in ended:
        if code < 0:
            return f"rank {rank} was killed (signal {-code})"
        return f"rank {rank} ended with code {code}"
    return "the processes were killed"


def _last_lines(log: Path) -> list[str]:
    with suppress(OSError), log.open(errors="replace") as file:
        return [line.rstrip() for line in deque(file, LINES)]
    return []
