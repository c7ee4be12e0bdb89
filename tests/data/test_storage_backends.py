"""The ways to remote bytes: S3 by obstore, and fsspec for other schemes and where obstore is not there."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.data.servers import Fault, Server, http_server, s3_server
from trainer.data.storage import Blob, Storage, urls
from trainer.data.storage.remote import RemoteBlob
from trainer.errors import ConfigError, DataError, Outage

CHUNK = 64 << 10
CONTENT = Random(2).randbytes(10 * CHUNK + 777)


@pytest.fixture
def server() -> Iterator[Server]:
    with http_server() as server:
        yield server


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return make(tmp_path)


@pytest.fixture
def no_obstore(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "obstore", None)
    urls._has_obstore.cache_clear()
    yield
    urls._has_obstore.cache_clear()


def make(folder: Path, **options: Any) -> Storage:
    return Storage(folder / "cache", cache_bytes=100 << 20, chunk_bytes=CHUNK, wait_s=0.01, **options)


def all_of(blob: Blob) -> bytes:
    return bytes(blob.read(0, blob.size))


# fsspec.


@pytest.mark.parametrize("kind", ["http", "s3a"])
def test_without_obstore_and_fsspec_it_is_said_what_to_install(
    tmp_path: Path, no_obstore: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    urls._fsspec_schemes.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"pip install 'onecurve\[remote\]'"):
            make(tmp_path).open(f"{kind}://host/a.tar")
        with pytest.raises(ConfigError, match="more with the package fsspec"):
            make(tmp_path).open("memory://a.tar")
    finally:
        urls._fsspec_schemes.cache_clear()


def test_other_schemes_are_read_by_fsspec(storage: Storage) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/a b.tar", CONTENT)
    blob = storage.open("memory://a b.tar")
    assert all_of(blob) == CONTENT
    assert blob.read(CHUNK - 1, 2) == CONTENT[CHUNK - 1 : CHUNK + 1]
    assert storage.stamp("memory://a b.tar") == blob.stamp
    memory.rm_file("/a b.tar")
    with pytest.raises(DataError, match=r"memory://a b\.tar: does not exist"):
        storage.open("memory://a b.tar")


def test_without_obstore_http_is_read_by_fsspec(server: Server, tmp_path: Path, no_obstore: None) -> None:
    url = server.put("a.tar", CONTENT)
    left = iter([Fault(status=500)] * 3)
    server.fault = lambda request: next(left, None)
    blob = make(tmp_path, timeout_s=0.3).open(url)
    server.once(Fault(status=503), Fault(after=5000), Fault(after=100, cut=False), Fault(status=0))
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(lambda i: blob.read(i * 50_000, 50_000), range(13)))
    assert b"".join(pieces) == CONTENT[:650_000]
    assert len(server.faults) == 7
    server.put("a.tar", CONTENT[::-1])
    assert all_of(make(tmp_path / "2").open(url)) == CONTENT[::-1]
    with pytest.raises(DataError, match="was changed after it had been opened"):
        blob.read(len(CONTENT) - 5, 5)


def test_without_obstore_failures_are_told_as_they_are(server: Server, tmp_path: Path, no_obstore: None) -> None:
    url = f"http://me:hush@{server.host}/a.tar?sig=hush"
    for status, problem, attempts in ((404, "does not exist", 1), (500, "answered 500", 2), (403, "answered 403", 1)):
        server.forget()
        server.fault = lambda request, status=status: Fault(status=status)  # type: ignore[misc]
        with pytest.raises(Outage if status == 500 else DataError, match=problem) as caught:
            make(tmp_path, retries=1).open(url)
        assert "hush" not in str(caught.value)
        assert len([request for request in server.requests if request.method == "GET"]) == attempts
    server.fault = lambda request: None
    server.put("a.tar", CONTENT)
    server.ranges = False
    with pytest.raises(DataError, match="does not send parts of files; with the package obstore it can be read"):
        make(tmp_path, retries=1).open(url)


def test_a_short_answer_is_no_part_of_the_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    content, cat, short = Random(3).randbytes(3 << 20), MemoryFileSystem.cat_file, [1000]

    def cat_file(self: Any, path: str, start: int, end: int) -> bytes:
        return cat(self, path, start=start, end=start + short.pop() if start == 1 << 20 and short else end)

    MemoryFileSystem().pipe_file("/short.tar", content)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    storage = Storage(tmp_path / "cache", cache_bytes=100 << 20, wait_s=0.01)
    assert all_of(storage.open("memory://short.tar")) == content
    assert not short
    assert all_of(storage.open("memory://short.tar")) == content  # as it was kept


def test_a_changed_object_is_another_whatever_its_file_system_tells(storage: Storage) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for content in (b"A" * 1000, b"B" * 1000):
        memory.pipe_file("/changes.tar", content)
        assert all_of(storage.open("memory://changes.tar")) == content


@pytest.mark.parametrize("by", ["obstore", "fsspec"])
def test_what_has_no_version_is_refused(
    server: Server, storage: Storage, by: str, request: pytest.FixtureRequest
) -> None:
    if by == "fsspec":
        request.getfixturevalue("no_obstore")
    url, server.etags["a.tar"] = server.put("a.tar", CONTENT), ""
    for server.ranges in (True, False):
        with pytest.raises(ConfigError, match=r"a\.tar: its server tells neither a version .* pipe:curl"):
            storage.open(url)


# Servers without ranges.


def test_a_whole_object_may_take_as_long_as_it_takes(server: Server, tmp_path: Path) -> None:
    url, server.ranges = server.put("a.tar", CONTENT), False
    server.fault = lambda request: Fault(slow_s=1.5)
    assert all_of(make(tmp_path, timeout_s=0.1, retries=0).open(url)) == CONTENT


def test_more_than_there_should_be_is_refused(server: Server, storage: Storage) -> None:
    url, server.ranges = server.put("a.tar", CONTENT), False
    blob = RemoteBlob(storage, url)
    blob.size -= 1
    with pytest.raises(DataError, match=f"byte {blob.size}: the server sends more than it said"):
        list(blob.whole())


# S3.


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    import boto3

    with pytest.MonkeyPatch.context() as patch, s3_server(patch):
        yield boto3.client("s3")


@pytest.mark.parametrize("key", ["a.tar", "in/deep/a b+c%41#?&.tar", "ü日.tar", ".a/..b"])
def test_s3_objects_are_read(s3: Any, storage: Storage, key: str) -> None:
    s3.put_object(Bucket="shards", Key=key, Body=CONTENT)
    blob = storage.open(f"s3://shards/{key}")
    assert blob.stamp == storage.stamp(blob.url)
    assert blob.read(CHUNK - 1, 2) == CONTENT[CHUNK - 1 : CHUNK + 1]
    assert all_of(blob) == CONTENT
    assert all_of(pickle.loads(pickle.dumps(blob))) == CONTENT


def test_a_changed_s3_object_is_named(s3: Any, storage: Storage) -> None:
    s3.put_object(Bucket="shards", Key="changed.tar", Body=CONTENT)
    blob = storage.open("s3://shards/changed.tar")
    assert blob.read(0, 5) == CONTENT[:5]
    s3.put_object(Bucket="shards", Key="changed.tar", Body=CONTENT[::-1])
    with pytest.raises(DataError, match=r"^s3://shards/changed\.tar: byte 65536: was changed after it had been opened"):
        blob.read(CHUNK, 5)


def test_what_s3_has_not_is_told_at_once(s3: Any, storage: Storage) -> None:
    for url in ("s3://shards/none.tar", "s3://nobody/a.tar"):
        with pytest.raises(DataError, match=f"^{url}: does not exist"):
            storage.open(url)
    for url in ("s3://shards/a//b.tar", "s3://shards/a/../b.tar"):
        with pytest.raises(DataError, match="keys without empty parts"):
            storage.open(url)


def test_without_obstore_s3_is_read_by_fsspec(s3: Any, storage: Storage, no_obstore: None) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3.put_object(Bucket="shards", Key="f s.tar", Body=CONTENT)
    blob = storage.open("s3://shards/f s.tar")
    assert all_of(blob) == CONTENT
    assert storage.stamp(blob.url) == blob.stamp
    with pytest.raises(DataError, match="does not exist"):
        storage.open("s3://shards/none.tar")
    s3fs.S3FileSystem.clear_instance_cache()
