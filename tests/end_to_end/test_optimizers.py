"""Every optimizer in a real run: killed, resumed and resized, the same curve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.runs import Run, assert_same_bits, assert_same_curve

STEPS = 24


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        pytest.param(("optimizer=muon", "optimizer.lr=0.002", "schedule=wsd"), 1e-4, marks=pytest.mark.slow),
        # The sign of a momentum near zero turns with its rounding: some weights then differ by twice the rate.
        pytest.param(("optimizer=lion", "optimizer.lr=0.0003", "schedule=linear"), 2e-3, marks=pytest.mark.slow),
    ],
    ids=["muon", "lion"],
)
def test_killed_resized_and_sharded(overrides: tuple[str, ...], weights: float, tmp_path: Path) -> None:
    options = (
        *overrides, f"train.steps={STEPS}", "train.log_every=1", "checkpoint.every=8", "schedule.warmup_steps=10",
    )  # fmt: skip
    whole = Run(tmp_path / "whole", 1, options)
    whole.train()
    killed = Run(tmp_path / "killed", 1, options)
    killed.kill_at(13)
    killed.train()
    assert_same_bits(killed, whole)
    resized = Run(tmp_path / "resized", 3, options)
    resized.kill_at(13)
    resized = replace(resized, procs=2, overrides=(*options, "strategy=fsdp"))
    resized.train()
    assert_same_curve(resized, whole, STEPS, weights)
