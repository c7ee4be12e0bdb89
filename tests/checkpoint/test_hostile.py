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
    state = {"model/a": torch.arange(12.0).view(3, 4), "model/b": torch.tensor(7)}
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
    def tensor(change: Callable[[list[Any]], Any]) -> Callable[[Any], Any]:
        return lambda index: change(index["tensors"]["model/a"])

    def piece(where: int, value: Any) -> Callable[[Any], Any]:
        return tensor(lambda it: it[2][0].__setitem__(where, value))

    return {
        "another type": tensor(lambda it: it.__setitem__(0, "OBJECT")),
        "an absurd size": tensor(lambda it: it.__setitem__(1, [10**15, 4])),
        "an absurd size of its pieces, too": tensor(
            lambda it: (it.__setitem__(1, [10**15, 4]), it[2][0].__setitem__(3, [10**15, 4]))
        ),
        "a negative size": tensor(lambda it: it.__setitem__(1, [-3, -4])),
        "a size that is no number": tensor(lambda it: it.__setitem__(1, ["3", 4])),
        "a size that is true": piece(3, [True, 4]),
        "beyond the end": piece(1, 1 << 40),
        "before the beginning": piece(1, -8),
        "a number beyond all": piece(1, 1 << 70),
        "not a number": piece(1, float("nan")),
        "a piece outside": piece(2, [1, 0]),
        "a piece too small": piece(3, [2, 4]),
        "a piece of other dimensions": piece(2, [0]),
        "a piece twice": tensor(lambda it: it[2].append(it[2][0])),
        "another file": piece(0, 7),
        "overlapping pieces": tensor(
            lambda it: it.__setitem__(2, [[*it[2][0][:2], [0, 0], [2, 4]], [*it[2][0][:2], [1, 0], [1, 4]]])
        ),
        "a file elsewhere": lambda index: index["files"].__setitem__(0, "../../etc/passwd"),
        "no tensors": lambda index: index.pop("tensors"),
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
