"""A run of 1,024 ranks of which one is here: what it holds, and what the others would say.

Meshes are real ones, of torch's fake process group; tensors have shapes and no memory. What ranks say of what they hold
is the same for whole classes of them, so the answers are exact: one rank of each class is asked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.checkpoint.plan import Sections, describe_state
from trainer.checkpoint.state import FlatShard, State
from trainer.topology import ALONE, Topology

Shapes = dict[str, tuple[int, ...]]


def llama_70b() -> Shapes:
    """723 parameters."""
    wide, inner, keys = 8192, 28672, 1024
    block = {
        "attention.q": (wide, wide), "attention.k": (keys, wide), "attention.v": (keys, wide),
        "attention.o": (wide, wide), "mlp.gate": (inner, wide), "mlp.up": (inner, wide), "mlp.down": (wide, inner),
        "norm1": (wide,), "norm2": (wide,),
    }  # fmt: skip
    blocks = {f"blocks.{i}.{name}.weight": shape for i in range(80) for name, shape in block.items()}
    return {"embedding.weight": (32000, wide), **blocks, "norm.weight": (wide,), "head.weight": (32000, wide)}


@contextmanager
def fake_rank(rank: int, world: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it knows meshes, which are equal on all ranks, with the place of this one


def adamw(shapes: Shapes, hold: Callable[[tuple[int, ...]], Any]) -> State:
    """The state of a model and its optimizer, of which `hold` gives what a rank holds of a tensor."""
    step = {f"optimizer/step/{name}": empty(()) for name in shapes}
    roots = ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    return {f"{root}/{name}": hold(shape) for root in roots for name, shape in shapes.items()} | step


def empty(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def on(mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Callable[[tuple[int, ...]], DTensor]:
    def hold(shape: tuple[int, ...]) -> DTensor:
        local, _ = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
        whole = empty(shape)
        return DTensor.from_local(
            empty(tuple(local)), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    return hold


def mesh(**sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


# What a rank of a world holds of a model, as the strategies deal it out.


def ddp(shapes: Shapes, rank: int, world: int) -> State:
    return adamw(shapes, empty)


def fsdp(shapes: Shapes, rank: int, world: int) -> State:
    return adamw(shapes, on(mesh(dp=world), (Shard(0),)))


def hsdp(shapes: Shapes, rank: int, world: int) -> State:
    return adamw(shapes, on(mesh(dp_replicate=world // 8, dp_shard=8), (Replicate(), Shard(0))))


def pipeline(shapes: Shapes, rank: int, world: int) -> State:
    """8 stages x fsdp, which share the embedding's matrix: the first and the last stage hold it."""
    rows = mesh(pp=8, dp=world // 8)
    stage = rank // (world // 8)
    return adamw(part_of(shapes, stage), on(rows["dp"], (Shard(0),)))


def part_of(shapes: Shapes, stage: int) -> Shapes:
    def belongs(name: str) -> bool:
        if not name.startswith("blocks"):
            return stage in ((0, 7) if name.startswith("embedding") else (7,))
        return int(name.split(".")[1]) // 10 == stage

    return {name: shape for name, shape in shapes.items() if belongs(name) and not name.startswith("head")}


def zero_1(shapes: Shapes, rank: int, world: int) -> State:
    """Weights are whole; of the optimizer's state a rank has an equal stretch of all tensors one after the other."""
    return ddp(shapes, rank, world) | fragments(shapes, rank, world)


def fragments(shapes: Shapes, rank: int, world: int, empty_ones: bool = True) -> State:
    length = -(-sum(map(prod, shapes.values())) // world)
    first, state, at = rank * length, {}, 0
    for name, shape in shapes.items():
        begin, end = max(first, at), min(first + length, at + prod(shape))
        start, count = (begin - at, end - begin) if begin < end else (0, 0)
        for root in ("exp_avg", "exp_avg_sq") if count or empty_ones else ():
            state[f"optimizer/{root}/{name}"] = FlatShard(empty((count,)), torch.Size(shape), start)
        at += prod(shape)
    return state


def zero_3(shapes: Shapes, rank: int, world: int) -> State:
    def hold(shape: tuple[int, ...]) -> FlatShard:
        length = -(-prod(shape) // world)
        count = max(0, min(length, prod(shape) - rank * length))
        return FlatShard(empty((count,)), torch.Size(shape), rank * length)

    return adamw(shapes, hold)


class Crowd:
    """All ranks. `state` gives what one holds; `classes`: the first of each class of ranks that say the same, in order;
    none: each says something else of the optimizer's state (`fragments`)."""

    def __init__(self, shapes: Shapes, world: int, state: Callable[..., State], classes: list[int] | None):
        self.world, self.shapes, self.state, self.bytes, self.rounds = world, shapes, state, 0, 0
        self.simulated = 0.0  # seconds of CPU
        self.sections: list[Sections] = []
        for rank in classes if classes is not None else [0]:
            with fake_rank(rank, world):
                self.sections += [describe_state(state(shapes, rank, world), rank, world)] * (
                    world // len(classes or [0])
                )
        if classes is None:
            own = describe_state(fragments(shapes, 0, world, empty_ones=False), 0, world)
            common = {digest: text for digest, text in self.sections[0].items() if digest not in own}
            told = [
                describe_state(fragments(shapes, rank, world, empty_ones=False), rank, world) for rank in range(world)
            ]
            self.sections = [dict(sorted((common | its).items())) for its in told]

    def topology(self, rank: int) -> Topology:
        crowd = self

        class Here(Topology):
            def gather_all(self, value: Any, group: Any) -> list[Any]:
                return crowd.answers(value, rank)

            def broadcast(self, value: Any) -> Any:
                assert self.is_main, "what rank 0 reads is read as rank 0"
                crowd.rounds += 1
                with crowd.simulating():
                    crowd.bytes += len(json.dumps(value))
                return value

        return Here(**{**vars(replace(ALONE, rank=rank, world_size=self.world))})

    def answers(self, value: Any, rank: int) -> list[Any]:
        """`exchange` gathers digests, then what each of them is a digest of from the first who has it. What else is
        gathered is the same on all ranks."""
        with self.simulating():
            self.rounds += 1
            texts = self._texts(value)
            assert json.loads(texts[rank]) == json.loads(json.dumps(value)), (
                "the rank says something else than was said"
            )
            self.bytes += sum(map(len, texts))
        return [json.loads(text) for text in texts]

    def _texts(self, value: Any) -> list[str]:
        if self.rounds == 1:
            return [json.dumps(list(its)) for its in self.sections]
        if self.rounds > 2:
            return [json.dumps(value)] * self.world
        seen: set[str] = set()
        texts = []
        for its in self.sections:
            texts.append(json.dumps([text for digest, text in its.items() if digest not in seen]))
            seen |= its.keys()
        return texts

    @contextmanager
    def simulating(self) -> Iterator[None]:
        """What no rank of a real run does."""
        started = time.process_time()
        yield
        self.simulated += time.process_time() - started

    @contextmanager
    def cpu_seconds(self, spent: dict[str, float], what: str) -> Iterator[None]:
        """Those of the one rank, without the simulation of the others."""
        started, simulated = time.process_time(), self.simulated
        yield
        spent[what] = round(time.process_time() - started - (self.simulated - simulated), 3)
        spent[f"{what}: simulation"] = round(self.simulated - simulated, 3)
