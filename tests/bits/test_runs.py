"""Whole runs under `train.deterministic=topology`: killed, moved to other processes and strategies, the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import Run, assert_same_bits

MODE = ("train.deterministic=topology", "train.micro_batch=2", "model.dropout=0.1", "eval.every=10")


def single(folder: Path, steps: int) -> Run:
    run = Run(folder / "single", 1, (*MODE, f"train.steps={steps}", "strategy=single"))
    run.train()
    return run


@pytest.mark.slow
def test_moved_from_one_process_to_two(tmp_path: Path) -> None:
    expected = single(tmp_path, 20)
    run = Run(tmp_path / "run", 2, (*MODE, "train.steps=20", "strategy=ddp"))
    run.kill_at(12)
    run.overrides = (*MODE, "train.steps=20", "strategy=fsdp")
    run.train()
    assert_same_bits(run, expected)


@pytest.mark.slow
def test_killed_and_moved_three_times(tmp_path: Path) -> None:
    expected = single(tmp_path, 50)
    run = Run(tmp_path / "run", 4)
    lives = [
        (4, ("strategy=hsdp", "strategy.shard_size=2"), 12),
        (3, ("strategy=fsdp",), 25),
        (1, ("strategy=single",), 36),
        (2, ("strategy=pipeline", "strategy.schedule=1f1b", "data.workers=2"), None),
    ]
    for run.procs, overrides, killed_at in lives:
        run.overrides = (*MODE, "train.steps=50", *overrides)
        if killed_at is None:
            run.train()
        else:
            run.kill_at(killed_at)
    assert_same_bits(run, expected)


@pytest.mark.slow
def test_the_default_recipe_to_its_end(tmp_path: Path) -> None:
    """All 1,200 steps, with its evaluations, at a rate at which other orders of sums have other curves from step 60 on
    (benchmarks/LOG.md)."""
    options = ("experiment=shakespeare", "sample.count=0", "track.report=false", "data.ledger=true")
    runs = {}
    for procs, strategy in ((1, "single"), (2, "ddp"), (3, "fsdp")):
        overrides = (*MODE[:2], f"strategy={strategy}")
        runs[procs] = Run(tmp_path / strategy, procs, overrides, base=options)
        process = runs[procs].start()  # without the time limit of other tests
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert runs[1].last_step() == 1200
    assert_same_bits(runs[2], runs[1])
    assert_same_bits(runs[3], runs[1])


@pytest.mark.slow
def test_the_micro_batch_is_part_of_what_the_run_is(tmp_path: Path) -> None:
    run = single(tmp_path, 4)
    run.overrides = (*MODE, "train.steps=4", "train.micro_batch=4")
    assert "train.micro_batch: the run has 2, this command 4" in run.train(expect=2)
    run.overrides = (*MODE, "train.steps=4", "train.deterministic=run")
    assert "train.deterministic: the run has 'topology', this command None" in run.train(expect=2)
