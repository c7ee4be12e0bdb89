"""Where the samples of a remote shard lie: told by the index beside it, or found out from the headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from launch.submit import _check_data
from tests.data.servers import Server, http_server
from tests.data.tars import write
from trainer.config.compose import load
from trainer.data.index import SIDECAR, ShardIndex
from trainer.data.shards import Shards
from trainer.data.storage import Storage
from trainer.data.tools.write import pack

SHARDS = 3


@pytest.fixture
def server() -> Iterator[Server]:
    with http_server() as server:
        yield server


@pytest.fixture
def packed(tmp_path: Path) -> list[Path]:
    """Shards of about 1 MB with their indexes; some names need a header of their own."""
    random = Random(1)
    samples = ((f"{'long/' * 30 * (i % 7 == 0)}{i:04d}", {"jpg": random.randbytes(20_000)}) for i in range(150))
    pack(samples, tmp_path / "packed", shard_bytes=1 << 20)
    paths = sorted((tmp_path / "packed").glob("*.tar"))
    assert len(paths) == SHARDS
    return paths


def put(server: Server, paths: list[Path], index: bool = True) -> list[str]:
    for path in paths if index else []:
        server.put(f"{path.name}{SIDECAR}", Path(f"{path}{SIDECAR}").read_bytes())
    return [server.put(path.name, path.read_bytes()) for path in paths]


def test_an_index_beside_a_remote_shard_is_read_instead_of_the_shard(
    server: Server, packed: list[Path], tmp_path: Path
) -> None:
    urls, size = put(server, packed), sum(path.stat().st_size for path in packed)
    local = Shards.open(list(map(str, packed)), "jpg", Storage(tmp_path / "here"))
    for node in ("one", "another"):  # each has a cache of its own
        server.forget()
        shards = Shards.open(urls, "jpg", Storage(tmp_path / node))
        assert server.sent < size / 50
        assert shards.fingerprint == local.fingerprint
        assert shards.read(140) == local.read(140)
        assert [shards.name(v) for v in range(shards.n)] == [local.name(v) for v in range(local.n)]
    server.forget()
    Shards.open(urls, "jpg", Storage(tmp_path / "one"))
    assert not [request for request in server.requests if SIDECAR in request.path]  # it is kept


@pytest.mark.parametrize("wrong", ["of another shard", "of another size", "cut short", "no index"])
def test_an_index_that_does_not_fit_is_ignored(server: Server, packed: list[Path], tmp_path: Path, wrong: str) -> None:
    (url,) = put(server, packed[:1])
    content = server.objects[f"{packed[0].name}{SIDECAR}"]
    if wrong == "of another shard":  # of this size, with its members elsewhere
        names = [(f"{i:02d}.jpg", bytes(packed[0].stat().st_size // 2 // 10)) for i in range(10)]
        other = write(tmp_path / "other.tar", names)
        with open(other, "ab") as file:
            file.truncate(packed[0].stat().st_size)
        index = ShardIndex.open(other, Storage(tmp_path / "other"))
        assert index.size == packed[0].stat().st_size
        content = Path(other + SIDECAR).read_bytes()
    elif wrong == "of another size":
        small = write(tmp_path / "small.tar", [("a.jpg", b"small")])
        ShardIndex.open(small, Storage(tmp_path / "small"))
        content = Path(f"{small}{SIDECAR}").read_bytes()
    elif wrong == "cut short":
        content = content[:-9]
    else:
        content = b"<html>not found</html>"
    server.put(f"{packed[0].name}{SIDECAR}", content)
    shards = Shards.open(url, "jpg", Storage(tmp_path / "cache"))
    local = Shards.open(str(packed[0]), "jpg", Storage(tmp_path / "here"))
    assert shards.fingerprint == local.fingerprint
    assert shards.read(shards.n - 1) == local.read(local.n - 1)


def test_of_large_members_the_headers_alone_are_fetched(server: Server, tmp_path: Path) -> None:
    """Not the chunks that they lie in."""
    content = Random(2).randbytes(3 << 20)
    path = write(tmp_path / "a.tar", [(f"{i}.mp4", content) for i in range(8)])
    url = server.put("a.tar", Path(path).read_bytes())
    shards = Shards.open(url, "mp4", Storage(tmp_path / "cache", chunk_bytes=1 << 20))
    assert shards.n == 8
    assert server.sent < 3 << 20
    assert shards.read(7) == content


def test_submit_looks_at_one_remote_shard(
    server: Server, packed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine that one logs in on is not to download the data set."""
    monkeypatch.chdir(tmp_path)
    texts = [write(tmp_path / f"t-{i}.tar", [("a.txt", b"some text" * 9)]) for i in range(9)]
    urls = put(server, [Path(path) for path in texts], index=False)
    data = ["data=webdataset", f"data.cache={tmp_path}/cache", f"data.validation={urls[0]}"]
    _check_data(load(["experiment=smoke", *data, f"data.shards={server.url}/t-{{0..8}}.tar"]))
    assert {request.path.removesuffix(SIDECAR) for request in server.requests} == {"/t-0.tar"}
    server.forget()
    sources = f"{{a: {{shards: '{server.url}/t-{{1..3}}.tar', weight: 1}}, b: {{shards: {texts[5]}, weight: 1}}}}"
    _check_data(load(["experiment=smoke", *data, "data.shards=null", f"data.sources={sources}"]))
    assert {request.path.removesuffix(SIDECAR) for request in server.requests} == {"/t-0.tar", "/t-1.tar"}
