"""Descriptors of a process do not grow with the number of processes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.topology import raise_open_files

PROCESSES = 12  # one connection to each other process in each of three groups would be 45 descriptors
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


@pytest.mark.slow
def test_connections_are_opened_when_they_are_used(tmp_path: Path) -> None:
    shared = {"ONECURVE_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(PROCESSES)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={
                **os.environ,
                **shared,
                "LOCAL_WORLD_SIZE": str(PROCESSES),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    counts = [int(rank.communicate()[0]) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * PROCESSES
    assert max(counts) < 30


def test_as_many_files_as_may_be() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
