"""Descriptors of a process do not grow with the number of processes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.topology import raise_open_files

RANK = """
import os, torch, torch.distributed as dist
from trainer import topology
ranks = topology.join(600)
ranks.barrier()
ranks.gather_all(ranks.rank, ranks.saving)
ranks.broadcast("all of them")
dist.all_reduce(torch.zeros(10))
print(max(ranks.gather(len(os.listdir("/proc/self/fd")))))
ranks.close()
"""


def joined(processes: int, folder: Path, script: str) -> list[int]:
    """The number that each process prints; all of them end well."""
    shared = {"ONECURVE_STORE": str(folder / "store"), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={
                **os.environ,
                **shared,
                "LOCAL_WORLD_SIZE": str(processes),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    counts = [int(rank.communicate()[0]) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * processes
    return counts


@pytest.mark.slow
def test_connections_are_opened_when_they_are_used(tmp_path: Path) -> None:
    """To each other process in each of three groups they would be 45 descriptors."""
    assert max(joined(12, tmp_path, RANK)) < 30


@pytest.mark.slow
def test_many_processes_that_may_open_few_files(tmp_path: Path) -> None:
    """`ulimit -n 64`: connections to all 23 others in both groups would take 58, and a third group would not start."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
    assert max(joined(24, tmp_path, limit + RANK)) < 40


def test_as_many_files_as_may_be() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
