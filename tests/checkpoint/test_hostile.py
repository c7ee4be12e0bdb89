"""Checkpoints that were made to do harm: refused, and nothing run, nothing allocated."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import format
from trainer.checkpoint.format import INDEX, MANIFEST, Damaged, folder_name, read_manifest, verify
from trainer.checkpoint.pieces import Fragment
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.save import Saver
from trainer.topology import ALONE


class Evil:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.canary}",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tensors that lie whole, and an even share."""
    stretch = Fragment(torch.arange(7.0), torch.Size((7,)), 0)
    state = {"model/a": torch.arange(12.0).view(3, 4), "model/b": torch.tensor(7), "optimizer/c": stretch}
    Saver(tmp_path, ALONE, Retention(), asynchronous=False).save(1, state, {})
    return tmp_path / folder_name(1)


def signed(folder: Path) -> None:
    """Gives a checkpoint the manifest that its files have: whoever changes them can do that, too."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    (folder / MANIFEST).unlink()
    files = {}
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        files[name] = format.write_file(folder / name, [content])
    format.write_manifest(folder, {**manifest, "files": files})


def index_cases() -> dict[str, Callable[[Any], Any]]:
    def tensor(where: int, value: Any) -> Callable[[Any], Any]:
        return lambda index: index["tensors"]["model/a"].__setitem__(where, value)

    def sharding(told: Any, replica: Any = 0) -> Callable[[Any], Any]:
        def change(index: Any) -> None:
            index["shardings"].append(told)
            index["tensors"]["model/a"][2:] = [len(index["shardings"]) - 1, replica]

        return change

    def boxes(*rows: Any) -> Callable[[Any], Any]:
        return sharding({"boxes": list(rows)})

    return {
        "another type": tensor(0, "OBJECT"),
        "a type that is none": tensor(0, ["F32"]),
        "an absurd size": tensor(1, [10**15, 4]),
        "an absurd number of dimensions": tensor(1, [1] * 100_000),
        "a negative size": tensor(1, [-3, -4]),
        "a size that is no number": tensor(1, ["3", 4]),
        "a size that is true": tensor(1, [True, 4]),
        "a number beyond all": tensor(1, [1 << 70, 4]),
        "not a number": tensor(1, [float("nan"), 4]),
        "larger than its file": tensor(1, [4, 40]),
        "another sharding": tensor(2, 7),
        "a sharding before the first": tensor(2, -1),
        "another replica": tensor(3, 1),
        "a replica before the first": tensor(3, -1),
        "a piece outside": boxes([0, [1, 0], [3, 4]]),
        "a piece beyond all": boxes([0, [(1 << 62) - 1, 0], [(1 << 62) - 1, 4]]),
        "a piece too small": boxes([0, [0, 0], [2, 4]]),
        "a piece of other dimensions": boxes([0, [0], [12]]),
        "a piece twice": boxes([0, [0, 0], [3, 4]], [0, [0, 0], [3, 4]]),
        "overlapping pieces": boxes([0, [0, 0], [2, 4]], [0, [1, 0], [1, 4]]),
        "another file": boxes([7, [0, 0], [3, 4]]),
        "a file beyond all": boxes([1 << 61, [0, 0], [3, 4]]),
        "another cut than its file": boxes([0, [0, 0], [1, 4]], [0, [1, 0], [2, 4]]),
        "no pieces": boxes(),
        "a mesh of no ranks": sharding({"mesh": [], "shards": []}),
        "a mesh of one that is none": sharding({"mesh": 0, "shards": []}),
        "a mesh of a rank twice": sharding({"mesh": [0, 0], "shards": []}),
        "a mesh of a rank before the first": sharding({"mesh": [-1], "shards": []}),
        "a mesh of halves": sharding({"mesh": [0.5], "shards": []}),
        "a ragged mesh": sharding({"mesh": [[0, 1], [2]], "shards": []}),
        "a mesh of words": sharding({"mesh": ["0"], "shards": []}),
        "a mesh of ranks that saved nothing": sharding({"mesh": [1], "shards": []}),
        "cut along no dimension of the mesh": sharding({"mesh": [0], "shards": [[1, 0]]}),
        "cut in no dimension of the tensor": sharding({"mesh": [0], "shards": [[0, 2]]}),
        "cut twice along one": sharding({"mesh": [0], "shards": [[0, 0], [0, 1]]}),
        "cut before the first": sharding({"mesh": [0], "shards": [[-1, 0]]}),
        "shares of nobody": sharding({"even": 1, "ranks": []}),
        "shares of an absurd world": sharding({"even": 1 << 61, "ranks": [0]}),
        "shares of half the ranks": sharding({"even": 2, "ranks": [0]}),
        "shares of a rank twice": sharding({"even": 1, "ranks": [0, 0]}),
        "no sharding": sharding({"places": []}),
        "a sharding that is none": sharding(None),
        "no tensors": lambda index: index.pop("tensors"),
        "no shardings": lambda index: index.pop("shardings"),
        "tensors that are none": lambda index: index.__setitem__("tensors", ["model/a"]),
    }


@pytest.mark.parametrize("case", index_cases())
def test_an_index_is_not_believed(folder: Path, case: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index_cases()[case](index)
    (folder / INDEX).write_text(json.dumps(index))
    signed(folder)
    tracemalloc.start()
    with pytest.raises(Damaged, match=r"index\.json"):
        verify(folder)
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()


HEADERS: dict[str, Callable[[Any], Any]] = {
    "a piece is missing": lambda told: told.pop("model/a"),
    "of another type": lambda told: told["model/a"].__setitem__("dtype", "I32"),
    "of another shape": lambda told: told["model/a"].__setitem__("shape", [4, 3]),
    "beyond the end": lambda told: told["model/a"].__setitem__("data_offsets", [1 << 40, (1 << 40) + 48]),
    "before the beginning": lambda told: told["model/a"].__setitem__("data_offsets", [-48, 0]),
    "shorter than it is": lambda told: told["model/a"].__setitem__("data_offsets", [0, 8]),
    "no offsets": lambda told: told["model/a"].pop("data_offsets"),
    "no entry": lambda told: told.__setitem__("model/a", 7),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_is_not_believed(folder: Path, case: str) -> None:
    path = folder / "rank-00000.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    told = json.loads(raw[8 : 8 + length])
    HEADERS[case](told)
    text = json.dumps(told).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    signed(folder)
    with pytest.raises(Damaged, match=r"rank-00000\.safetensors"):
        verify(folder)


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "sub/file", "..", ""])
def test_paths_stay_inside(folder: Path, name: str) -> None:
    manifest = read_manifest(folder)
    (folder / MANIFEST).unlink()
    manifest["files"][name] = {"bytes": 1, "xxh3": "0"}
    format.write_manifest(folder, manifest)
    with pytest.raises(Damaged, match="no file of a checkpoint"):
        verify(folder)


@pytest.mark.parametrize("name", [INDEX, MANIFEST, "rank-00000.safetensors"])
def test_links_and_pipes_are_not_followed(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(Damaged):
        verify(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(Damaged):
        verify(folder)


@pytest.mark.parametrize("name", [INDEX, MANIFEST])
@pytest.mark.parametrize("content", [b"", b"null", b"[" * 100_000, b"\xff\xfe", b'{"files": {}}', b"NaN"])
def test_json_that_is_none_of_ours(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    if name == INDEX:
        signed(folder)
    with pytest.raises(Damaged):
        verify(folder)


@pytest.mark.parametrize("name", [INDEX, MANIFEST, "rank-00000.safetensors"])
def test_pickles_are_not_run(folder: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (folder / name).write_bytes(pickle.dumps(Evil(canary)))
    if name != MANIFEST:
        signed(folder)
    with pytest.raises(Damaged):
        verify(folder)
    assert not canary.exists()
