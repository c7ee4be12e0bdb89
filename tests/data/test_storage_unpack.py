"""What is read from front to back once: compressed shards, and outputs of commands."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from filelock import FileLock

from tests.data.servers import Fault, Server, http_server
from trainer.data.storage import Storage, unpack
from trainer.errors import ConfigError, DataError

CONTENT = Random(4).randbytes(700_000) + bytes(100_000) + Random(5).randbytes(3)
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".tar.gz": gzip.compress, ".tgz": gzip.compress, ".tar.bz2": bz2.compress,
    ".tar.xz": lambda content: lzma.compress(content, preset=0),
}  # fmt: skip


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "cache", allow_pipe=True, cache_bytes=50 << 20, wait_s=0.01, chunk_bytes=64 << 10)


@pytest.fixture
def server() -> Iterator[Server]:
    with http_server() as server:
        yield server


def kept(storage: Storage) -> list[Path]:
    return sorted((storage.cache / "unpacked").glob("*.tar"))


def all_of(storage: Storage, url: str) -> bytes:
    blob = storage.open(url)
    return bytes(blob.read(0, blob.size))


# Compressed shards.


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_compressed_shard_is_unpacked_once(tmp_path: Path, suffix: str, mmap: bool) -> None:
    path, storage = tmp_path / f"A{suffix.upper()}", Storage(tmp_path / "cache", mmap=mmap)
    path.write_bytes(PACK[suffix](CONTENT))
    blob = storage.open(str(path))
    assert (blob.size, blob.url, blob.stamp) == (len(CONTENT), str(path), storage.stamp(str(path)))
    assert bytes(blob.read(699_990, 100)) == CONTENT[699_990:700_090]
    (made,) = kept(storage)
    before = made.stat()
    again = storage.open(str(path))
    assert bytes(again.read(0, again.size)) == CONTENT
    assert made.stat() == before
    blob.close()  # and opens again, though others opened it too
    assert bytes(pickle.loads(pickle.dumps(blob)).read(5, 5)) == bytes(blob.read(5, 5)) == CONTENT[5:10]


@pytest.mark.parametrize("suffix", PACK)
def test_several_members_and_padding_are_read_as_gzip_reads_them(tmp_path: Path, storage: Storage, suffix: str) -> None:
    pack, path = PACK[suffix], tmp_path / f"a{suffix}"
    path.write_bytes(pack(CONTENT[:5]) + pack(b"") + pack(CONTENT[5:]) + bytes(1000))
    assert all_of(storage, str(path)) == CONTENT


@pytest.mark.parametrize("suffix", PACK)
def test_a_truncated_compressed_shard_is_refused(tmp_path: Path, storage: Storage, suffix: str) -> None:
    path, packed = tmp_path / f"a{suffix}", PACK[suffix](CONTENT)
    for size in (0, 3, len(packed) // 2, len(packed) - 1):
        path.write_bytes(packed[:size])
        with pytest.raises(DataError, match=rf"/a{suffix}: byte {size}: the compressed file ends here") as caught:
            storage.open(str(path))
        assert (caught.value.shard, caught.value.byte) == (str(path), size)
    assert kept(storage) == []
    assert list((storage.cache / "unpacked").glob(".*.tmp")) == []
    path.write_bytes(packed)
    assert all_of(storage, str(path)) == CONTENT


@pytest.mark.parametrize("suffix", PACK)
def test_a_damaged_compressed_shard_is_refused(tmp_path: Path, storage: Storage, suffix: str) -> None:
    path, packed = tmp_path / f"a{suffix}", PACK[suffix](CONTENT)
    for place in (0, 400_000, len(packed) - 3):
        damaged = bytearray(packed)
        damaged[place : place + 3] = b"\xff\x00\xff"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"/a{suffix}: byte \d+: damaged compressed data") as caught:
            storage.open(str(path))
        assert caught.value.byte is not None
        assert place - 300_000 < caught.value.byte <= len(packed)
    path.write_bytes(packed + b"rubbish")
    with pytest.raises(DataError, match=rf"/a{suffix}: byte ({len(packed)}|{len(packed) + 1}): damaged"):
        storage.open(str(path))
    assert kept(storage) == []


def test_the_byte_that_a_gzip_is_damaged_at_is_told(tmp_path: Path, storage: Storage) -> None:
    path, packed = tmp_path / "a.tar.gz", bytearray(gzip.compress(CONTENT))
    packed[-8:-4] = b"crc!"
    path.write_bytes(packed)
    with pytest.raises(DataError, match=f"byte {len(packed) - 5}: damaged compressed data: .*incorrect data check"):
        storage.open(str(path))


def test_a_changed_compressed_shard_is_unpacked_anew_and_old_ones_go(tmp_path: Path, storage: Storage) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(CONTENT))
    blob = storage.open(str(path))
    path.write_bytes(gzip.compress(CONTENT[::-1]))
    os.utime(path, (1, 1))
    assert storage.stamp(str(path)) != blob.stamp
    assert all_of(storage, str(path)) == CONTENT[::-1]
    assert len(kept(storage)) == 2  # another run may still read the old one
    old = time.time() - unpack.UNUSED_S - 10
    for noted in (storage.cache / "unpacked").glob("*.json"):
        os.utime(noted, (old, old))
    (left,) = {Path(noted.parent, f".{noted.name.partition('-')[0]}-of-another-version.tmp") for noted in kept(storage)}
    for name, age in ((left, old), (left.with_stem(f"{left.stem}-2"), time.time())):
        name.touch()  # as one leaves it that is killed while unpacking a version that there will not be again
        os.utime(name, (age, age))
    path.write_bytes(gzip.compress(CONTENT + b"x"))
    assert all_of(storage, str(path)) == CONTENT + b"x"
    assert len(kept(storage)) == 1
    assert not left.exists()
    assert len(list(left.parent.glob(".*.tmp"))) == 1  # of one that may be at work


def test_what_is_whole_is_opened_without_waiting_or_writing(tmp_path: Path, storage: Storage) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(CONTENT))
    storage.open(str(tmp_path / "a.tar.gz"))
    (made,) = kept(storage)
    with FileLock(made.with_suffix(".lock")), ThreadPoolExecutor(1) as pool:
        assert pool.submit(all_of, storage, str(tmp_path / "a.tar.gz")).result(5) == CONTENT
    made.with_suffix(".lock").unlink()
    assert all_of(storage, str(tmp_path / "a.tar.gz")) == CONTENT
    assert not made.with_suffix(".lock").exists()


def test_a_power_cut_leaves_nothing_that_looks_whole(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk for certain when it gets its name, and no former facts of it are there."""
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(CONTENT))
    storage.open(str(tmp_path / "a.tar.gz"))
    (made,) = kept(storage)
    os.truncate(made, 5)
    certain, names, fsync, rename = [], [], os.fsync, os.rename

    def renamed(old: Path, new: Path) -> None:
        if new == made:
            assert certain[-1] == old.stat().st_ino
            assert not made.with_suffix(".json").exists()
        names.append(new)
        rename(old, new)

    monkeypatch.setattr(os, "fsync", lambda file: (certain.append(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "rename", renamed)
    assert all_of(storage, str(tmp_path / "a.tar.gz")) == CONTENT
    assert names == [made, made.with_suffix(".json")]


def test_an_unpacked_file_that_is_not_whole_is_made_anew(tmp_path: Path, storage: Storage) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(CONTENT))
    storage.open(str(path))
    (made,) = kept(storage)
    for damage in (
        lambda: os.truncate(made, 1000),
        lambda: made.unlink(),
        lambda: made.with_suffix(".json").unlink(),
        lambda: made.with_suffix(".json").write_text("{"),
        lambda: made.with_suffix(".json").write_text("[]"),
    ):
        damage()
        assert all_of(storage, str(path)) == CONTENT


def test_many_processes_and_threads_unpack_it_once(tmp_path: Path, storage: Storage) -> None:
    url, count = f"pipe:echo >> {tmp_path}/count; sleep 0.2; head -c 1000 /dev/zero", tmp_path / "count"
    script = f"import pickle, sys; print(pickle.loads({pickle.dumps(storage)!r}).open({url!r}).size)"
    runs = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        assert [blob.size for blob in pool.map(storage.open, [url] * 4)] == [1000] * 4
    assert [run.communicate()[0] for run in runs] == [b"1000\n"] * 2
    assert count.read_text() == "\n"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_remote_compressed_shard(server: Server, storage: Storage, ranges: bool) -> None:
    """Also one of a server without ranges, which is kept packed and unpacked."""
    packed = gzip.compress(CONTENT)
    url, server.ranges = server.put("a.tar.gz", packed), ranges
    server.once(None, Fault(after=30_000), Fault(status=500), Fault(after=10))
    blob = storage.open(f"{url}?sig=hush.txt")
    assert bytes(blob.read(0, blob.size)) == CONTENT
    assert blob.stamp == storage.stamp(blob.url)
    assert server.sent_again == 0 or not ranges
    assert list((storage.cache / "chunks").glob("*/*")) == []  # it goes into the cache once, not twice
    server.put("b.tar.gz", packed[:-10])
    with pytest.raises(DataError, match=rf"/b\.tar\.gz\?\*\*\*: byte {len(packed) - 10}: the compressed"):
        storage.open(f"{server.url}/b.tar.gz?sig=hush")


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(CONTENT))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"data\.cache=.*/file: .*a\.tar\.gz cannot be unpacked there: Not a"):
        Storage(tmp_path / "file").open(str(tmp_path / "a.tar.gz"))


def test_zst_says_what_to_do(tmp_path: Path, storage: Storage) -> None:
    (tmp_path / "a.tar.zst").write_bytes(b"x")
    if sys.version_info < (3, 14):
        with pytest.raises(ConfigError, match="pipe:zstd -dc FILE"):
            storage.open(str(tmp_path / "a.tar.zst"))


# Commands.


def test_the_output_of_a_command_is_kept_and_stamped_by_its_content(tmp_path: Path, storage: Storage) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    url = f"pipe:echo >> {tmp_path}/count; cat {shlex.quote(str(path))} | cat"
    blob = storage.open(url)
    assert (blob.url, blob.size, blob.stamp) == (url, len(CONTENT), storage.stamp(url))
    assert bytes(blob.read(100, 50)) == CONTENT[100:150]
    assert all_of(storage, url) == CONTENT
    assert (tmp_path / "count").read_text() == "\n"
    for content, same in ((CONTENT, True), (CONTENT[:-1] + b"\0", False)):  # another run: the command runs anew
        path.write_bytes(content)
        other = Storage(storage.cache, allow_pipe=True, pipes=f"run {same}")
        assert (other.open(url).stamp == blob.stamp) is same
    assert bytes(blob.read(0, blob.size)) == CONTENT


@pytest.mark.parametrize(
    ("command", "byte", "problem"),
    [
        ("exit 3", 0, "ended with code 3"),
        ("cat /none/at/all", 0, "ended with code 1: cat: /none/at/all: No such file"),
        ("head -c 70000 /dev/zero; echo first >&2; echo token=hush >&2; exit 7", 70000, "code 7: first | token=***"),
        ("head -c 70000 /dev/zero; kill -9 $$", 70000, "was killed by signal 9"),
        ("nosuchcommand --password hush", 0, "ended with code 127: "),
    ],
)
def test_a_command_that_fails_is_refused(storage: Storage, command: str, byte: int, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        storage.open(f"pipe:{command}")
    assert f": byte {byte}: the command " in str(caught.value)
    assert problem in str(caught.value)
    assert str(caught.value).startswith(f"pipe:{command[:4]}")
    assert caught.value.byte == byte
    assert "hush" not in f"{caught.value}{caught.value.shard}"
    assert kept(storage) == []


def test_a_command_reads_nothing_from_us(storage: Storage) -> None:
    assert all_of(storage, "pipe:wc -c") == b"0\n"


SCRIPT = """
import sys, threading, time
from pathlib import Path
from trainer.data.storage import Storage
storage = Storage(Path(sys.argv[1]), allow_pipe=True)
threading.Thread(target=storage.open, args=(sys.argv[2],), daemon=True).start()
while not Path(sys.argv[1], "pid").exists() or not Path(sys.argv[1], "pid").read_text():
    time.sleep(0.01)
print("ready", flush=True)
"""


def slow_command(folder: Path) -> str:
    return f"pipe:echo $$ > {folder}/pid; head -c 3000000 /dev/zero; test -e {folder}/go || sleep 60 | cat"


def test_a_running_command_ends_with_the_interpreter(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, slow_command(tmp_path)], capture_output=True, timeout=20
    )
    assert (done.returncode, done.stdout) == (0, b"ready\n"), done.stderr
    assert time.monotonic() - begun < 10
    assert_gone(int((tmp_path / "pid").read_text()))


def test_what_a_killed_process_left_is_made_anew(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", SCRIPT + "time.sleep(60)", tmp_path, slow_command(tmp_path)]
    run = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    assert run.stdout is not None
    run.stdout.readline()
    run.kill()
    run.communicate()
    os.killpg(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert len(list((tmp_path / "unpacked").glob(".*.tmp"))) == 1
    (tmp_path / "go").touch()
    assert all_of(Storage(tmp_path, allow_pipe=True), slow_command(tmp_path)) == bytes(3_000_000)
    assert list((tmp_path / "unpacked").glob(".*.tmp")) == []


def assert_gone(pid: int) -> None:
    end = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
