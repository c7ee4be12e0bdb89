"""What `onecurve plan` says of a run, against the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.plan import lines
from tests.runs import TINY, Run
from trainer.checkpoint.load import find_newest
from trainer.checkpoint.state import DTYPES
from trainer.config.compose import load


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer=muon", "optimizer.ema=0.9"),
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("optimizer=lion", "precision=bf16"), marks=pytest.mark.slow),
    ],
)
def test_checkpoints_are_as_large_as_planned(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run = Run(tmp_path / "run", 1, ("train.steps=2", "checkpoint.every=0", *overrides))
    run.train()
    found, _ = find_newest(run.folder / "checkpoints")
    assert found
    numbers = sum(stored.numel * DTYPES[stored.dtype].itemsize for stored in found.index.values())
    told = dict(lines(load([*TINY, *run.overrides], 1), 1))
    assert told["model"].startswith(f"{sum(s.numel for n, s in found.index.items() if n.startswith('model/')):,} ")
    value, unit = told["checkpoint"].split()[:2]
    assert numbers == pytest.approx(float(value) * {"KiB": 2**10, "MiB": 2**20}[unit], rel=0.01)
    assert "3 are kept, one more is written" in told["checkpoint"]
