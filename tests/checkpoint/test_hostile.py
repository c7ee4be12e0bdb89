"""Checkpoints that were made to do harm: refused, and nothing run, nothing allocated."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.versions import of_version_2
from trainer.checkpoint import format, plan
from trainer.checkpoint.format import (
    INDEX,
    MANIFEST,
    VERSION,
    DamagedCheckpoint,
    folder_name,
    parse_index,
    read_manifest,
    tensor_file,
    verify,
)
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.save import Saver
from trainer.checkpoint.state import FlatShard
from trainer.errors import TrainingError
from trainer.topology import ALONE


class Evil:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.canary}",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tensors that lie whole, and an even share."""
    stretch = FlatShard(torch.arange(7.0), torch.Size((7,)), 0)
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


def types_and_sizes(tensor: Callable[[int, Any], Callable[[Any], Any]]) -> dict[str, Callable[[Any], Any]]:
    """Returns the cases that every version of the format has. `tensor` replaces a part of a tensor's entry."""
    return {
        "another type": tensor(0, "OBJECT"),
        "a type that is none": tensor(0, ["F32"]),
        "an absurd size": tensor(1, [10**15, 4]),
        "an absurd number of dimensions": tensor(1, [1] * 100_000),
        "a negative size": tensor(1, [-3, -4]),
        "a size that is not a number": tensor(1, ["3", 4]),
    }


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
        **types_and_sizes(tensor),
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


def index_cases_of_version_2() -> dict[str, Callable[[Any], Any]]:
    def tensor(where: int, value: Any) -> Callable[[Any], Any]:
        return lambda index: index["tensors"]["model/a"].__setitem__(where, value)

    def piece(where: int, value: Any) -> Callable[[Any], Any]:
        return lambda index: index["tensors"]["model/a"][2][0].__setitem__(where, value)

    def pieces(*its: Any) -> Callable[[Any], Any]:
        return tensor(2, list(its))

    return {
        **types_and_sizes(tensor),
        "larger than its file": tensor(1, [4, 40]),
        "another file": piece(0, 7),
        "a file before the first": piece(0, -1),
        "outside": piece(2, [1, 0]),
        "beyond all": piece(2, [(1 << 62) - 1, 0]),
        "before the first": piece(2, [-1, 0]),
        "too small": piece(3, [1, 4]),
        "of a negative size": piece(3, [-2, -4]),
        "of other dimensions": piece(3, [8]),
        "of halves": piece(3, [2, 4.0]),
        "overlapping": piece(3, [3, 4]),
        "a piece twice": pieces([0, 0, [0, 0], [3, 4]], [0, 0, [0, 0], [3, 4]]),
        "no pieces": pieces(),
        "a piece that is none": pieces(7),
        "pieces that are none": tensor(2, 7),
        "files that are none of tensors": lambda index: index.__setitem__("files", ["../escape", "manifest.json"]),
        "files that are not there": lambda index: index.__setitem__("files", ["rank-00007.safetensors"] * 2),
        "no files": lambda index: index.pop("files"),
        "no tensors": lambda index: index.pop("tensors"),
    }


@contextmanager
def refused(message: str, megabytes: int) -> Iterator[None]:
    """Before so much memory is allocated."""
    tracemalloc.start()
    try:
        with pytest.raises(DamagedCheckpoint, match=message):
            yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()


def assert_not_believed(folder: Path, case: Callable[[Any], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    case(index)
    with refused(r"index\.json", 20):
        parse_index(json.dumps(index), read_manifest(folder))


@pytest.mark.parametrize("case", index_cases())
def test_an_index_is_not_believed(folder: Path, case: str) -> None:
    assert_not_believed(folder, index_cases()[case])


@pytest.mark.parametrize("case", index_cases_of_version_2())
def test_an_index_of_before_is_not_believed(tmp_path: Path, case: str) -> None:
    folder = of_version_2(tmp_path)
    assert verify(folder)
    assert_not_believed(folder, index_cases_of_version_2()[case])


def test_an_index_that_says_other_cuts_than_its_file(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["shardings"].append({"boxes": [[0, [0, 0], [1, 4]], [0, [1, 0], [2, 4]]]})
    index["tensors"]["model/a"][2:] = [len(index["shardings"]) - 1, 0]
    (folder / INDEX).write_text(json.dumps(index))
    signed(folder)
    assert parse_index((folder / INDEX).read_text(), read_manifest(folder))
    with pytest.raises(DamagedCheckpoint, match=r"rank-00000\.safetensors: not what index\.json says"):
        verify(folder)


MANY = 3000
LARGE: dict[str, tuple[Any, list[Any], str]] = {
    "mesh x dimensions": ({"mesh": [*range(MANY)], "shards": [[0, 0]]}, [[1] * MANY], "at most 64 dimensions"),
    "mesh x shapes": (
        {"mesh": [*range(MANY)], "shards": [[0, 0]]}, [[MANY, i] for i in range(1, MANY)], "more shards",
    ),
    "replicas x shapes": ({"mesh": [*range(MANY)], "shards": []}, [[1, i] for i in range(1, 4 * MANY)], "more shards"),
    "shares x dimensions": ({"even": MANY, "ranks": [*range(MANY)]}, [[2] * 48], "more shards"),
    "blocks x shapes": (
        {"boxes": [[0, [0, 0], [0, 0]]] * MANY}, [[0, i] for i in range(1, MANY)], "more shards",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LARGE)
def test_a_small_index_of_very_many_pieces(case: str) -> None:
    """A sharding and its shapes are few bytes each; what they say together is not."""
    sharding, shapes, message = LARGE[case]
    tensors = {str(i): ["U8", shape, 0, 0] for i, shape in enumerate(shapes)}
    text = json.dumps({"shardings": [sharding], "tensors": tensors})
    assert len(text) < 500_000
    files = {tensor_file(rank): {"bytes": 1 << 50, "xxh3": ""} for rank in range(MANY)}
    with refused(message, 20):
        parse_index(text, {"version": VERSION, "files": files})


def test_what_could_not_be_read_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LARGEST_TABLES", 5)
    saver = Saver(tmp_path, ALONE, Retention(), asynchronous=False)
    with pytest.raises(TrainingError, match="more shards than a checkpoint can have"):
        saver.save(1, {"model/a": torch.zeros(2, 2), "model/b": torch.zeros(3)}, {})
    saver.close()


@pytest.mark.parametrize("read", [format.read_manifest, verify])
def test_json_that_memory_does_not_hold(folder: Path, read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(text: Any) -> Any:
        raise MemoryError

    manifest = read_manifest(folder)
    monkeypatch.setattr(format, "read_manifest", lambda folder: manifest)
    monkeypatch.setattr(json, "loads", loads)
    with pytest.raises(DamagedCheckpoint, match="MemoryError"):
        read(folder)


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
    with pytest.raises(DamagedCheckpoint, match=r"rank-00000\.safetensors"):
        verify(folder)


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "sub/file", "..", ""])
def test_paths_stay_inside(folder: Path, name: str) -> None:
    manifest = read_manifest(folder)
    (folder / MANIFEST).unlink()
    manifest["files"][name] = {"bytes": 1, "xxh3": "0"}
    format.write_manifest(folder, manifest)
    with pytest.raises(DamagedCheckpoint, match="no file of a checkpoint"):
        verify(folder)


@pytest.mark.parametrize("name", [INDEX, MANIFEST, "rank-00000.safetensors"])
def test_links_and_pipes_are_not_followed(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(DamagedCheckpoint):
        verify(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DamagedCheckpoint):
        verify(folder)


@pytest.mark.parametrize("name", [INDEX, MANIFEST])
@pytest.mark.parametrize("content", [b"", b"null", b"[" * 100_000, b"\xff\xfe", b'{"files": {}}', b"NaN"])
def test_json_that_is_none_of_ours(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    if name == INDEX:
        signed(folder)
    with pytest.raises(DamagedCheckpoint):
        verify(folder)


@pytest.mark.parametrize("name", [INDEX, MANIFEST, "rank-00000.safetensors"])
def test_pickles_are_not_run(folder: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (folder / name).write_bytes(pickle.dumps(Evil(canary)))
    if name != MANIFEST:
        signed(folder)
    with pytest.raises(DamagedCheckpoint):
        verify(folder)
    assert not canary.exists()
