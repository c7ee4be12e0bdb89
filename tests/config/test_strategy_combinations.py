"""What a strategy cannot do is refused before anything starts, and docs/STRATEGIES.md says so in the same words."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config import strategy_page
from trainer.config.compose import load
from trainer.config.pipeline_schedules import SCHEDULES, allowed_micro_batches, micro_batches
from trainer.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "STRATEGIES.md"


@pytest.mark.parametrize(("processes", "overrides"), strategy_page.REFUSED)
def test_refused_with_the_nearest_that_works(processes: int, overrides: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(overrides.split(), processes)
    key = overrides.split()[0].partition("=")[0].partition(".")[0]
    assert all("nearest" in problem or "use strategy=" in problem for problem in refused.value.problems)
    assert any(problem.startswith((f"{key}", "model", "train", "data")) for problem in refused.value.problems)


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (4, "strategy=hsdp"),
        (6, "strategy=hsdp strategy.shard_size=3"),
        (4, "strategy=pipeline strategy.stages=2 model.layers=2"),
        (1, "strategy=pipeline model.layers=1"),
        (2, "strategy=pipeline strategy.schedule=dualpipev strategy.micro_batches=4"),
        (4, "strategy=pipeline strategy.stages=2 strategy.tensor_parallel=2 model.heads=2 train.global_batch=5"),
        (8, "strategy=fsdp strategy.tensor_parallel=2 model.heads=4 train.global_batch=4"),
    ],
)
def test_allowed(processes: int, overrides: str) -> None:
    load(overrides.split(), processes)


def test_page_is_current() -> None:
    assert strategy_page.renewed(PAGE.read_text()) == PAGE.read_text(), "run `make docs`"


@pytest.mark.parametrize("name", SCHEDULES)
def test_micro_batches_that_are_chosen_are_allowed(name: str) -> None:
    config = load(["strategy=pipeline", f"strategy.schedule={name}"]).strategy
    for processes in (2, 3, 4, 8):
        for sequences in (0, 1, 5, 12, 48, 1000):
            chosen = micro_batches(config, processes, sequences)
            assert chosen in allowed_micro_batches(config, processes, chosen)
    assert micro_batches(config, 2, 48) in (8, 16)  # four a part, and nothing is filled up
