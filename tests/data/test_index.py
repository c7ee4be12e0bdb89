"""Shards against the webdataset library (same keys, same bytes), the sidecar's life, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import index
from trainer.data.index import SIDECAR, ShardIndex, Shards, expand, key_and_extension
from trainer.errors import ConfigError, DataError


def write(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return str(path)


def make(folder: Path, shards: int = 3, samples: int = 7) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write(
            folder / f"s-{s:02d}.tar",
            [
                (f"dir/{s}-{i}.{ext}", f"{ext} {s} {i} ".encode() * (40 * i))
                for i in range(samples)
                for ext in ("txt", "seg.JSON")
            ],
        )
        for s in range(shards)
    ]


def by_webdataset(paths: list[str]) -> list[dict]:
    return list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))


@pytest.mark.parametrize("field", ["txt", "seg.json"])
def test_samples_are_those_of_webdataset(tmp_path: Path, field: str) -> None:
    paths = make(tmp_path)
    shards, expected = Shards(paths, field), by_webdataset(paths)
    assert [shards.name(v)[1] for v in range(shards.n)] == [sample["__key__"] for sample in expected]
    assert [shards.read(v) for v in range(shards.n)] == [sample[field] for sample in expected]
    assert shards.sizes.dtype == np.int64
    assert shards.sizes.tolist() == [len(sample[field]) for sample in expected]
    assert [shards.locate(v) for v in (0, 6, 7, 20)] == [(0, 0), (0, 6), (1, 0), (2, 6)]
    assert shards.name(20) == ("s-02.tar", "dir/2-6")
    with pytest.raises(IndexError):
        shards.read(21)
    shards.close()
    assert shards.read(20) == expected[20][field]


ODD = [
    "__meta__.json",
    "__x__/a.txt",
    "README",
    ".hidden",
    "a/.b",
    "a.b/c",
    "a.b/c.txt",
    "a.b/c.JSON",
    "d.tar.gz",
    "d.TXT",
    "./e.txt",
    "./e.cls",
    "f..txt",
    "g.txt",
    "README2",
    "g.json",
    "x/__y__.txt",
    "ü/ö.txt",
    "k.",
    "l/m.n/o.p.q",
]


def test_odd_names_are_grouped_as_webdataset_does(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [(name, name.encode()) for name in ODD])
    found = ShardIndex.build(path)
    expected = [{k: v for k, v in sample.items() if not k.startswith("__")} for sample in by_webdataset([path])]
    content = Path(path).read_bytes()
    assert [
        {ext: content[at : at + size] for ext, (at, size) in members.items()} for members in found.members
    ] == expected
    assert found.keys == [sample["__key__"] for sample in by_webdataset([path])]


@given(st.text(alphabet="ab./_A\n", max_size=9))
@settings(max_examples=500, deadline=None)
def test_names_split_as_webdataset_does(name: str) -> None:
    base, extension = webdataset.tariterators.base_plus_ext(name)
    expected = None if base is None or name.startswith("__") else (base, extension.lower())
    found = key_and_extension(name)
    assert found == expected or (name.startswith("__") and found == (base, extension.lower()))


def test_interleaved_and_duplicate_members_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("0.a", b""), ("1.a", b""), ("0.b", b"")])
    with pytest.raises(DataError, match=r"a\.tar: byte 1536: key '0' comes back"):
        Shards([path], "a")
    path = write(tmp_path / "b.tar", [("0.a", b"12"), ("0.A", b"34")])
    with pytest.raises(DataError, match=r"b\.tar: byte 1536: key '0' has a second member 'a'"):
        Shards([path], "a")
    assert not list(tmp_path.glob("*.json"))


def test_damage_names_shard_and_byte(tmp_path: Path) -> None:
    paths = make(tmp_path)
    content = bytearray(Path(paths[1]).read_bytes())
    second = ShardIndex.build(paths[1]).members[2]["txt"][0] - 512
    content[second + 3] ^= 1
    Path(paths[1]).write_bytes(content)
    with pytest.raises(DataError, match=rf"s-01\.tar: byte {second}: damaged header .*'dir/1-1\.seg\.JSON'"):
        Shards(paths, "txt")


def test_sidecar_is_written_used_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path, 1)[0]
    first = ShardIndex.open(path)
    assert json.loads(Path(path + SIDECAR).read_text())["format"] == index.FORMAT
    assert sorted(os.listdir(tmp_path)) == ["s-00.tar", "s-00.tar" + SIDECAR]
    walked: list[str] = []
    original = ShardIndex.build.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(ShardIndex, "build", classmethod(lambda cls, p: walked.append(p) or original(cls, p)))
    assert ShardIndex.open(path) == first
    assert walked == []
    write(Path(path), [("new.txt", b"hello")])
    assert ShardIndex.open(path).keys == ["new"]
    os.utime(path, ns=(1, 1))  # same size, other time
    assert ShardIndex.open(path).mtime_ns == 1
    assert walked == [path, path]
    assert ShardIndex.open(path).keys == ["new"]
    assert walked == [path, path]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace(index.FORMAT, "other"),
        lambda text: text.replace('"txt":[512,', '"txt":[99999999,'),
        lambda text: text.replace('"keys":["dir/0-0",', '"keys":['),
        lambda text: text.replace('"members":[{', '"members":[7,{'),
    ],
)
def test_damaged_sidecar_is_made_again(tmp_path: Path, damage) -> None:
    path = make(tmp_path, 1)[0]
    whole, sidecar = ShardIndex.open(path), Path(path + SIDECAR)
    text = sidecar.read_text()
    assert damage(text) != text
    sidecar.write_text(damage(text))
    assert ShardIndex.open(path) == whole
    assert sidecar.read_text() == text


def test_index_goes_to_the_cache_where_the_folder_takes_none(tmp_path: Path) -> None:
    name = "x" * 250 + ".tar"  # the sidecar's name is too long for the file system: a write that fails, also for root
    path = write(tmp_path / name, [("a.txt", b"1")])
    cache = tmp_path / "cache"
    expected = ShardIndex.open(path, cache)
    (kept,) = cache.iterdir()
    assert ShardIndex.load(kept, path) == expected == ShardIndex.open(path, cache)
    assert ShardIndex.open(path) == expected  # nowhere to keep it: fine


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    path = make(tmp_path / "data", 1)[0]
    (tmp_path / "data").chmod(0o555)
    try:
        Shards([path], "txt", tmp_path / "cache")
        assert len(list((tmp_path / "cache").iterdir())) == 1
    finally:
        (tmp_path / "data").chmod(0o755)


def open_below(folder: Path) -> int:
    """Files below `folder` that this process holds open now."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the listing's own, gone by now
            count += os.readlink(link).startswith(f"{folder}/")
    return count


def test_many_threads_many_shards_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "OPEN_SHARDS", 2)
    paths = make(tmp_path, shards=9, samples=5)
    shards, expected = Shards(paths, "txt"), [sample["txt"] for sample in by_webdataset(paths)]
    order = [(v * 31 + t) % shards.n for t in range(8) for v in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shards.read, order)) == [expected[v] for v in order]
    assert open_below(tmp_path) <= 2
    shards.close()
    assert open_below(tmp_path) == 0


def test_shard_that_changes_under_the_run(tmp_path: Path) -> None:
    paths = make(tmp_path, 2)
    shards = Shards(paths, "txt")
    at = ShardIndex.open(paths[0]).members[6]["txt"][0]
    assert shards.read(6)
    os.truncate(paths[0], at + 10)  # while it is open
    with pytest.raises(DataError, match=rf"s-00\.tar: byte {at + 10}: sample 'dir/0-6': .* \d+ bytes are missing"):
        shards.read(6)
    os.utime(paths[1])
    with pytest.raises(DataError, match=r"s-01\.tar: was changed after it had been indexed"):
        shards.read(7)
    shards.close()
    os.unlink(paths[0])
    with pytest.raises(DataError, match=r"s-00\.tar.*No such file"):
        shards.read(0)


def test_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    here = Shards(make(tmp_path / "a"), "txt").fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    there = expand(str(tmp_path / "b" / "*.tar"))
    assert Shards(there, "txt").fingerprint == here
    assert Shards(there[:2], "txt").fingerprint != here
    assert Shards(there[::-1], "txt").fingerprint != here
    assert Shards(there, "seg.json").fingerprint != here
    assert Shards(make(tmp_path / "c", samples=6), "txt").fingerprint != here


def test_missing_field_and_empty_data(tmp_path: Path) -> None:
    paths = make(tmp_path)
    with pytest.raises(ConfigError, match=r"s-00\.tar: sample 'dir/0-0' has no 'png'; it has: seg\.json, txt") as error:
        Shards(paths, "png")
    assert len(error.value.problems) == 3
    empty = write(tmp_path / "empty.tar", [])
    with pytest.raises(ConfigError, match=r"no samples in .*empty\.tar"):
        Shards([empty], "txt")
    with pytest.raises(ConfigError, match=r"^data\.validation: no samples"):
        Shards.open(empty, "txt", key="data.validation")
    assert Shards([empty, *paths], "TXT").n == 21


def test_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make(tmp_path, 12, 1)
    monkeypatch.setenv("HOME", str(tmp_path))
    base = str(tmp_path)
    assert expand(f"{base}/s-{{00..11}}.tar") == paths
    assert expand(f"{base}/s-*.tar") == paths
    assert expand("~/s-0{3,1}.tar") == [paths[3], paths[1]]
    assert expand([paths[5], f"{base}/s-1?.tar"]) == [paths[5], paths[10], paths[11]]
    odd = shutil.copy(paths[0], f"{base}/a{{1..2}}[x].tar")
    assert expand(odd) == [odd]
    bad = [f"{base}/no-*.tar", f"{base}/s-{{10..13}}.tar", f"{base}/{{a", base, "s3://b/x.tar", paths[10]]
    with pytest.raises(ConfigError) as error:
        expand(bad, "data.validation")
    words = [
        "no file matches",
        "missing file",
        "missing file",
        "unbalanced",
        "is a folder",
        "only local files",
    ]
    words.append("listed twice")
    assert len(error.value.problems) == len(words)
    for problem, word in zip(error.value.problems, words, strict=True):
        assert problem.startswith("data.validation: ")
        assert word in problem
    with pytest.raises(ConfigError, match=r"^data\.shards: names no shard"):
        expand([])


def test_processes_that_index_at_once_agree(tmp_path: Path) -> None:
    path = make(tmp_path, 1, 50)[0]
    with ThreadPoolExecutor(8) as pool:
        indexes = list(pool.map(lambda _: ShardIndex.open(path), range(8)))
    assert all(found == indexes[0] for found in indexes)
    assert sorted(os.listdir(tmp_path)) == ["s-00.tar", "s-00.tar" + SIDECAR]
