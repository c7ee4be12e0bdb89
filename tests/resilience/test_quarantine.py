"""What is bad is counted once, and stays left out where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.data.faults import Fault
from trainer.data.stream import Slot, StepData
from trainer.errors import DataError
from trainer.resilience.quarantine import NAME, Quarantine
from trainer.topology import ALONE


def step(*faults: tuple[Slot, Fault]) -> StepData:
    return StepData(step=3, micro_batches=[], taken=36, entries=[], faults=list(faults))


def bad(folder: str, key: str, byte: int = 7) -> Fault:
    return Fault(f"{folder}/a.tar", key, byte, f"{folder}/a.tar: sample {key!r}: bad")


def test_a_sample_is_counted_once_wherever_it_lies(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, ALONE, 2, False)
    (told,) = quarantine.steps([step((Slot(25, 0, 4), bad("/old", "k")))])
    assert told == {"number": 25, **vars(bad("/old", "k"))}
    quarantine.steps([step((Slot(70, 0, 4), bad("/old", "k")))])  # in the next epoch
    later = Quarantine(tmp_path, ALONE, 2, True)
    assert later.left_out == [Slot(25, 0, 4), Slot(70, 0, 4)]
    later.steps([step((Slot(99, 0, 4), bad("/new", "k", 9)))])  # the data was moved
    shard = Fault("/new/a.tar", None, 100, "damaged")
    assert len(later.opened([shard])) == 1
    assert later.opened([shard]) == []  # told once
    assert [json.loads(line)["unit"] for line in (tmp_path / NAME).read_text().splitlines()] == [4, 4, 4, None]
    with pytest.raises(DataError, match=r"3 samples or shards cannot be read, but data\.error_budget=2"):
        later.steps([step((Slot(100, 1, 5), bad("/new", "other")))])
    assert Quarantine(tmp_path, ALONE, 2, False).left_out == []  # another run
