"""What is saved in any pieces can be read in any others."""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from trainer.checkpoint.format import INDEX, folder_name, read_index, verify, write_file, write_manifest
from trainer.checkpoint.load import newest, read, read_all
from trainer.checkpoint.pieces import Box, Fragment, pieces
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.save import Saver
from trainer.checkpoint.shardings import Grid
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
            for box, values in pieces(Fragment(whole.flatten()[start:stop], whole.shape, start)):
                place = tuple(slice(a, a + n) for a, n in zip(*box, strict=True))
                assert (found[place] == -1).all()
                found[place] = values
            assert found.flatten()[start:stop].tolist() == list(range(start, stop))
            assert (found == -1).sum() == 60 - (stop - start)


def dealt(tensor: torch.Tensor, ranks: int, draw: Any) -> list[torch.Tensor | Fragment]:
    """`tensor` as ranks hold it: all of it each, or a stretch each, of which some may be empty."""
    if draw(st.booleans()):
        return [tensor.clone() for _ in range(ranks)]
    cuts = sorted(draw(st.lists(st.integers(0, tensor.numel()), min_size=ranks - 1, max_size=ranks - 1)))
    ends = [0, *cuts, tensor.numel()]
    flat = tensor.flatten()
    return [Fragment(flat[a:b].clone(), tensor.shape, a) for a, b in pairwise(ends)]


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
        found, _ = newest(folder)
        assert found
        everything = {n: torch.zeros_like(tensor) for n, tensor in whole.items()} | read_all(found)
        for got in (everything, *({n: its[rank] for n, its in wanted.items()} for rank in range(loading))):
            read(found, got)
            for name, held in got.items():
                start = held.start if isinstance(held, Fragment) else 0
                values = held.values if isinstance(held, Fragment) else held.flatten()
                assert torch.equal(values, whole[name].flatten()[start : start + len(values)])
        manifest = verify(folder / folder_name(7))
        index = read_index(folder / folder_name(7), manifest)
        written = sum(prod(place.box.size) for stored in index.values() for place in stored.places)
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
    """Version 2, in which the index tells of each piece where it lies."""
    whole = {"model/a": torch.arange(12.0).view(3, 4), "model/b": torch.tensor(7)}
    folder = tmp_path / folder_name(3)
    folder.mkdir()
    cuts = {
        "rank-00000.safetensors": {"model/a@0,0": whole["model/a"][:2].clone()},
        "rank-00001.safetensors": {"model/a@2,0": whole["model/a"][2:].clone(), "model/b": whole["model/b"]},
    }
    files = {name: write_file(folder / name, [safetensors.torch.save(its)]) for name, its in cuts.items()}
    starts = {name: 8 + int.from_bytes((folder / name).read_bytes()[:8], "little") for name in cuts}
    tensors = {
        "model/a": ["F32", [3, 4], [[0, starts["rank-00000.safetensors"], [0, 0], [2, 4]], [1, 0, [2, 0], [1, 4]]]],
        "model/b": ["I64", [], [[1, 0, [], []]]],
    }
    text = json.dumps({"files": list(files), "tensors": tensors})
    files[INDEX] = write_file(folder / INDEX, [text.encode()])
    write_manifest(folder, {"version": 2, "step": 3, "files": files})
    found, events = newest(tmp_path)
    assert found
    assert not events
    got = read_all(found)
    assert all(torch.equal(got[name], whole[name]) for name in whole)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_mesh_says_what_torch_says(data: Any) -> None:
    """Any mesh, any cuts, sizes that do not divide: each rank's block is the one that torch gives it."""
    draw = data.draw
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    kinds = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
    placements = tuple(draw(st.sampled_from(kinds)) for _ in sizes)
    ranks = np.array(draw(st.permutations(range(prod(sizes)))), np.int64).reshape(sizes)
    shards = tuple((axis, it.dim) for axis, it in enumerate(placements) if isinstance(it, Shard))
    table = Grid(ranks, shards).table(shape)
    table.raise_unless_whole(shape)
    for place in np.ndindex(*sizes):
        size, offset = _compute_local_shape_and_global_offset(shape, sizes, list(place), placements)
        expected = [Box(tuple(offset), tuple(size))] if prod(size) else []
        assert [table.boxes[row] for row in table.rows_held_by(int(ranks[place]))] == expected
