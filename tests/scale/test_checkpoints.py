"""What a checkpoint costs a rank of 1,024 (LLaMA-70B, AdamW): bytes gathered, seconds of CPU, index, files opened."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.scale import crowd
from tests.scale.crowd import Crowd, fake_rank, llama_70b
from trainer.checkpoint import load
from trainer.checkpoint.format import (
    INDEX,
    VERSION,
    folder_name,
    parse_index,
    table_numbers,
    tensor_file,
    write_index,
    write_manifest,
)
from trainer.checkpoint.load import find_newest, read_requests
from trainer.checkpoint.plan import WRITERS, Plan, header_of, local_shards

WORLD = 1024
RANK = 5 * WORLD // 8
STATES: dict[str, tuple[Callable[..., Any], list[int] | None]] = {
    "ddp": (crowd.ddp, [0]),
    "fsdp": (crowd.fsdp, [0]),
    "hsdp 128 x 8": (crowd.hsdp, [0]),
    "pipeline 8 x fsdp 128": (crowd.pipeline, [stage * WORLD // 8 for stage in range(8)]),
    "zero 1": (crowd.zero_1, None),
    "zero 3": (crowd.zero_3, [0]),
}
SLOW = ("hsdp 128 x 8", "zero 1", "zero 3")
CASES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in STATES]
SLACK = 5.0  # of what a quiet machine may take: counts say more


class Counts(NamedTuple):
    """What it takes from the first save to the end of a resume. `rounds`: collectives with words in them; `bytes`: what
    a rank gets in all of them; `index`: bytes of it; `tables` of different tensors, and `numbers` in them; `files` that
    this rank goes on from, where it was; `opened`: manifest, index, and rank 0's share of the files."""

    rounds: int
    bytes: int
    index: int
    tables: int
    numbers: int
    files: int
    opened: int


EXPECTED = {
    "ddp": Counts(6, 600_000, 215_000, 19, 90_000, WRITERS, 3),
    "fsdp": Counts(6, 660_000, 215_000, 19, 90_000, 2, 3),
    "hsdp 128 x 8": Counts(6, 640_000, 215_000, 19, 90_000, WRITERS, 3),
    "pipeline 8 x fsdp 128": Counts(6, 670_000, 215_000, 131, 75_000, 2, 3),
    "zero 1": Counts(6, 1_250_000, 430_000, 1453, 70_000, WRITERS, 3),
    "zero 3": Counts(6, 650_000, 215_000, 19, 330_000, 2, 3),
}
_LISTENERS: list[tuple[str, list[str]]] = []


@pytest.mark.parametrize("name", CASES)
def test_the_first_save_and_a_resume(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def parse(text: str, manifest: dict[str, Any]) -> Any:
        parsed.append(text)
        return parse_index(text, manifest)

    monkeypatch.setattr(load, "parse_index", parse)
    hold, classes = STATES[name]
    shapes, spent = llama_70b(), dict[str, float]()
    ranks = Crowd(shapes, WORLD, hold, classes)
    with fake_rank(RANK, WORLD):
        state = hold(shapes, RANK, WORLD)
        with ranks.cpu_seconds(spent, "stall"):
            held = local_shards(state)
            plan = Plan.from_state(state, ranks.topology(RANK))
            file = plan.file(RANK)
            plan.replicated_shards(RANK)
        assert {piece for piece, _ in file} <= {piece for piece, _ in held}
        assert plan.sizes[RANK] == sum(piece.nbytes for piece, _ in file)
        folder = written(tmp_path, plan)
        with ranks.cpu_seconds(spent, "resume"), opened(folder) as paths:
            found, _ = find_newest(tmp_path, ranks.topology(0), contents=False)
            assert found
            by_file = read_requests(found, state)
    tables = {(stored.sharding, stored.shape) for stored in plan.tensors.values()}
    index = (folder / INDEX).stat().st_size
    counts = Counts(
        ranks.rounds, ranks.bytes, index, len(tables), table_numbers(plan.tensors), len(by_file), len(paths)
    )
    print(f"{name}: {spent}, {counts}")
    assert sum(len(its) for its in by_file.values()) == len(held)
    for what, most in EXPECTED[name]._asdict().items():
        assert getattr(counts, what) <= most, what
    assert len(parsed) == 2  # by who reads it, and of what was handed on
    assert spent["stall"] < 1 * SLACK
    assert spent["resume"] < 2 * SLACK


@contextmanager
def opened(folder: Path) -> Iterator[list[str]]:
    """The files in there that are opened meanwhile."""
    _hear_of_files()
    paths: list[str] = []
    _LISTENERS.append((str(folder), paths))
    try:
        yield paths
    finally:
        _LISTENERS.clear()


@cache
def _hear_of_files() -> None:
    """Once for all: an audit hook cannot be taken away."""

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if _LISTENERS and event == "open":
            for folder, paths in _LISTENERS:
                paths += [str(args[0])] if str(args[0]).startswith(folder) else []

    sys.addaudithook(hear)


def written(folder: Path, plan: Plan) -> Path:
    """The checkpoint of such a plan, with files of the right sizes in which next to nothing lies."""
    path = folder / folder_name(7)
    path.mkdir()
    files = {}
    for rank, size in enumerate(plan.sizes.tolist()):
        if size:
            start = header_of(plan.file(rank), {}) if rank == 0 else b""  # nobody is here to look at the others
            (path / tensor_file(rank)).write_bytes(start)
            os.truncate(path / tensor_file(rank), len(start) + size)
            files[tensor_file(rank)] = {"bytes": len(start) + size, "xxh3": ""}
    files[INDEX] = write_index(path / INDEX, plan.tensors)
    write_manifest(path, {"version": VERSION, "step": 7, "files": files})
    return path
