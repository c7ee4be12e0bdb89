"""Invariant I3: one curve, whatever the processes, the micro-batch, the recomputation."""

from __future__ import annotations

import pytest

from tests.runs import Run, assert_same_curve

STEPS = 50


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("runs") / "single", overrides=(f"train.steps={STEPS}",))
    run.train()
    return run


@pytest.mark.parametrize(
    ("procs", "overrides"),
    [
        pytest.param(2, (), marks=pytest.mark.slow),
        pytest.param(3, (), marks=pytest.mark.slow),
        pytest.param(4, ("train.micro_batch=2",), marks=pytest.mark.slow),
        (1, ("train.micro_batch=6",)),
        (1, ("train.micro_batch=6", "train.activation_checkpointing=full")),
        pytest.param(1, ("train.micro_batch=6", "train.activation_checkpointing=selective"), marks=pytest.mark.slow),
        (1, ("strategy=single", "data.workers=2")),
    ],
)
def test_same_curve(single: Run, tmp_path, procs: int, overrides: tuple[str, ...]) -> None:
    run = Run(tmp_path / "run", procs, (f"train.steps={STEPS}", *overrides))
    run.train()
    assert_same_curve(run, single, STEPS)


@pytest.mark.slow
def test_same_curve_with_dropout(tmp_path) -> None:
    """Dropout is drawn from the sequence's number, so it too is the same anywhere."""
    overrides = (f"train.steps={STEPS}", "model.dropout=0.1")
    alone, together = (
        Run(tmp_path / "alone", 1, overrides),
        Run(tmp_path / "together", 3, (*overrides, "train.micro_batch=4")),
    )
    alone.train()
    together.train()
    assert_same_curve(together, alone, STEPS)


@pytest.mark.slow
def test_topology_changes_in_the_middle(single: Run, tmp_path) -> None:
    """Killed on 2 processes, continued on 3, finished on 1."""
    run = Run(tmp_path / "run", 2, (f"train.steps={STEPS}", "train.log_every=1"))
    run.kill_at(14)
    run.procs = 3
    run.kill_at(33)
    run.procs, run.overrides = 1, (*run.overrides, "train.micro_batch=3")
    run.train()
    assert_same_curve(run, single, STEPS)
    assert [event["kind"] for event in run.rows("events.jsonl")].count("resume") == 2


def test_a_mean_of_means_would_be_seen(single: Run, tmp_path) -> None:
    """The comparison is sharp enough: a gradient wrong by 0.1 % is far outside of it."""
    run = Run(tmp_path / "run", 1, (f"train.steps={STEPS}", "train.clip_norm=0.999"))
    run.train()
    with pytest.raises(AssertionError):
        assert_same_curve(run, single, STEPS)
