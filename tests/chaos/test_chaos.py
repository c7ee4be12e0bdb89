"""The chaos matrix: under every strategy, on 2, 3 and 4 processes, whatever happens, the same bits in the end."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.anywhere.cells import Cell, cells
from tests.chaos.conftest import FAULTS
from tests.chaos.storm import Forked, Storm
from tests.runs import TINY, Run, assert_same_bits

COMMON = (
    *TINY, "train.clip_norm=0.5", "checkpoint.every=5", "train.log_every=2", "eval.every=40",
    "model.layers=4", "model.dropout=0.1", "track.console=false", "track.wandb.mode=disabled",
    "watchdog.grace_s=0", "watchdog.first_s=20", "launch.timeout_s=20",
)  # fmt: skip
SEED = int(os.environ.get("ONECURVE_SEED", "6"))
FAULTS_A_CELL = int(os.environ.get("ONECURVE_FAULTS", "6"))  # more of them, and other ones by seed: a longer storm


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in cells() if cell.processes > 1], ids=lambda cell: cell.folder)
def test_storm(cell: Cell, tmp_path: Path, record_property: Any) -> None:
    print(f"ONECURVE_SEED={SEED}")
    overrides = (*cell.overrides, f"train.steps={40 + 10 * FAULTS_A_CELL}")
    undisturbed = Run(tmp_path / "undisturbed", cell.processes, overrides, base=COMMON)
    undisturbed.train()
    storm = Storm(Run(tmp_path / cell.folder, cell.processes, overrides, base=COMMON), SEED)
    try:
        storm.rage(FAULTS_A_CELL)
    finally:
        print(*storm.told, sep="\n")
    record_property(FAULTS, dict(storm.survived))
    assert_same_bits(storm.run, undisturbed)
    assert not list((storm.run.folder / "checkpoints").glob(".attempt*"))


@pytest.mark.slow
def test_preempted_at_any_instant(tmp_path: Path, record_property: Any) -> None:
    """Start and end of a life included: each is to do eight steps more, and is told to stop somewhere on the way."""
    draw, instants = random.Random(SEED), 8 * FAULTS_A_CELL
    last = 8 * instants
    print(f"ONECURVE_SEED={SEED}")
    constant = ("schedule=constant", "eval.every=8")
    undisturbed = Run(tmp_path / "undisturbed", 2, (*constant, f"train.steps={last}"), base=COMMON)
    undisturbed.train()
    run = Run(tmp_path / "run", 2, constant, base=COMMON)
    lives, told = Forked(run), []
    try:
        length = lives.live("train.steps=8").seconds
        for number in range(1, instants + 1):
            blow = draw.choice(("terminate all", "terminate one"))
            steps = f"train.steps={8 * number}"
            life = lives.live(steps, blow=blow, instant=draw.uniform(0.0, 1.1 * length), draw=draw)
            told.append((blow, life.codes, life.after_blow))
            assert set(life.codes.values()) <= {0, 75, -15, -9}, told
            assert (life.after_blow or 0.0) < 30, told
            if life.finished:
                assert run.status()["state"] == "finished"
        assert lives.live(f"train.steps={last}").finished
    finally:
        lives.close()
        print(*told, sep="\n")
    record_property(FAULTS, {"preemption": sum(life[2] is not None for life in told)})
    assert_same_bits(run, undisturbed)
