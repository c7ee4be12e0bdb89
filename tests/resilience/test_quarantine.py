"""What is bad is counted once, and stays left out where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.data.bad_data import BadData
from trainer.data.stream import ExampleId, StepData
from trainer.errors import DataError
from trainer.resilience.quarantine import NAME, Quarantine
from trainer.topology import ALONE


def step(*faults: tuple[ExampleId, BadData]) -> StepData:
    return StepData(step=3, micro_batches=[], end_position=36, entries=[], faults=list(faults))


def bad(folder: str, key: str, byte: int = 7) -> BadData:
    return BadData(f"{folder}/a.tar", key, byte, f"{folder}/a.tar: sample {key!r}: bad")


def test_a_sample_is_counted_once_wherever_it_lies(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, ALONE, 2, False)
    (told,) = quarantine.add_step_faults([step((ExampleId(25, 0, 4), bad("/old", "k")))])
    assert told == {"number": 25, **vars(bad("/old", "k"))}
    quarantine.add_step_faults([step((ExampleId(70, 0, 4), bad("/old", "k")))])  # in the next epoch
    later = Quarantine(tmp_path, ALONE, 2, True)
    assert later.left_out == [ExampleId(25, 0, 4), ExampleId(70, 0, 4)]
    later.add_step_faults([step((ExampleId(99, 0, 4), bad("/new", "k", 9)))])  # the data was moved
    shard = BadData("/new/a.tar", None, 100, "damaged")
    assert len(later.add_opening_faults([shard])) == 1
    assert later.add_opening_faults([shard]) == []  # told once
    assert [json.loads(line)["unit"] for line in (tmp_path / NAME).read_text().splitlines()] == [4, 4, 4, None]
    with pytest.raises(DataError, match=r"3 samples or shards cannot be read, but data\.error_budget=2"):
        later.add_step_faults([step((ExampleId(100, 1, 5), bad("/new", "other")))])
    assert Quarantine(tmp_path, ALONE, 2, False).left_out == []  # another run
