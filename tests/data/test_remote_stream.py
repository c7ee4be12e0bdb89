"""The same shards from a folder, from a web server that fails all the time, and from S3: one ledger, equal batches."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from webdataset import TarWriter

from tests.data.servers import Fault, Request, Server, http_server, s3_server
from trainer.data.bad_data import BadData as Damage
from trainer.data.batch_sizes import Batches
from trainer.data.mixture import Mixture
from trainer.data.packing import Packed
from trainer.data.shards import Shards
from trainer.data.storage import Storage
from trainer.data.stream import OrderedSource, RankStream, Source, Stream
from trainer.data.tokenizer import ByteTokenizer
from trainer.data.tokens import TokenLine

COUNTS = [40, 1, 27, 60, 35]
STEPS, BATCH, LONGEST = 30, 12, 20_000  # more than two epochs


class Whole:
    """Each sample with all its bytes."""

    def __init__(self, shards: Shards):
        self.shards, self.n, self.bytes = shards, shards.n, shards.bytes
        self.faults: Sequence[Damage] = shards.faults

    def read(self, unit: int, draw: int) -> dict[str, Any]:
        members = {name: bytes(content) for name, content in self.shards.members(unit).items()}
        content = np.zeros(LONGEST, np.uint8)
        content[: len(members["bin"])] = np.frombuffer(members["bin"], np.uint8)
        return {"content": content, "sizes": np.array([len(members[name]) for name in ("bin", "txt")])}

    def foresee(self, units: Sequence[int]) -> None:
        self.shards.foresee(np.asarray(units, np.int64))

    def entry(self, unit: int) -> Any:
        return list(self.shards.name(unit))


def whole(shards: Shards, cache: Path) -> Source:
    return Whole(shards)


def texts(shards: Shards, cache: Path) -> Source:
    return Packed(TokenLine(shards, ByteTokenizer(), cache), 256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("shards"), Random(8)
    for number, count in enumerate(COUNTS):
        with TarWriter(str(folder / f"s-{number}.tar")) as tar:
            for i in range(count):
                content = random.randbytes(random.choice([0, 10, 3000, 9000, LONGEST]))
                text = "".join(random.choices("abc dé\nf日", k=random.choice([0, 5, 200, 900])))
                tar.write({"__key__": f"k{number}-{i:03d}", "bin": content, "txt": text})
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with http_server() as server:
        for path in folder.glob("*.tar"):
            server.put(path.name, path.read_bytes())
        yield server


class Trouble:
    """What goes wrong with the requests of a server: something with more than a third of them."""

    def __init__(self) -> None:
        self.random = Random(21)

    def __call__(self, request: Request) -> Fault | None:
        size, what = request.end - request.start, self.random.random()
        if what < 0.1:
            return Fault(status=self.random.choice([500, 502, 503, 429]))
        if what < 0.2:
            return Fault(after=self.random.randrange(size))
        if what < 0.25:
            return Fault(after=self.random.randrange(size), reset=True)
        if what < 0.3:
            return Fault(status=0)
        if what < 0.32:
            return Fault(after=self.random.randrange(size), cut=False)
        return Fault(slow_s=0.03) if what < 0.4 else None


def run(
    spec: str,
    cache: Path,
    make: Any,
    *,
    ranks: int = 2,
    workers: int = 2,
    cache_bytes: int = 50 << 20,
    lives: int = 3,
    storage: dict[str, Any] | None = None,
) -> list[tuple[int, list[Any], str]]:
    """(step, ledger entries in order, checksum of the batches' rows in order) of the first steps, in some lives."""
    options = {
        "cache_bytes": cache_bytes,
        "chunk_bytes": 16 << 10,
        "wait_s": 0.005,
        "timeout_s": 0.4,
        **(storage or {}),
    }
    opened = Shards.open(spec, "txt", Storage(cache, **options))
    steps = []
    for life in range(lives):
        streams = []
        for rank in range(ranks):
            shards = pickle.loads(pickle.dumps(opened))
            part = OrderedSource(make(shards, cache), 6, 3, 5, 4)
            share = RankStream([part], Mixture([(0, [1])]), Batches(BATCH), None, 5, rank, ranks, ledger=True)
            streams.append(Stream(share, workers=workers))
            streams[-1].seek(life * STEPS // lives)
        for _ in range(STEPS // lives):
            parts = [next(stream) for stream in streams]
            rows = [
                (number, entry, {name: tensor[i] for name, tensor in batch.items()})
                for part in parts
                for batch in part.micro_batches
                for i, (number, entry) in enumerate(part.entries)
            ]
            rows.sort(key=lambda row: row[0])
            steps.append((parts[0].step, [entry for _, entry, _ in rows], checksum([row for *_, row in rows])))
        for stream in streams:
            stream.close()
    return steps


def checksum(rows: list[dict[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for name, tensor in sorted(row.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def local(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What one process without any reading ahead gets from the folder."""
    return {
        make: run(f"{folder}/s-*.tar", tmp_path_factory.mktemp("cache"), make, ranks=1, workers=0, lives=1)
        for make in (whole, texts)
    }


@pytest.mark.parametrize(("make", "cache_bytes"), [(whole, 0), (whole, 50 << 20), (texts, 200_000), (texts, 50 << 20)])
def test_a_failing_server_gives_the_same_run(
    server: Server, tmp_path: Path, local: dict[Any, Any], make: Any, cache_bytes: int
) -> None:
    server.fault = Trouble()
    got = run(f"{server.url}/s-{{0..4}}.tar", tmp_path, make, cache_bytes=cache_bytes)
    print(  # -s: figures
        f"{make.__name__}, cache {cache_bytes}: {len(server.requests)} requests, {len(server.faults)} faults, "
        f"{server.sent} bytes sent, {server.sent_again} of them again"
    )
    assert got == local[make]
    assert [step for step, *_ in got] == list(range(1, STEPS + 1))
    assert len(server.faults) > len(server.requests) / 4 > 10
    assert cache_bytes == 200_000 or server.sent_again < 20_000  # what was cut off goes on where it was


@pytest.mark.parametrize("make", [whole, texts])
def test_s3_gives_the_same_run(
    folder: Path, tmp_path: Path, local: dict[Any, Any], make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    with s3_server(monkeypatch):
        for path in folder.glob("*.tar"):
            boto3.client("s3").upload_file(str(path), "shards", f"in/{path.name}")
        assert run("s3://shards/in/s-{0..4}.tar", tmp_path, make) == local[make]


def test_each_sample_comes_once_an_epoch(local: dict[Any, Any]) -> None:
    """Of the folder, to which the others are equal."""
    seen = [tuple(entry) for _, entries, _ in local[whole] for entry in entries]
    epoch = seen[: sum(COUNTS)]
    assert len(set(epoch)) == sum(COUNTS) < len(seen) / 2
    assert set(seen[sum(COUNTS) : 2 * sum(COUNTS)]) == set(epoch)
    assert len({checksum for *_, checksum in local[whole]}) == STEPS
