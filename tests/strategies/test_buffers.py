"""Buffers on one process: which passes change them, and which must not. On several: tests/zoo."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.strategies import ragged
from tests.strategies.test_step import strategy
from tests.zoo import models
from trainer.models import ModelFactory
from trainer.strategies.arithmetic import StepOptions
from trainer.strategies.buffers import Buffers
from trainer.strategies.single import Single


def zoo(kind: type = models.BatchNorm, options: StepOptions | None = None) -> Single:
    made = strategy(options=options or StepOptions(1.0, "none", False, micro_batch=4))
    shape = (models.Net.Config(name="net"), ragged.FACTS)
    made.setup(ModelFactory(lambda: kind(*shape), seed=5), ragged.optimizer)
    return made


def buffers(made: Single) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in made.model.named_buffers()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_refused_step_leaves_them_as_they_were() -> None:
    made = zoo()
    made.train_step([ragged.batch(0)])
    assert not made.update(0.01).skipped
    before = buffers(made)
    made.train_step([ragged.batch(1), ragged.batch(2)])
    assert not equal(buffers(made), before)
    made.parameters[0].grad.fill_(math.nan)
    assert made.update(0.01).skipped
    assert equal(buffers(made), before)


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("kind", [models.BatchNorm, models.Bf16Buffer])
def test_recomputation_changes_them_once(how: str, kind: type) -> None:
    """And it computes with what they were, though another micro-batch has changed them since."""
    plain, recomputed = zoo(kind), zoo(kind, StepOptions(1.0, how, False))
    for made in (plain, recomputed):
        for step in range(3):
            batches = [ragged.batch(2 * step + i) for i in range(2)]
            totals, _ = made.reduce_counts(batches, made.objective)
            for loss in [made.objective.loss(*made.run_forward(made.wrapped, batch), totals)[0] for batch in batches]:
                loss.backward()
            if step < 2:
                made.optimizer.zero_grad(set_to_none=True)
    assert equal(buffers(plain), buffers(recomputed))
    gradients = [[parameter.grad for parameter in made.parameters] for made in (plain, recomputed)]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_compiled_recomputation_changes_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_layer = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda layer: compile_layer(layer, backend="aot_eager"))
    plain, compiled = zoo(), zoo(options=StepOptions(1.0, "full", True))
    for made in (plain, compiled):
        for step in range(2):
            made.train_step([ragged.batch(step)])
            made.update(0.01)
    expected = buffers(plain)
    for name, buffer in buffers(compiled).items():
        torch.testing.assert_close(buffer, expected[name])


def test_a_batch_without_rows_is_filled_up_and_leaves_no_trace() -> None:
    """Batch norm refuses one row, a reshape refuses none; the gradient of nothing is zero."""
    nothing = {name: tensor[:0] for name, tensor in ragged.batch(0).items()}
    made = zoo()
    before = buffers(made)
    made.train_step([nothing])
    assert equal(buffers(made), before)
    assert all(not parameter.grad.any() for parameter in made.parameters)
    for kind in (models.BatchNorm, models.Reshaped):
        sums, _ = zoo(kind).eval_step(nothing)
        assert (float(sums["loss"]), int(sums["num_targets"])) == (0.0, 0)


def test_no_buffers_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *_, **__: called.append(tensor.dtype))
    for kind, collectives in ((models.Net, []), (models.BatchNorm, [torch.float64, torch.int64])):
        settled = Buffers(zoo(kind).model, replicas=2, group=None)
        settled.snapshot()
        settled.end_update(torch.tensor(False))
        assert called == collectives


@pytest.mark.slow
def test_throw_away_passes_of_ddp_leave_nothing_behind_and_compile_once() -> None:
    """Two ranks: one graph, of the first micro-batch's sizes; buffers and generators as if there were no passes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.strategies.ddp_buckets_rank"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line)
    assert (
        lines
        == ["BatchNorm: graphs 1, symbolic 0, left behind 0"] * 2 + ["Net: graphs 1, symbolic 0, left behind 0"] * 2
    )
