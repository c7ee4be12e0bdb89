"""A moving average of the weights: against the formula, over a resume, under every strategy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.runs import Run, assert_same_bits
from trainer.optim.ema import track_average

DECAY = 0.9


def test_it_is_the_average_of_the_weights() -> None:
    weight, frozen = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.bfloat16)), torch.nn.Parameter(torch.randn(2))
    optimizer = track_average(torch.optim.SGD([weight, frozen], lr=0.1), DECAY)
    seen = []
    for _ in range(7):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        seen.append(weight.detach().double())
    shares = [(1 - DECAY) * DECAY ** (len(seen) - 1 - i) for i in range(len(seen))]
    expected = sum(share * value for share, value in zip(shares, seen, strict=True)) / sum(shares)
    state = optimizer.state[weight]
    assert state["ema"].dtype == torch.float32
    torch.testing.assert_close((state["ema"] / state["ema_weight"]).double(), expected, rtol=1e-6, atol=1e-6)
    assert "ema" not in optimizer.state[frozen]


def averages(run: Run) -> dict[str, torch.Tensor]:
    """By the names of the weights."""
    found = run.weights()
    names = [name.removeprefix("optimizer/ema/") for name in found if name.startswith("optimizer/ema/")]
    assert {f"model/{name}" for name in names} == {name for name in found if name.startswith("model/")}
    return {name: found[f"optimizer/ema/{name}"] / found[f"optimizer/ema_weight/{name}"] for name in names}


OPTIONS = ("train.steps=12", "checkpoint.every=6", f"optimizer.ema={DECAY}", "model.layers=4", "train.log_every=1")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("single") / "run", 1, (*OPTIONS, "strategy=single"))
    run.train()
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy=fsdp",),
        ("strategy=zero", "strategy.stage=3"),
        ("strategy=zero", "strategy.stage=2", "strategy.offload_optimizer=true"),
        ("strategy=pipeline", "train.micro_batch=6"),
        ("strategy=fsdp", "optimizer=muon"),
        ("strategy=ddp", "optimizer=lion"),
    ],
)
def test_every_strategy_keeps_it_and_resumes_to_the_bit(
    single: Run, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    run = Run(tmp_path / "run", 2, (*OPTIONS, *overrides))
    run.train()
    if not any(override.startswith("optimizer=") for override in overrides):
        for name, average in averages(single).items():
            torch.testing.assert_close(averages(run)[name], average, rtol=1e-4, atol=1e-5)
    killed = Run(tmp_path / "killed", 2, (*OPTIONS, *overrides))
    killed.kill_at(8)
    killed.train()
    assert_same_bits(killed, run)


@pytest.mark.slow
def test_it_may_be_switched_on_between_lives(single: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", 1, (*OPTIONS, "strategy=single", "optimizer.ema=null", "train.steps=6"))
    run.train()
    assert not [name for name in run.weights() if "ema" in name]
    later = replace(run, overrides=(*OPTIONS, "strategy=single"))
    later.train()
    weight = later.weights()["optimizer/ema_weight/token_embedding.weight"].item()
    assert weight == pytest.approx(1 - DECAY**6)  # of the steps since
