"""One curve under every strategy, and from any into any other: loss, gradient norm and weights against one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.runs import Run, assert_same_bits, assert_same_curve

STEPS = 30
OPTIONS = (f"train.steps={STEPS}", "train.log_every=1", "train.clip_norm=0.5", "model.layers=4")
FSDP, HSDP = ("strategy=fsdp",), ("strategy=hsdp", "strategy.shard_size=2")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("single") / "run", 1, (*OPTIONS, "strategy=single"))
    run.train()
    return run


@pytest.mark.slow
def test_fsdp_is_single_and_resumes_to_the_bit(single: Run, tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", 2, (*OPTIONS, *FSDP))
    whole.train()
    assert_same_curve(whole, single, STEPS)
    killed = Run(tmp_path / "killed", 2, (*OPTIONS, *FSDP, "train.micro_batch=12"))
    killed.kill_at(13)
    killed.train()
    assert_same_bits(killed, whole)


SENT_TOGETHER = {
    "hsdp, each": (2, ("strategy=hsdp", "strategy.shard_size=1")),
    "fsdp, last, muon": (3, (*FSDP, "strategy.reduce=last", "optimizer=muon")),
    "pipeline in three copies": (3, ("strategy=pipeline", "strategy.stages=1")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SENT_TOGETHER)
def test_sums_over_micro_batches_resume_to_the_bit(name: str, tmp_path: Path) -> None:
    """What is kept between the micro-batches of a step is in no checkpoint, and in no other step."""
    procs, overrides = SENT_TOGETHER[name]
    options = (*OPTIONS, *overrides, "train.steps=12", "train.micro_batch=2", "checkpoint.every=4", "eval.every=0")
    optimizer = [option for option in overrides if option.startswith("optimizer")]
    single = Run(tmp_path / "single", 1, (*OPTIONS, "train.steps=12", "eval.every=0", *optimizer))
    single.train()
    whole = Run(tmp_path / "whole", procs, options)
    whole.train()
    assert_same_curve(whole, single, 12)
    killed = Run(tmp_path / "killed", procs, options)
    killed.kill_at(7)
    killed.train()
    assert_same_bits(killed, whole)


PIPELINE, TENSOR = ("strategy=pipeline",), ("strategy=fsdp", "strategy.tensor_parallel=2")
CHAINS = {
    "fsdp 3, pipeline 2, ddp 2, hsdp 4": [
        (3, FSDP),
        (2, (*PIPELINE, "train.micro_batch=6")),
        (2, ("strategy=ddp", "train.micro_batch=3", "train.activation_checkpointing=full")),
        (4, HSDP),
    ],
    "zero 2, zbv 2, tensor 2 x 2, pipeline 2 x fsdp 2": [
        (2, ("strategy=zero",)),
        (2, (*PIPELINE, "strategy.schedule=zbv")),
        (4, (*TENSOR, "strategy.sequence_parallel=true")),
        (4, (*PIPELINE, "strategy.stages=2", "strategy.data_parallel=fsdp")),
    ],
}


@pytest.mark.slow  # tests/anywhere has a quick cut
@pytest.mark.parametrize("chain", CHAINS)
def test_from_one_strategy_into_another(chain: str, single: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    for life, (procs, overrides) in enumerate(CHAINS[chain]):
        run = replace(run, procs=procs, overrides=(*OPTIONS, "checkpoint.every=5", *overrides))
        run.kill_at(7 * (life + 1)) if life < 3 else run.train()
    assert_same_curve(run, single, STEPS)


def test_another_optimizer_begins_anew(tmp_path: Path) -> None:
    """The optimizer may change between lives; what it remembers is of no use to another one."""
    run = Run(tmp_path / "run", 1, (*OPTIONS, "train.steps=10"))
    run.train()
    run.overrides = (*OPTIONS, "train.steps=20", "optimizer=muon", "optimizer.lr=0.002")
    run.train()
    (changed,) = [event["changes"] for event in run.rows("events.jsonl") if event["kind"] == "config_changed"]
    assert changed["optimizer.name"] == ["adamw", "muon"]
    assert run.metrics()[-1]["loss"] < run.metrics()[9]["loss"]
