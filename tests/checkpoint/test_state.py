"""What is saved in any pieces can be read in any others."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from tests.checkpoint.versions import WHOLE, of_version_2
from tests.scale.crowd import fake_rank
from trainer.checkpoint.format import folder_name, read_index, verify
from trainer.checkpoint.load import find_newest, read_all, read_state
from trainer.checkpoint.plan import collect_holdings
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.save import Saver
from trainer.checkpoint.shardings import MeshSharding
from trainer.checkpoint.state import Box, FlatShard, sharded_dims, shards_of
from trainer.errors import TrainingError
from trainer.topology import ALONE, Topology


class Ranks:
    """Some ranks in threads of one process: what `gather` and `broadcast` are to a checkpoint."""

    def __init__(self, size: int):
        self.size, self.barrier, self.values = size, Barrier(size, timeout=5), [None] * size

    def topology(self, rank: int) -> Topology:
        ranks = self

        class Here(Topology):
            def gather_all(self, value: Any, group: Any) -> list[Any]:
                ranks.values[rank] = value
                ranks.barrier.wait()
                values = list(ranks.values)
                ranks.barrier.wait()
                return values

            def broadcast(self, value: Any) -> Any:
                return self.gather_all(value, None)[0]

        return Here(**{**vars(replace(ALONE, rank=rank, world_size=self.size))})

    def each(self, work: Any) -> list[Any]:
        with ThreadPoolExecutor(self.size) as pool:
            return [future.result() for future in [pool.submit(work, rank) for rank in range(self.size)]]


def test_stretches_of_a_flat_tensor_are_blocks_of_it() -> None:
    whole = torch.arange(3 * 4 * 5).view(3, 4, 5)
    for start in range(60):
        for stop in range(start, 61):
            found = torch.full_like(whole, -1)
            for box, values in shards_of(FlatShard(whole.flatten()[start:stop], whole.shape, start)):
                place = tuple(slice(a, a + n) for a, n in zip(*box, strict=True))
                assert (found[place] == -1).all()
                found[place] = values
            assert found.flatten()[start:stop].tolist() == list(range(start, stop))
            assert (found == -1).sum() == 60 - (stop - start)


def dealt(tensor: torch.Tensor, ranks: int, draw: Any) -> list[torch.Tensor | FlatShard]:
    """`tensor` as ranks hold it: all of it each, or a stretch each, of which some may be empty."""
    if draw(st.booleans()):
        return [tensor.clone() for _ in range(ranks)]
    cuts = sorted(draw(st.lists(st.integers(0, tensor.numel()), min_size=ranks - 1, max_size=ranks - 1)))
    ends = [0, *cuts, tensor.numel()]
    flat = tensor.flatten()
    return [FlatShard(flat[a:b].clone(), tensor.shape, a) for a, b in pairwise(ends)]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_saved_in_any_pieces_read_in_any_others(data: Any) -> None:
    draw = data.draw
    shapes = draw(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4))
    types = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    whole = {
        f"model/{i}.weight": torch.randint(0, 2**7, shape).to(draw(st.sampled_from(types)))
        for i, shape in enumerate(shapes)
    }
    saving, loading = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    parts = {name: dealt(tensor, saving, draw) for name, tensor in whole.items()}
    wanted = {name: dealt(torch.zeros_like(tensor), loading, draw) for name, tensor in whole.items()}
    with tempfile.TemporaryDirectory() as name:
        folder, ranks = Path(name), Ranks(saving)

        def save(rank: int) -> Any:
            saver = Saver(folder, ranks.topology(rank), Retention(), pauses=())
            return saver.save(7, {name: its[rank] for name, its in parts.items()}, {}), saver.wait(), saver.close()

        for _, events, _ in ranks.each(save):
            assert [event["kind"] for event in events] == ["checkpoint"], events
        found, _ = find_newest(folder)
        assert found
        everything = {n: torch.zeros_like(tensor) for n, tensor in whole.items()} | read_all(found)
        for got in (everything, *({n: its[rank] for n, its in wanted.items()} for rank in range(loading))):
            read_state(found, got)
            for name, held in got.items():
                start = held.start if isinstance(held, FlatShard) else 0
                values = held.values if isinstance(held, FlatShard) else held.flatten()
                assert torch.equal(values, whole[name].flatten()[start : start + len(values)])
        manifest = verify(folder / folder_name(7))
        index = read_index(folder / folder_name(7), manifest)
        written = sum(int(stored.sharding.table(stored.shape).numel.sum()) for stored in index.values())
        assert written == sum(tensor.numel() for tensor in whole.values())  # each element once
        for file in (folder / folder_name(7)).glob("*.safetensors"):  # anybody can read them
            assert safetensors.torch.load_file(file)


def test_what_several_hold_is_shared_out_and_has_to_agree(tmp_path: Path) -> None:
    ranks = Ranks(3)

    def save(rank: int) -> Any:
        saver = Saver(tmp_path, ranks.topology(rank), Retention(), asynchronous=False, pauses=())
        state = {f"model/{i}": torch.full((100,), float(i)) for i in range(6)}
        first = saver.save(1, state, {})
        if rank == 1:
            state["model/4"][17] += 1e-6
        return first, saver.save(2, state, {}), saver.close()

    for first, second, _ in ranks.each(save):
        assert [event["kind"] for event in first] == ["checkpoint"]
        assert "ranks 0,1,2 hold other values of weights" in second[0]["reason"]
    sizes = {path.stat().st_size for path in (tmp_path / folder_name(1)).glob("rank-*")}
    assert len(list((tmp_path / folder_name(1)).glob("rank-*"))) == 3
    assert max(sizes) < 1.1 * min(sizes)
    assert not (tmp_path / folder_name(2)).exists()


def test_one_that_was_replaced_cannot_publish(tmp_path: Path) -> None:
    """A process that still writes while the run already goes on elsewhere."""
    state = {"model/a": torch.zeros(3)}
    old = Saver(tmp_path, ALONE, Retention(), asynchronous=False, pauses=())
    new = Saver(tmp_path, ALONE, Retention(), asynchronous=False, pauses=())
    (event,) = old.save(5, state, {})
    assert "another process trains in this folder by now" in event["reason"]
    assert [event["kind"] for event in new.save(5, state, {})] == ["checkpoint"]


def test_the_format_of_before_is_read(tmp_path: Path) -> None:
    of_version_2(tmp_path)
    found, events = find_newest(tmp_path)
    assert found
    assert not events
    got = read_all(found)
    assert all(torch.equal(got[name], WHOLE[name]) for name in WHOLE)


def placements_over(draw: Any, shape: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[Placement, ...]:
    """Any; the first dimension of the mesh may cut what the others have cut already, as FSDP does."""
    kinds = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
    placements = [draw(st.sampled_from(kinds)) for _ in sizes]
    pieces = prod(size for size, it in zip(sizes[1:], placements[1:], strict=True) if it == placements[0])
    if isinstance(placements[0], Shard) and pieces > 1 and draw(st.booleans()):
        placements[0] = _StridedShard(placements[0].dim, split_factor=pieces)
    return tuple(placements)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_mesh_says_what_torch_says(data: Any) -> None:
    """Any mesh, any cuts, sizes that do not divide (they do for a strided shard, of which torch's answer is wrong
    otherwise): each rank's block is the one that torch gives it."""
    draw = data.draw
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    placements = placements_over(draw, shape, sizes)
    strided = {it.dim for it in placements if isinstance(it, _StridedShard)}
    shape = tuple(size * prod(sizes) if dim in strided else size for dim, size in enumerate(shape))
    ranks = np.array(draw(st.permutations(range(prod(sizes)))), np.int64).reshape(sizes)
    table = MeshSharding(ranks, sharded_dims(placements)).table(shape)
    table.raise_unless_whole(shape)
    for place in np.ndindex(*sizes):
        size, offset = _compute_local_shape_and_global_offset(shape, sizes, list(place), placements)
        expected = [Box(tuple(offset), tuple(size))] if prod(size) else []
        assert [table.box(row) for row in table.rows_held_by(int(ranks[place]))] == expected


@pytest.mark.parametrize(("data", "tensor"), [(4, 2), (3, 2), (8, 4)])
@pytest.mark.parametrize("rows", [257, 5])
def test_what_fsdp_cuts_of_what_tensor_parallel_has_cut(data: int, tensor: int, rows: int) -> None:
    """Of sizes that do not divide: what each rank holds in truth is the block that it says, and that the mesh says."""
    whole = torch.arange(rows * 3.0).view(rows, 3)
    held = torch.zeros_like(whole)
    for rank in range(data * tensor):
        with fake_rank(rank, data * tensor):
            weight = sharded_twice(whole, data, tensor)
            said = shards_of(weight)
            table = MeshSharding.from_placements(weight.device_mesh, weight.placements).table((rows, 3))
        for box, values in said:
            part = (slice(box.offset[0], box.offset[0] + box.size[0]), slice(None))
            assert torch.equal(values, whole[part])
            held[part] += 1
        assert [table.box(row) for row in table.rows_held_by(rank)] == [box for box, _ in said]
    table.raise_unless_whole((rows, 3))
    assert held.eq(1).all()


def sharded_twice(whole: torch.Tensor, data: int, tensor: int) -> DTensor:
    layer = torch.nn.Linear(*reversed(whole.shape), bias=False)
    layer.weight.data.copy_(whole)
    module, mesh = (
        torch.nn.Sequential(layer),
        init_device_mesh("cpu", (data, tensor), mesh_dim_names=("dp", "tp")),
    )
    parallelize_module(module, mesh["tp"], {"0": ColwiseParallel()}, src_data_rank=None)
    fully_shard(module, mesh=mesh["dp"])
    assert isinstance(layer.weight, DTensor)
    assert isinstance(layer.weight.placements[0], _StridedShard)
    return layer.weight.detach()


def test_a_shard_of_another_size_than_its_mesh_says_is_not_saved() -> None:
    with fake_rank(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        odd = DTensor.from_local(
            torch.zeros(3, 2), mesh, [Shard(0)], run_check=False, shape=torch.Size((4, 2)), stride=(2, 1)
        )
        with pytest.raises(TrainingError, match=r"holds a block of shape \(3, 2\), not \(2, 2\)"):
            shards_of(odd)


def test_a_type_or_shape_on_which_ranks_differ_is_named() -> None:
    one, another = ([{}, [["model/a", dtype, [3, 4]]]] for dtype in ("F32", "BF16"))
    with pytest.raises(TrainingError, match=r"'model/a' is F32 \[3, 4\] on one process, BF16 \[3, 4\] on another"):
        collect_holdings([([0], one), ([1], another)])
