"""What one process of a copy of the model cannot read, none of the copy uses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.resilience.agreed_stream_rank import BAD, STEPS, share
from trainer.data.stream import Stream


@pytest.mark.slow
def test_processes_of_a_copy_leave_out_the_same() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    done = subprocess.run(
        [*command, "-m", "tests.resilience.agreed_stream_rank"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    told = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert [rank for rank, _, _ in told] == [0, 1, 2, 3]
    for rank, copy, steps in told:
        of_copy = [other for other, its, _ in told if its == copy]
        stream = Stream(share(set.union(*(BAD[other] for other in of_copy)), copy, 2))
        stream.seek(2)
        for number, sizes, entries, faults in steps:
            data = next(stream)
            assert number == data.step
            assert sizes == [len(batch["draws"]) for batch in data.micro_batches], f"rank {rank}"
            assert entries == [list(entry) for entry in data.entries]
            assert faults == [[slot.number, fault.key] for slot, fault in data.faults]
        assert len(steps) == STEPS
        assert sum(bool(faults) for *_, faults in steps) > 1
        stream.close()
