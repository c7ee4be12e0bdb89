"""Writing shards: they read back in webdataset and tarfile, are the same every time, and never half there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import webdataset
from braceexpand import braceexpand

from trainer.data.index import SIDECAR, ShardIndex
from trainer.data.shard_spec import expand
from trainer.data.shards import Shards
from trainer.data.storage import Storage
from trainer.data.tools import write
from trainer.data.tools.documents import Document
from trainer.data.tools.write import (
    ShardWriter,
    describe,
    header,
    pack,
    pack_documents,
    shard_name,
    shards_spec,
)
from trainer.errors import ConfigError, DataError


def test_any_samples_read_back_in_order(tmp_path: Path) -> None:
    samples = [(f"café/{i:03d}", {"png": os.urandom(i * 37), "seg.json": b"{}" * i}) for i in range(40)]
    samples.append(("k" * 200, {"png": b"long", "seg.json": b""}))
    pack(iter(samples), tmp_path / "out", "img", shard_bytes=20_000)
    paths = expand(str(tmp_path / "out" / "img-*.tar"))
    assert len(paths) > 2
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        name for path in paths for name in (os.path.basename(path), os.path.basename(path) + SIDECAR)
    )
    found = [
        (s["__key__"], {"png": s["png"], "seg.json": s["seg.json"]})
        for s in webdataset.WebDataset(paths, shardshuffle=False)
    ]
    assert found == samples
    assert all(os.path.getsize(path) % tarfile.RECORDSIZE == 0 for path in paths)
    with tarfile.open(paths[0]) as archive:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.mode) for info in archive} == {(0, 0, 0, "", 0o444)}
    assert subprocess.run(["tar", "-tf", paths[-1]], capture_output=True, check=True).stderr == b""


def test_the_index_that_is_written_is_the_one_that_a_walk_finds(tmp_path: Path) -> None:
    # Fields that some samples lack, in another order of first appearance than by name; a name that takes a PAX header.
    members = [{"txt": b"1"}, {"a": b"", "txt": b"22"}, {"json": b"x" * 513}]
    samples = [(f"{'n' * (i * 30)}{i}", members[i % 3]) for i in range(8)]
    pack(samples, tmp_path / "out", shard_bytes=8000)
    storage = Storage(tmp_path / "cache")
    paths = expand(str(tmp_path / "out" / "*.tar"))
    assert len(paths) > 1
    for path in paths:
        kept = ShardIndex.load(Path(path + SIDECAR), path, storage.stamp(path))
        assert kept is not None
        assert kept == ShardIndex.build(storage.open(path))


@pytest.mark.parametrize(
    ("name", "size"),
    [("a/b.txt", 5), ("x" * 100, 0), ("y" * 101, 3), ("é.txt", 3), ("a.u16", 8**11 - 1), ("a.u16", 8**11)],
)
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    assert header(name, size) == info.tobuf(tarfile.PAX_FORMAT)


def test_documents_with_a_tokenizer(tmp_path: Path) -> None:
    documents = [Document(f"d/{i}", f"text {i} ü") for i in range(20)]
    for name in ("a", "b"):
        pack_documents(documents, tmp_path / name, tokenizer="chars", held_out=lambda key: key.endswith("7"))
    assert (tmp_path / "a" / "dataset.json").read_bytes() == (tmp_path / "b" / "dataset.json").read_bytes()
    made = json.loads((tmp_path / "a" / "dataset.json").read_text())
    assert made["splits"]["train"] == {"samples": 18, "bytes": 171, "chars": 153, "shards": "train-000000.tar"}
    assert made["splits"]["validation"]["samples"] == 2
    assert made["tokenizer"]["vocab_size"] == 2 + len(set("text ü 012345689"))  # of the train split only: no 7


def test_large_texts_are_sampled_for_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "TOKENIZER_SAMPLE", 100)
    pack(((f"{i}", {"txt": bytes([65 + i]) * 10}) for i in range(26)), tmp_path / "out")
    assert [text[0] for text in write._texts([str(tmp_path / "out" / "train-000000.tar")], "txt")] == list("ADGJMPSVY")


@pytest.mark.parametrize("count", [1, 2, pytest.param(10**6 + 1, marks=pytest.mark.slow)])
def test_a_spec_names_all_shards(count: int) -> None:
    spec, names = shards_spec("a", count) or "", 0
    for names, name in enumerate(braceexpand(spec), 1):
        assert name == shard_name("a", names - 1)
    assert names == count


def test_what_is_missing_is_not_described(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a-000000\.tar is gone"):
        describe(tmp_path, {}, {}, {}, {}, {"a-000000.tar": "0"})


def test_existing_folders_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    pack([("a", {"txt": b"1"})], out)
    before = sorted(os.listdir(out))
    with pytest.raises(ConfigError, match="exists already"):
        pack([("b", {"txt": b"2"})], out)
    assert sorted(os.listdir(out)) == before
    with pytest.raises(ConfigError, match="no samples"):
        pack([], tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        pack([("a", {"txt": b"1"})], tmp_path / "file" / "out")
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


@pytest.mark.parametrize("key", ["a.b", "", "__a__/b", ".x", "a/", "dir/b.c"])
def test_keys_that_readers_would_misread(tmp_path: Path, key: str) -> None:
    writer = ShardWriter(tmp_path, "x")
    with pytest.raises(ConfigError, match="cannot be stored"):
        writer.add(key, {"txt": b""} if key != "a/" else {})
    assert not os.listdir(tmp_path)


def test_a_key_that_comes_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="key 'a' comes back"):
        pack([("a", {"txt": b""}), ("b", {"txt": b""}), ("a", {"txt": b""})], tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_a_killed_packer_leaves_no_dataset(tmp_path: Path) -> None:
    code = """
import itertools, sys
from pathlib import Path
from trainer.data.tools.write import pack
pack(((f"{i:09d}", {"txt": b"x" * 1000}) for i in itertools.count()), Path(sys.argv[1]), shard_bytes=100_000)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob(".out.*/*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".out.*/*.tar"))
    assert not (tmp_path / "out").exists()
    pack([("a", {"txt": b"1"})], tmp_path / "out")
    shards = Shards.open(str(tmp_path / "out" / "*.tar"), "txt", Storage(tmp_path / "cache"))
    assert shards.n == 1


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from trainer.data.tools.write import pack
from trainer.errors import ConfigError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    pack(((f"{i:09d}", {"txt": b"x" * 1000}) for i in range(1000)), Path(sys.argv[1]))
except ConfigError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert "out: cannot be written: File too large" in done.stdout
    assert done.stderr == ""
    assert not os.listdir(tmp_path)
