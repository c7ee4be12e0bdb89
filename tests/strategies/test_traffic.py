"""How often processes send in a step, counted where they send; that the curve stays is seen on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.strategies.traffic_rank import STEPS, trained
from trainer.topology import ALONE

pytestmark = pytest.mark.slow  # counted by real processes, which take half a minute to start
LAYERS = 4
GROUPS = LAYERS + 1  # that FSDP gathers and reduces at once: each layer, and what is outside of layers
SHARED = "strategy.tensor_parallel=2 strategy.sequence_parallel=true strategy.loss_parallel=true"
TWO = "strategy=pipeline strategy.stages=2"


def run(processes: int, cases: dict[str, tuple[str, int]]) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [*command, "-m", "tests.strategies.traffic_rank", json.dumps(cases)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def on_two() -> dict[str, Any]:
    return run(
        2,
        {
            "fsdp, 4": ("strategy=fsdp", 4),
            "fsdp, last": ("strategy=fsdp strategy.reduce=last", 4),
            "hsdp, 4": ("strategy=hsdp strategy.shard_size=1", 4),
            "hsdp, last": ("strategy=hsdp strategy.shard_size=1 strategy.reduce=last", 4),
            "muon": ("strategy=fsdp optimizer=muon", 2),
            "pipeline": ("strategy=pipeline strategy.stages=1", 2),
        },
    )


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: trained(f"strategy=single optimizer={name}", 1, ALONE) for name in ("adamw", "muon")}


def assert_same_curve(found: Any, single: Any) -> None:
    assert len(found["losses"]) == STEPS
    assert found["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(single["norms"], rel=1e-4)


def test_gradients_are_scattered_after_each_micro_batch_or_the_last(
    on_two: dict[str, Any], alone: dict[str, Any]
) -> None:
    assert on_two["fsdp, 4"]["train"]["reduce_scatter"] == 4 * GROUPS
    assert on_two["fsdp, last"]["train"]["reduce_scatter"] == GROUPS
    for name in ("fsdp, 4", "fsdp, last"):
        assert_same_curve(on_two[name], alone["adamw"])


def test_groups_of_hsdp_send_once_a_step(on_two: dict[str, Any], alone: dict[str, Any]) -> None:
    """Besides the one sum of the count of targets."""
    for name in ("hsdp, 4", "hsdp, last"):
        assert on_two[name]["train"]["all_reduce"] == GROUPS + 1, name
        assert_same_curve(on_two[name], alone["adamw"])


def test_muon_sends_all_matrices_at_once(on_two: dict[str, Any], alone: dict[str, Any]) -> None:
    """To their owners and back; and there is the norm."""
    assert on_two["muon"]["update"] == {"all_reduce": 1, "all_to_all": 2}
    assert_same_curve(on_two["muon"], alone["muon"])


def test_copies_of_a_pipeline_add_up_in_buckets(on_two: dict[str, Any], alone: dict[str, Any]) -> None:
    """One bucket, the count of targets, and which parameters have a gradient anywhere."""
    assert on_two["pipeline"]["train"]["all_reduce"] == 3
    assert_same_curve(on_two["pipeline"], alone["adamw"])


@pytest.mark.slow
def test_several_axes(alone: dict[str, Any]) -> None:
    found = run(
        4,
        {
            "hsdp, 4": ("strategy=hsdp strategy.shard_size=2", 4),
            "hsdp, last": ("strategy=hsdp strategy.shard_size=2 strategy.reduce=last", 4),
            "hsdp, bf16": ("strategy=hsdp strategy.shard_size=2 precision.reduce=bf16", 4),
            "hsdp, muon": ("strategy=hsdp strategy.shard_size=2 optimizer=muon", 2),
            "fsdp x tensor, muon": ("strategy=fsdp strategy.tensor_parallel=2 optimizer=muon", 2),
            "x ddp": (TWO, 2),
            "x fsdp": (f"{TWO} strategy.data_parallel=fsdp", 2),
            "x fsdp, muon": (f"{TWO} strategy.data_parallel=fsdp optimizer=muon", 2),
            "x tensor": (f"{TWO} {SHARED}", 2),
            "x tensor, muon": (f"{TWO} {SHARED} optimizer=muon", 2),
        },
    )
    # What is sent in a shorter type than it is held in is not added up in it.
    assert found.pop("hsdp, bf16")["train"]["all_reduce"] == 4 * GROUPS + 1
    for name, its in found.items():
        assert_same_curve(its, alone["muon" if "muon" in name else "adamw"])
    assert found["hsdp, 4"]["train"] == {"all_reduce": GROUPS + 1, "reduce_scatter": 4 * GROUPS, "all_gather": 36}
    assert found["hsdp, last"]["train"] == {"all_reduce": GROUPS + 1, "reduce_scatter": GROUPS, "all_gather": 36}
    assert found["hsdp, muon"]["update"] == {"all_reduce": 1, "all_to_all": 2}
    assert found["x tensor, muon"]["update"] == {"all_reduce": 1, "all_to_all": 2}
    assert found["x fsdp, muon"]["update"] == {"all_reduce": 1, "all_to_all": 2}
    # The count of targets, what has a gradient, the two ends' tied weight, and what copies or neighbors add up.
    assert found["x ddp"]["train"]["all_reduce"] == 4
    assert found["x tensor"]["train"]["all_reduce"] == 4
    assert found["x fsdp"]["train"]["all_reduce"] == 2  # no sizes of micro-batches: none can differ
