"""Sums in buckets: every gradient gets its own, whatever is in a bucket with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.strategies.counted import counted
from trainer.strategies import buckets


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_every_gradient_gets_its_own_sum(alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 4 * 100)
    shapes = [(3, 5), (), (90,), (200,), (7, 1), (30, 3), (4,)]
    made = [torch.randn(shape) for shape in shapes] + [torch.randn(6, dtype=torch.float64), torch.randn(8, 2).T]
    expected = [gradient.clone() for gradient in made]
    sent = counted(lambda: buckets.all_reduce_buckets(made, alone))
    assert sent == {"all_reduce": 7}  # of 16, 90, 200, 97, 4, 6 (another data type) and 16 numbers
    for gradient, wanted in zip(made, expected, strict=True):
        assert torch.equal(gradient, wanted)


def test_sums_in_another_type_are_rounded_to_it(alone: dist.ProcessGroup) -> None:
    made = [torch.tensor([1.0, 1 + 2**-12])]
    buckets.all_reduce_buckets(made, alone, torch.bfloat16)
    assert made[0].dtype == torch.float32
    assert made[0].tolist() == [1.0, 1.0]
