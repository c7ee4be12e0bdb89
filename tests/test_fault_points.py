"""Fault points: what is asked for happens, once in the life of a run or always; nothing else, and for nothing."""

from __future__ import annotations

import errno
import re
import time
from pathlib import Path

import pytest
import torch

from trainer import fault_points
from trainer.config.faults import ACTIONS, POINTS, Fault
from trainer.fault_points import Provoked, arm, point

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def disarmed(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    yield
    arm([], tmp_path, 0)


def test_once_in_a_run_or_at_each_pass(tmp_path: Path) -> None:
    faults = ["data.next:raise:2:0", "data.next:raise:5+:0", "data.next:raise:1:3"]
    for expected in ([2, 5, 6], [5, 6]):  # a second life has seen the first one
        arm(faults, tmp_path, 0)
        seen = []
        for number in range(1, 7):
            try:
                point("data.next")
            except Provoked:
                seen.append(number)
        assert seen == expected


def test_what_they_do(tmp_path: Path) -> None:
    arm(["data.read:errno@EROFS:1", "eval.batch:delay@0.05:1"], tmp_path, 7)
    with pytest.raises(OSError, match="provoked by") as error:
        point("data.read")
    assert error.value.errno == errno.EROFS
    begin = time.monotonic()
    point("eval.batch")
    assert time.monotonic() - begin >= 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_value_changes(dtype: torch.dtype, tmp_path: Path) -> None:
    for action in ("flip", "nan"):
        weights = {"a": torch.arange(7), "model/b": torch.ones(4, 5, dtype=dtype)}
        arm([f"step.weights:{action}:1"], tmp_path / action, 0)
        (tmp_path / action / "logs").mkdir(parents=True)
        point("step.weights", lambda weights=weights: weights)
        changed = weights["model/b"][weights["model/b"] != 1]
        assert len(changed) == 1
        assert changed.isnan().item() if action == "nan" else changed.item() >= 4
        assert torch.equal(weights["a"], torch.arange(7))


def test_a_wrong_loss_has_a_wrong_gradient(tmp_path: Path) -> None:
    arm(["step.loss:nan:1"], tmp_path, 0)
    weight = torch.ones(3, requires_grad=True)
    loss = weight.sum()
    point("step.loss", [loss])
    (loss * 2).backward()
    assert loss.isnan()
    assert weight.grad.isnan().all()


def test_every_point_is_passed_somewhere_and_known() -> None:
    files = [path.read_text() for path in (ROOT / "trainer").rglob("*.py")]
    passed = {name for text in files for name in re.findall(r'\bpoint\("([a-z_.]+)"', text)}
    assert passed == set(POINTS)
    page = (ROOT / "docs" / "SURVIVAL.md").read_text()
    assert not [name for name, told in {**POINTS, **ACTIONS}.items() if f"| `{name}` | {told} |" not in page]
    assert not fault_points._armed
    assert Fault.parse("step.loss:nan:3").rank is None
