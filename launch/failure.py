"""The one block that a person reads when a run has failed: what failed, at which step, what to do, where to look."""

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
    folder: Path, failure: Mapping[str, Any] | None, exits: Sequence[tuple[int, int]], no_restart: str
) -> str:
    """Returns the text that is printed when a run has failed.

    `failure`: what the first rank that failed wrote (`run_directory.read_failure`); `exits`: (rank, exit code) of ranks
    that gave no reason, in the order in which they ended; `no_restart`: why there is none, where one was possible.
    """
    rank = failure["rank"] if failure else exits[0][0] if exits else 0
    log = folder / "logs" / f"rank-{rank}.log"
    if failure:
        summary, *details = str(failure["reason"]).splitlines()
        lines = [f"rank {rank} failed at step {failure['step']}: {summary}", *(f"  {line}" for line in details)]
    else:
        cause = diagnosis.signal_cause(-exits[0][1]) if exits and exits[0][1] < 0 else ""
        lines = [f"{describe_end(exits)}{cause and f', probably {cause}'}"]
    if no_restart:
        lines.append(f"  no restart: {no_restart}")
    if last_lines := _last_lines(log):
        lines += [f"  the last lines of {os.path.relpath(log)}:", *(f"    {line}" for line in last_lines)]
    return "\n".join(["", f"onecurve: {lines[0]}", *lines[1:]])


def describe_end(exits: Sequence[tuple[int, int]]) -> str:
    """Describes in a few words how ranks ended that gave no reason."""
    for rank, code in exits:
        if code < 0:
            return f"rank {rank} was killed (signal {-code})"
        return f"rank {rank} ended with code {code}"
    return "the processes were killed"


def _last_lines(log: Path) -> list[str]:
    with suppress(OSError), log.open(errors="replace") as file:
        return [line.rstrip() for line in deque(file, LINES)]
    return []
