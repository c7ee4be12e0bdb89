"""Compiled layers under strategies that shard and cut: by torch's own code generation, so it takes a while."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import Run, assert_same_curve

STEPS = 10
OPTIONS = (f"train.steps={STEPS}", "train.log_every=1", "train.clip_norm=0.5", "model.layers=4")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("single") / "run", 1, (*OPTIONS, "strategy=single"))
    run.train()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "pipeline"])
def test_compiled_is_the_same_curve(strategy: str, single: Run, tmp_path: Path) -> None:
    recomputed = "train.activation_checkpointing=full"
    run = Run(tmp_path / "run", 2, (*OPTIONS, f"strategy={strategy}", "train.compile=true", recomputed))
    run.train()
    assert_same_curve(run, single, STEPS)
