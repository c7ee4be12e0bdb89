"""Other roads to the same curve, in real runs: 8-bit state, DDP's static graph, gradients summed in bf16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.runs import Run, assert_same_bits

STEPS = 24
OPTIONS = (f"train.steps={STEPS}", "train.log_every=1", "checkpoint.every=8", "train.micro_batch=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("procs", "overrides"),
    [
        (1, ("model.width=64", "optimizer.implementation=8bit")),  # matrices of 4096 numbers or more are in 8 bits
        (2, ("model.width=64", "optimizer.implementation=8bit", "strategy=fsdp")),
        (3, ("strategy=ddp", "strategy.static_graph=true", "train.activation_checkpointing=full")),
        (3, ("strategy=ddp", "precision.reduce=bf16")),
    ],
    ids=["8bit", "8bit sharded", "static graph", "bf16 sums"],
)
def test_killed_and_resumed(procs: int, overrides: tuple[str, ...], tmp_path: Path) -> None:
    options = (*OPTIONS, *overrides)
    whole, killed = Run(tmp_path / "whole", procs, options), Run(tmp_path / "killed", procs, options)
    whole.train()
    killed.kill_at(13)
    killed.train()
    assert_same_bits(killed, whole)


@pytest.mark.slow
def test_from_8bit_to_fused_and_back_on_other_processes(tmp_path: Path) -> None:
    options = (*OPTIONS, "model.width=64")
    whole, run = Run(tmp_path / "whole", 1, options), Run(tmp_path / "run", 1, options)
    whole.train()
    replace(run, overrides=(*options, "optimizer.implementation=8bit")).kill_at(9)
    replace(run, procs=2, overrides=(*options, "strategy=fsdp")).kill_at(17)
    replace(run, procs=2, overrides=(*options, "strategy=ddp", "optimizer.implementation=8bit")).train()
    ours, theirs = ([row["loss"] for row in each.metrics()] for each in (run, whole))
    assert ours == pytest.approx(theirs, rel=0.02)
    assert run.ledger() == whole.ledger()
