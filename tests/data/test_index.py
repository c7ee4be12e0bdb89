"""One shard's index against the webdataset library, its life in a file, and what is refused."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tars import by_webdataset, make, storage, write
from trainer.data import index
from trainer.data.index import SIDECAR, ShardIndex, key_and_extension
from trainer.data.storage.local import LocalBlob
from trainer.errors import DataError


def build(path: str, **options: bool) -> ShardIndex:
    return ShardIndex.build(LocalBlob(path), **options)


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
    found, content = build(path), Path(path).read_bytes()
    expected = [sample for sample in by_webdataset([path]) if sample["__key__"] != "a/"]  # of a hidden file
    assert found.keys == [sample["__key__"] for sample in expected]
    for i, sample in enumerate(expected):
        ours = {ext: content[at : at + size] for ext, (at, size) in found.members(i).items()}
        assert ours == {k: v for k, v in sample.items() if not k.startswith("__")}
        assert found.sizes()[i] == sum(map(len, ours.values()))
    offsets, sizes = found.field("txt")
    for i, sample in enumerate(expected):
        ours = content[offsets[i] : offsets[i] + sizes[i]] if offsets[i] >= 0 else None
        assert ours == sample.get("txt")


@given(st.text(alphabet="ab./_A\n", max_size=9))
@settings(max_examples=500, deadline=None)
def test_names_split_as_webdataset_does(name: str) -> None:
    base, extension = webdataset.tariterators.base_plus_ext(name)
    expected = None if base is None or name.startswith("__") else (base, extension.lower())
    found = key_and_extension(name)
    if name.rpartition("/")[2].startswith("."):
        assert found is None
        return
    assert found == expected or (name.startswith("__") and found == (base, extension.lower()))


def test_a_long_name_takes_no_long_time() -> None:
    """Tar allows 1 MiB of it; what tries every pair of slashes would be at it for an hour."""
    assert key_and_extension("/" * (1 << 20)) is None
    assert key_and_extension("a/" * (1 << 19) + "b.TXT") == ("a/" * (1 << 19) + "b", "txt")


def test_what_a_mac_adds_belongs_to_no_sample(tmp_path: Path) -> None:
    """AppleDouble files and folder settings, in an archive of a folder as `tar` on a Mac makes it."""
    members = [("data/.DS_Store", b"\0\0\0\1Bud1"), ("./._b.txt", b"\0\5\x16\7")]
    for i in range(3):
        members += [(f"data/._{i}.txt", b"\0\5\x16\7"), (f"data/{i}.txt", b"text"), (f"data/{i}.cls", b"1")]
    found = build(write(tmp_path / "mac.tar", members))
    assert found.keys == [f"data/{i}" for i in range(3)]
    assert found.extensions == ["txt", "cls"]


INTERLEAVED = [("0.a", b""), ("1.a", b""), ("0.b", b"")]
DOUBLE = [("9.a", b""), ("0.a", b"12"), ("0.A", b"34")]


def test_interleaved_and_duplicate_members_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.tar: byte 1536: key '0' comes back") as error:
        build(write(tmp_path / "a.tar", INTERLEAVED))
    assert (error.value.shard, error.value.key, error.value.byte) == (str(tmp_path / "a.tar"), "0", 1536)
    with pytest.raises(DataError, match=r"b\.tar: byte 2048: key '0' has a second member 'a'"):
        build(write(tmp_path / "b.tar", DOUBLE))


def test_tolerance_keeps_what_is_certainly_whole(tmp_path: Path) -> None:
    """The samples before the damage, but not one whose members may go on behind it."""
    kept = build(write(tmp_path / "a.tar", INTERLEAVED), tolerant=True)
    assert (kept.keys, kept.fault and kept.fault.byte) == ([], 1536)  # sample 0 is scattered, and 1 comes behind it
    kept = build(write(tmp_path / "b.tar", DOUBLE), tolerant=True)
    assert (kept.keys, kept.fault and kept.fault.key) == (["9"], "0")
    path = make(tmp_path, 1)[0]
    whole = build(path)
    content = bytearray(Path(path).read_bytes())
    content[whole.members(4)["seg.json"][0] - 512] ^= 1  # the header of the fifth sample's second member
    Path(path).write_bytes(content)
    kept = build(path, tolerant=True)
    assert kept.keys == whole.keys[:4]
    assert [kept.members(i) for i in range(4)] == [whole.members(i) for i in range(4)]
    assert kept.fault is not None
    assert "damaged header" in kept.fault.cause
    os.truncate(path, whole.members(3)["txt"][0] + 1)
    assert build(path, tolerant=True).keys == whole.keys[:3]


def test_damage_names_shard_and_byte(tmp_path: Path) -> None:
    path = make(tmp_path)[1]
    content = bytearray(Path(path).read_bytes())
    second = build(path).members(2)["txt"][0] - 512
    content[second + 3] ^= 1
    Path(path).write_bytes(content)
    with pytest.raises(DataError, match=rf"s-01\.tar: byte {second}: damaged header .*'dir/1-1\.seg\.JSON'"):
        build(path)


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that were walked, as they are."""
    found: list[str] = []
    original = ShardIndex.build.__func__  # type: ignore[attr-defined]

    def watched(cls: type[ShardIndex], blob: LocalBlob, **options: bool) -> ShardIndex:
        found.append(blob.url)
        return original(cls, blob, **options)

    monkeypatch.setattr(ShardIndex, "build", classmethod(watched))
    return found


def test_sidecar_is_written_used_and_renewed(tmp_path: Path, walked: list[str]) -> None:
    path, kept = make(tmp_path, 1)[0], storage(tmp_path / "c")
    first = ShardIndex.open(path, kept)
    assert sorted(os.listdir(tmp_path)) == ["s-00.tar", "s-00.tar" + SIDECAR]
    again = ShardIndex.open(path, kept)
    assert again == first
    assert again.keys == first.keys
    assert [again.members(i) for i in range(7)] == [first.members(i) for i in range(7)]
    assert index.summary(path, kept) == first.summary
    assert walked == [path]
    write(Path(path), [("new.txt", b"hello")])
    assert index.summary(path, kept) is None
    assert ShardIndex.open(path, kept).keys == ["new"]
    os.utime(path, ns=(1, 1))  # same size, other time
    assert ShardIndex.open(path, kept).summary.digest == build(path).summary.digest
    assert ShardIndex.open(path, kept).keys == ["new"]
    assert walked == [path] * 4  # one of them is `build` here


@pytest.mark.parametrize("at", [0, 5, 100, 300, -1, -40, "half", "nothing", "other"])
def test_damaged_sidecar_is_made_again(tmp_path: Path, at: int | str) -> None:
    path, kept = make(tmp_path, 1)[0], storage(tmp_path / "c")
    whole, sidecar = ShardIndex.open(path, kept), Path(path + SIDECAR)
    content = bytearray(sidecar.read_bytes())
    damaged: bytes = content.replace(index.FORMAT.encode(), b"onecurve-index-9")
    if at in ("half", "nothing"):
        damaged = content[: len(content) // 2] if at == "half" else b""
    elif isinstance(at, int):
        damaged = bytearray(content)
        damaged[at] ^= 4
    assert damaged != content
    sidecar.write_bytes(damaged)
    assert ShardIndex.load_stored(path, kept) is None
    assert ShardIndex.open(path, kept) == whole
    assert sidecar.read_bytes() == content


def test_fault_is_kept_and_looked_at_again_when_it_matters(tmp_path: Path, walked: list[str]) -> None:
    path, kept = make(tmp_path, 1)[0], storage(tmp_path / "c")
    os.truncate(path, 9000)
    found = ShardIndex.open(path, kept, tolerant=True)
    assert found.fault is not None
    again = index.summary(path, kept)
    assert again is not None
    assert again.fault == found.fault
    assert len(walked) == 1
    with pytest.raises(DataError, match=r"s-00\.tar: byte \d+"):
        ShardIndex.open(path, kept)
    (place,) = (tmp_path / "c" / "cache" / "indexes").rglob("*.index")
    moved = ShardIndex.load(place, "elsewhere.tar", found.stamp)
    assert moved is not None
    assert moved.fault is not None
    assert moved.fault.cause.startswith("elsewhere.tar: byte ")


def test_damage_does_not_replace_what_is_known_of_the_whole_shard(tmp_path: Path) -> None:
    path, kept = make(tmp_path, 1)[0], storage(tmp_path / "c")
    whole = ShardIndex.open(path, kept)
    content = Path(path).read_bytes()
    os.truncate(path, 9000)
    found = ShardIndex.open(path, kept, tolerant=True)
    assert found.fault is not None
    assert 0 < len(found.keys) < 7
    assert ShardIndex.load_former(path, kept, whole.summary) == whole
    assert whole.truncate(len(found.keys)).summary.digest == found.summary.digest
    Path(path).write_bytes(content)
    assert ShardIndex.open(path, kept).summary.digest == whole.summary.digest
    assert ShardIndex.load_former(path, kept, found.summary) == found


def test_index_goes_to_the_cache_where_the_folder_takes_none(tmp_path: Path) -> None:
    name = "x" * 250 + ".tar"  # the sidecar's name is too long for the file system: a write that fails, also for root
    path, kept = write(tmp_path / name, [("a.txt", b"1")]), storage(tmp_path)
    expected = ShardIndex.open(path, kept)
    (file,) = (tmp_path / "cache" / "indexes").iterdir()
    assert ShardIndex.load(file, path, expected.stamp) == expected == ShardIndex.open(path, kept)
    (tmp_path / "file").touch()
    assert ShardIndex.open(path, storage(tmp_path / "file")) == expected  # nowhere to keep it: fine


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    path = make(tmp_path / "data", 1)[0]
    (tmp_path / "data").chmod(0o555)
    try:
        ShardIndex.open(path, storage(tmp_path))
        assert len(list((tmp_path / "cache" / "indexes").iterdir())) == 1
    finally:
        (tmp_path / "data").chmod(0o755)


def test_processes_that_index_at_once_agree(tmp_path: Path) -> None:
    path = make(tmp_path, 1, 50)[0]
    with ThreadPoolExecutor(8) as pool:
        indexes = list(pool.map(lambda _: ShardIndex.open(path, storage(tmp_path / "c")), range(8)))
    assert all(found == indexes[0] for found in indexes)
    assert sorted(os.listdir(tmp_path)) == ["s-00.tar", "s-00.tar" + SIDECAR]
