"""Bad steps: never done; repeated, left out or the end, the same on all processes."""

from __future__ import annotations

import io
import math
import tarfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.runs import Run, assert_same_bits
from trainer.config.schema import Guard as Section
from trainer.errors import TrainingError
from trainer.optim.conditional import step_unless
from trainer.resilience.guard import Guard, RollingWindow
from trainer.resilience.replicas import Replicas, _find_minority
from trainer.topology import ALONE

CPU = torch.device("cpu")
STEPS = ("train.steps=24", "train.log_every=4", "model.dropout=0.1")


def section(**more) -> Section:
    values = {"bad_step": "rollback", "limit": 1, "norm_spike": None, "loss_spike": None, "window": 8}
    return Section(**{**values, "replicas_every": 0, **more})


def events(run: Run, kind: str) -> list[dict]:
    return [event for event in run.rows("events.jsonl") if event["kind"] == kind]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run", 3, STEPS)
    run.train()
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told"),
    [
        (("debug.faults=[step.loss:nan:14:1]",), ("bad_step", {"step": 14, "action": "rollback"})),
        (
            ("debug.faults=[step.weights:flip:14:1]", "guard.replicas_every=1"),
            ("corrupted", {"step": 14, "ranks": [1]}),
        ),
    ],
    ids=["nan", "flipped bit"],
)
def test_what_a_repetition_mends_leaves_no_trace(how, told, tmp_path: Path, undisturbed: Run) -> None:
    run = Run(tmp_path / "run", 3, (*STEPS, *how))
    run.train()
    kind, fields = told
    (event,) = events(run, kind)
    assert event == {**event, **fields, "step": 14}
    assert [event["step"] for event in events(run, "rollback")] == [10]
    assert_same_bits(run, undisturbed)


@pytest.mark.slow
def test_what_is_bad_again_is_left_out(tmp_path: Path) -> None:
    """It equals the run whose data cannot be read at this step; and the run that leaves it out at once."""
    good, damaged = tmp_path / "good.tar", tmp_path / "damaged.tar"
    write_shard(good, set())
    texts = ("data=samples", "data.fields={tokens: txt}", "train.steps=20", "train.log_every=1", "eval.every=0")
    first = Run(tmp_path / "first", 2, (*texts, f"data.shards={good}"))
    first.train()
    batch = {key for _, key in first.ledger()[12]["samples"]}
    assert len(batch) == 24
    write_shard(damaged, batch)

    always = "debug.faults=[step.loss:nan:13:1,step.loss:nan:16:1]"  # of the second life of step 13 that is pass 16
    back = Run(tmp_path / "back", 2, (*texts, f"data.shards={good}", always))
    back.train()
    assert [event["action"] for event in events(back, "bad_step")] == ["rollback", "left out"]
    skip = Run(tmp_path / "skip", 2, (*texts, f"data.shards={good}", "guard.bad_step=skip", always.replace("16", "99")))
    skip.train()
    assert [event["action"] for event in events(skip, "bad_step")] == ["left out"]
    assert_same_bits(skip, back)
    assert [row["step"] for row in skip.metrics() if row["skipped"]] == [13]

    lacks = Run(tmp_path / "lacks", 2, (*texts, f"data.shards={damaged}", "data.on_error=quarantine"))
    lacks.overrides += ("data.error_budget=24",)
    lacks.train()
    assert not lacks.ledger()[12]["samples"]
    ours, theirs = back.weights(), lacks.weights()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    same = ("step", "loss", "grad_norm", "lr")
    curves = [[[row[name] for name in same] for row in run.metrics() if row["step"] != 13] for run in (back, lacks)]
    assert curves[0] == curves[1]


def test_a_spike_is_not_done_either(tmp_path: Path) -> None:
    """The loss of one micro-batch, and so its gradient, is multiplied by a turned bit: found in the norm."""
    guard = ("guard.norm_spike=20", "guard.window=8", "train.steps=24", "schedule=constant")
    whole = Run(tmp_path / "whole", 1, guard)
    whole.train()
    assert not events(whole, "bad_step")
    run = Run(tmp_path / "run", 1, (*guard, "debug.faults=[step.loss:flip:14:0]"))
    run.train()
    (event,) = events(run, "bad_step")
    assert event["reason"].endswith("a spike")
    assert_same_bits(run, whole)


def test_too_many_end_the_run(tmp_path: Path) -> None:
    faults = ",".join(f"step.loss:nan:{number}:0" for number in range(5, 20))
    run = Run(tmp_path / "run", 1, (*STEPS, "checkpoint.every=0", "guard.limit=2", f"debug.faults=[{faults}]"))
    output = run.train(expect=4)
    assert "3 bad steps among the last 128: [5, 6, 7]. Lower optimizer.lr (now" in output
    assert run.status()["state"] == "failed"
    assert run.metrics()[-1]["step"] == 7


def test_spikes_are_judged_by_what_is_usual() -> None:
    rolling = RollingWindow(16, 5, CPU)
    fine = torch.tensor(True)
    for value in (0.9, 1.1, 0.8):
        rolling.record(torch.tensor(value), fine)
    assert rolling.limit() == math.inf  # too few to judge by
    for value in (1.2, 1.0):
        rolling.record(torch.tensor(value), fine)
    assert rolling.limit() == pytest.approx(1 + 5 * 1.4826 * 0.1)
    rolling.record(torch.tensor(50.0), ~fine)
    assert rolling.recorded_values() == pytest.approx([0.9, 1.1, 0.8, 1.2, 1.0])
    other = RollingWindow(16, 5, CPU)
    other.load(rolling.recorded_values())
    assert other.limit() == rolling.limit()
    for _ in range(20):
        other.record(torch.tensor(2.0), fine)
    assert other.limit() == pytest.approx(2 + 5 * 1.4826 * 0.02)  # numbers that do not vary


def test_a_loss_that_spikes_refuses_any_gradient() -> None:
    guard = Guard(section(loss_spike=5), CPU)
    for _ in range(8):
        guard.record(torch.tensor(1.0), 2.0, torch.tensor(False))
    assert guard.limit(2.0) == math.inf
    assert guard.limit(9.0) == -math.inf
    assert guard.limit(math.nan) == -math.inf


def test_each_step_is_repeated_once() -> None:
    guard = Guard(section(), CPU)
    row = {"step": 7, "loss": math.nan, "grad_norm": 1.0, "lr": 0.1, "skipped": True}
    assert guard.judge(row, may_go_back=True)["action"] == "rollback"
    assert guard.judge(row, may_go_back=True)["action"] == "left out"
    guard.note_good_step(7)
    assert guard.judge(row, may_go_back=True)["action"] == "rollback"  # an accident each time
    with pytest.raises(TrainingError, match="2 bad steps"):
        guard.judge({**row, "step": 8}, may_go_back=False)
    with pytest.raises(TrainingError, match="step 7"):
        Guard(section(bad_step="stop"), CPU).judge(row, may_go_back=True)


@pytest.mark.parametrize("fused", [False, True])
def test_a_refused_step_changes_nothing(fused: bool) -> None:
    """On the device, by torch's own fused kernels, as on the host."""
    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Linear(5, 3))
        optimizers.append(torch.optim.AdamW(models[-1].parameters(), lr=0.1, fused=fused))
    for number, refused in enumerate((False, True, False, True, True, False)):
        for model in models:
            torch.manual_seed(number)
            model(torch.randn(4, 5)).square().sum().backward()
        if refused:
            for parameter in models[0].parameters():
                parameter.grad.fill_(math.nan)
        step_unless(optimizers[0], torch.tensor(refused))
        if not refused:
            optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizers[0].state[ours][kind], optimizers[1].state[theirs][kind])


def test_the_odd_one_is_found() -> None:
    state = {"model/a": torch.ones(3)}
    assert Replicas(ALONE).find_differing(state) is None
    assert _find_minority({0: 5, 1: 6, 2: 5}) == [1]
    assert _find_minority({0: 5, 1: 5}) == []
    assert _find_minority({0: 5, 3: 6}) == [0, 3]  # who of two is right?


def write_shard(path: Path, damaged: set[str]) -> None:
    """Texts of 48 bytes and more; some are not UTF-8."""
    whole = b"".join(b"%d times a line is %d lines. " % (number, number) for number in range(3000))
    with tarfile.open(path, "w") as tar:
        for number in range(600):
            key = f"t{number:04}"
            content = b"\xff\xfe" * 30 if key in damaged else whole[60 * number : 60 * number + 60]
            entry = tarfile.TarInfo(f"{key}.txt")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
