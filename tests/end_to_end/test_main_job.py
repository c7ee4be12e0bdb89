"""50 steps of the main job, the default command line plus a strategy: one curve (I3), one ledger."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import Run

STEPS = 50
MAIN = (f"train.steps={STEPS}", "train.log_every=10", "data.ledger=true", "precision=fp32")
STRATEGIES = [
    (2, "strategy=ddp"),
    (2, "strategy=fsdp"),
    (2, "strategy=hsdp"),
    *((2, f"strategy=zero strategy.stage={stage}") for stage in (0, 1, 2, 3)),
    (2, "strategy=pipeline"),
    (2, "strategy=pipeline strategy.schedule=interleaved_zero_bubble"),
    (2, "strategy=pipeline strategy.schedule=zbv"),
    (4, "strategy=pipeline strategy.stages=2 strategy.data_parallel=fsdp"),
    (2, "strategy=fsdp strategy.tensor_parallel=2"),
]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("single") / "run", 1, ("strategy=single",), base=MAIN)
    run.train()
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "strategy"), STRATEGIES)
def test_main_job(single: Run, tmp_path: Path, processes: int, strategy: str) -> None:
    run = Run(tmp_path / "run", processes, tuple(strategy.split()), base=MAIN)
    run.train()
    assert len(run.ledger()) == STEPS
    assert run.ledger() == single.ledger()
    away = {}
    for name in ("loss", "grad_norm"):
        pairs = zip(run.metrics(), single.metrics(), strict=True)
        away[name] = [abs(ours[name] - theirs[name]) / theirs[name] for ours, theirs in pairs]
    print(f"{strategy} on {processes}: " + ", ".join(f"{name} within {max(rows):.1e}" for name, rows in away.items()))
    assert max(away["loss"]) < 1e-5
    assert max(away["grad_norm"]) < 1e-4
