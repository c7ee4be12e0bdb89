"""DeepSpeed's ZeRO: killed and resumed to the bit, into and from any other. (tests/parity has its numbers.)"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from tests.runs import Run, assert_same_bits, assert_same_curve
from trainer.config.compose import load
from trainer.errors import ConfigError
from trainer.patches import release_saved_parameters

pytest.importorskip("deepspeed")

STEPS = 30
OPTIONS = (f"train.steps={STEPS}", "train.log_every=1", "train.clip_norm=0.5")
ZERO2, ZERO3 = ("strategy=zero", "strategy.stage=2"), ("strategy=zero", "strategy.stage=3")
OFFLOAD = ("strategy.offload_optimizer=true",)


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("single") / "run", 1, (*OPTIONS, "strategy=single"))
    run.train()
    return run


@pytest.mark.parametrize(
    ("procs", "overrides"),
    [
        slow(2, ZERO3),  # tests/anywhere resumes it, too
        slow(2, ("strategy=zero", "strategy.stage=0")),
        slow(2, ("strategy=zero", "strategy.stage=1", "optimizer=lion", "precision.reduce=bf16")),
        slow(3, ZERO2),
        slow(3, (*ZERO3, "train.activation_checkpointing=selective")),
        slow(2, (*ZERO2, *OFFLOAD)),
        slow(2, (*ZERO3, *OFFLOAD, "strategy.offload_parameters=true")),
        slow(1, ZERO3),
    ],
)
def test_killed_and_resumed_to_the_bit(procs: int, overrides: tuple[str, ...], single: Run, tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", procs, (*OPTIONS, *overrides))
    output = whole.train()
    assert "deepspeed" not in output.lower()
    stage = json.loads((whole.folder / "deepspeed.json").read_text())["zero_optimization"]["stage"]
    assert f"strategy.stage={stage}" in overrides
    if "optimizer=lion" not in overrides:
        assert_same_curve(whole, single, STEPS)
    killed = Run(tmp_path / "killed", procs, (*OPTIONS, *overrides, "train.log_every=2"))
    killed.kill_at(13)
    killed.train()
    assert_same_bits(killed, whole)


@pytest.mark.slow
def test_into_and_from_others_in_mid_run(single: Run, tmp_path: Path) -> None:
    """One process, stage 2 on two, FSDP on two with other micro-batches, stage 3 on three."""
    run = Run(tmp_path / "run", 1, (*OPTIONS, "strategy=single", "checkpoint.every=5"))
    run.kill_at(7)
    for procs, overrides, last in (
        (2, (*ZERO2, "train.micro_batch=4"), 13),
        (2, ("strategy=fsdp", "train.micro_batch=3"), 19),
        (3, (*ZERO3, "train.micro_batch=4"), None),
    ):
        life = replace(run, procs=procs, overrides=(*OPTIONS, "checkpoint.every=5", *overrides))
        life.kill_at(last) if last else life.train()
    assert_same_curve(run, single, STEPS)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("strategy.stage=0", *OFFLOAD), "strategy.offload_optimizer=true: .* nearest: strategy.stage=1"),
        (("strategy.offload_parameters=true",), "strategy.offload_parameters=true: .* nearest: strategy.stage=3"),
        (("strategy.stage=3", "train.compile=true"), "train.compile=true: .* nearest: strategy.stage=2"),
        (("optimizer=muon",), "optimizer=muon: needs whole matrices, .* nearest: strategy=fsdp"),
        (("precision=fp16",), "precision.compute=fp16: .* nearest: precision=bf16"),
        (("precision=fp8",), "precision.compute=fp8: .* nearest: precision=bf16"),
        (("precision.param=bf16",), "precision.param=bf16: .* nearest: precision.param=fp32"),
    ],
)
def test_refused(overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(["strategy=zero", *overrides], 2)


@pytest.mark.parametrize("bf16", [False, True])
def test_what_autograd_saves_keeps_no_parameter_alive(bf16: bool) -> None:
    """A parameter is let go behind its layer; gathered again, it lies at another place of another buffer."""
    value, x = torch.randn(6, 4), torch.randn(2, 3, 4, requires_grad=True)
    weight, bias = torch.nn.Parameter(value.clone()), torch.nn.Parameter(torch.randn(6))
    weight.ds_tensor = "as DeepSpeed marks its own"  # type: ignore[attr-defined]
    expected, x2 = value.clone().requires_grad_(), x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        with release_saved_parameters():
            out = F.linear(x, weight, bias)
        reference = F.linear(x2, expected, bias.detach())
    gathered = StorageWeakRef(weight.untyped_storage())
    weight.data = torch.empty(0)
    assert gathered.expired()
    weight.data = torch.cat([torch.zeros(7), value.flatten()])[7:].view(6, 4)
    out.square().sum().backward()
    reference.square().sum().backward()
    for ours, theirs in ((x.grad, x2.grad), (weight.grad, expected.grad)):
        assert torch.equal(ours, theirs)  # type: ignore[arg-type]
