"""What a checkpoint costs a rank of 1,024 (LLaMA-70B, AdamW): bytes gathered, seconds of CPU, index, files opened."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.scale import crowd
from tests.scale.crowd import Crowd, fake_rank, llama_70b
from trainer.checkpoint.format import INDEX, VERSION, folder_name, tensor_file, write_index, write_manifest
from trainer.checkpoint.load import newest, orders
from trainer.checkpoint.plan import WRITERS, Plan, header_of, held_by

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
SLACK = 2.0  # the machine does other things, in the same caches
_OPENED: list[str] = []


@contextmanager
def cpu_seconds(spent: dict[str, float], what: str) -> Iterator[None]:
    started = time.process_time()
    yield
    spent[what] = round(time.process_time() - started, 3)


@pytest.mark.parametrize("name", CASES)
def test_the_first_save_and_a_resume(name: str, tmp_path: Path) -> None:
    hold, classes = STATES[name]
    shapes, spent = llama_70b(), dict[str, float]()
    ranks = Crowd(shapes, WORLD, hold, classes)
    with fake_rank(RANK, WORLD):
        state = hold(shapes, RANK, WORLD)
        with cpu_seconds(spent, "stall"):
            held = held_by(state)
            plan = Plan.of(state, ranks.topology(RANK))
            file = plan.file(RANK)
            plan.to_agree_on(RANK)
        assert {piece for piece, _ in file} <= {piece for piece, _ in held}
        assert plan.sizes[RANK] == sum(piece.nbytes for piece, _ in file)
        folder = written(tmp_path, plan)
        with cpu_seconds(spent, "resume"), opened(folder) as paths:
            found, _ = newest(tmp_path, ranks.topology(0), contents=False)
            assert found
            by_file = orders(found, state)
    index = (folder / INDEX).stat().st_size
    print(f"{name}: {spent}, {ranks.bytes:,} bytes gathered, index {index:,}, {len(by_file)} of {len(paths)} files")
    assert sum(len(its) for its in by_file.values()) == len(held)
    assert spent["stall"] < 1 * SLACK
    assert spent["resume"] < 2 * SLACK
    assert ranks.bytes < 3e6  # all that is gathered by a rank, until it trains
    assert index < 1e6
    replicated = name in ("ddp", "hsdp 128 x 8", "zero 1")
    assert len(by_file) <= (WRITERS if replicated else 2)  # to go on where it was, a rank opens no more
    assert len(paths) <= 3  # manifest, index and a rank's share of the files


@contextmanager
def opened(folder: Path) -> Iterator[list[str]]:
    """The files in there that are opened meanwhile."""
    if not _OPENED:
        sys.addaudithook(lambda event, args: _OPENED.append(str(args[0])) if event == "open" else None)
    _OPENED[:] = ["since now"]
    paths: list[str] = []
    yield paths
    paths += [path for path in _OPENED if path.startswith(str(folder))]


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
