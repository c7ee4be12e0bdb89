"""How fast samples come from the page cache, on one core: ours, webdataset, mosaicml-streaming and reading like `cat`.

    python benchmarks/stream.py        writes benchmarks/stream.json; about 6 minutes

Everybody fills batches: uint8 tensors [batch, bytes of a sample], shuffled but for `raw`, which copies the files into a
buffer from end to end. Rounds alternate between the readers; medians are kept. mosaicml-streaming takes part where it
is installed (`pip install --no-deps mosaicml-streaming catalogue brotli python-snappy cramjam zstd`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, IterableDataset

from trainer.data.bad_data import BadData
from trainer.data.batch_sizes import Batches
from trainer.data.mixture import Mixture
from trainer.data.ordered_samples import OrderedSamples
from trainer.data.shards import Shards
from trainer.data.storage import Storage
from trainer.data.stream import OrderedSource, RankStream, Stream
from trainer.data.tools.write import pack

WORKERS = (0, 1, 2)
SETS = {  # name: (samples, bytes of each, samples a batch)
    "token records of 5 KB": (24_000, 5_000, 64),
    "blobs of 100 KB": (2_400, 100_000, 16),
}
SHARD_BYTES = 32 << 20
ROUNDS, ROUND_S = 7, 0.7


def write(folder: Path, samples: int, size: int) -> None:
    """Writes the same random samples as tar shards and as MDS shards."""
    generator = random.Random(0)
    content = [generator.randbytes(size) for _ in range(samples)]
    pack(((f"{i:08d}", {"bin": payload}) for i, payload in enumerate(content)), folder / "tar", shard_bytes=SHARD_BYTES)
    if streaming := import_streaming():
        columns = {"bin": "bytes"}
        with streaming.MDSWriter(out=str(folder / "mds"), columns=columns, size_limit=SHARD_BYTES) as writer:
            for payload in content:
                writer.write({"bin": payload})


def import_streaming() -> Any:
    """Imports mosaicml-streaming, or returns None. Its vision part imports torchvision, which nothing here uses."""
    with suppress(ImportError):
        import torchvision  # noqa: F401
    if "torchvision" not in sys.modules:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional",
                     "torchvision.datasets", "torchvision.datasets.folder"):  # fmt: skip
            stand_in: Any = types.ModuleType(name)
            stand_in.__spec__, stand_in.__path__ = ModuleSpec(name, None), []
            stand_in.__getattr__ = lambda attribute: type(attribute, (), {})
            sys.modules[name] = stand_in
    try:
        import streaming
    except ImportError:
        return None
    return streaming


def stack(payloads: Sequence[Any]) -> torch.Tensor:
    """Makes a batch [samples, bytes], in the same way for all readers but our stream, which has its own."""
    return torch.frombuffer(bytearray().join(payloads), dtype=torch.uint8).view(len(payloads), -1)


class Raw:
    """Reads the shards from end to end into a buffer of 1 MiB, without parsing them."""

    def __init__(self, folder: Path, samples: int):
        self.paths = sorted((folder / "tar").glob("*.tar"))
        self.samples_per_byte = samples / sum(path.stat().st_size for path in self.paths)
        self.buffer = memoryview(bytearray(1 << 20))

    def __iter__(self) -> Iterator[float]:
        for path in itertools.cycle(self.paths):
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(self.buffer):
                    yield count * self.samples_per_byte


class Payloads:
    """Our samples as they lie in the shard: a `trainer.data.stream.Source`."""

    faults: Sequence[BadData] = ()

    def __init__(self, shards: Shards):
        self.shards, self.n, self.bytes = shards, shards.n, shards.bytes

    def read(self, unit: int, draw: int) -> dict[str, Any]:
        return {"bin": np.frombuffer(self.shards.read(unit), np.uint8)}

    def foresee(self, units: Sequence[int]) -> None:
        pass

    def entry(self, unit: int) -> Any:
        return self.shards.name(unit)


class Batched(IterableDataset):
    """Batches of any endless samples, made where they are read."""

    def __init__(self, samples: Any, batch: int):
        self.samples, self.batch = samples, batch

    def __iter__(self) -> Iterator[torch.Tensor]:
        samples = iter(self.samples)
        while True:
            yield stack([sample["bin"] for sample in itertools.islice(samples, self.batch)])


def read_with_trainer(
    folder: Path, batch: int, workers: int, *, mmap: bool, processes: bool = False
) -> Iterator[float]:
    """Reads with the trainer's stream."""
    storage = Storage(folder / "cache", mmap=mmap)
    shards = Shards.open(str(folder / "tar" / "*.tar"), "bin", storage)
    part = OrderedSource(Payloads(shards), lanes=4, window=8, seed=0)
    share = RankStream([part], Mixture([(0, [1.0])]), Batches(batch, {}), None, seed=0)
    stream = Stream(share, workers=workers, processes=processes)
    try:
        for data in stream:
            yield len(data.micro_batches[0]["bin"])
    finally:
        stream.close()


def read_as_stage(folder: Path, batch: int, workers: int, *, mmap: bool) -> Iterator[float]:
    """Reads with our stage for webdataset's pipelines, in torch's DataLoader."""
    storage = Storage(folder / "cache", mmap=mmap)
    samples = OrderedSamples(str(folder / "tar" / "*.tar"), seed=0, lanes=4, storage=storage)
    yield from sizes(Batched(samples, batch), workers)


def sizes(batches: IterableDataset, workers: int) -> Iterator[float]:
    """Yields how many samples each batch has. Without workers there is no DataLoader in between."""
    loader = DataLoader(batches, batch_size=None, num_workers=workers) if workers else batches
    yield from map(len, loader)


class Bulk(IterableDataset):
    """Batches of our stage's payloads."""

    def __init__(self, stage: OrderedSamples, batch: int):
        self.stage, self.batch = stage, batch

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from map(stack, self.stage.payloads("bin", self.batch))


def read_in_bulk(folder: Path, batch: int, workers: int, *, mmap: bool) -> Iterator[float]:
    """Reads lists of payloads from our stage."""
    storage = Storage(folder / "cache", mmap=mmap)
    stage = OrderedSamples(str(folder / "tar" / "*.tar"), seed=0, lanes=4, storage=storage)
    yield from sizes(Bulk(stage, batch), workers)


def read_with_webdataset(folder: Path, batch: int, workers: int) -> Iterator[float]:
    paths = sorted(map(str, (folder / "tar").glob("*.tar")))
    samples = webdataset.WebDataset(paths, shardshuffle=len(paths), seed=0).shuffle(1000).repeat()
    yield from sizes(Batched(samples, batch), workers)


def read_with_streaming(folder: Path, batch: int, workers: int) -> Iterator[float]:
    dataset = import_streaming().StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=batch)
    loader = DataLoader(
        dataset, batch_size=batch, num_workers=workers, collate_fn=lambda rows: stack([row["bin"] for row in rows])
    )
    while True:
        for tensor in loader:
            yield len(tensor)


def rate(samples: Iterator[float]) -> float:
    """Returns samples a second over `ROUND_S`, from where the iterator stands."""
    count, start = 0.0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < ROUND_S:
        count += next(samples)
    return count / elapsed


def measure(readers: dict[str, Callable[[], Iterator[float]]]) -> dict[str, float]:
    """Returns the median rate of each reader, in rounds that alternate; the start of an iterator is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(ROUNDS):
        for name, reader in readers.items():
            samples = reader()
            for _ in range(24):
                next(samples)
            rates[name].append(rate(samples))
            samples.close()  # type: ignore[attr-defined]
    return {name: statistics.median(rounds) for name, rounds in rates.items()}


def compare(folder: Path, samples: int, size: int, batch: int) -> dict[str, Any]:
    write(folder, samples, size)
    readers: dict[str, Callable[[], Iterator[float]]] = {"raw": lambda: iter(Raw(folder, samples))}
    for workers in WORKERS:
        suffix = f"{workers} workers" if workers else "no workers"
        makers: dict[str, Callable[[int], Iterator[float]]] = {
            "our stage in bulk, mmap": lambda w: read_in_bulk(folder, batch, w, mmap=True),
            "our stage in bulk": lambda w: read_in_bulk(folder, batch, w, mmap=False),
            "our stage, mmap": lambda w: read_as_stage(folder, batch, w, mmap=True),
            "our trainer's stream, mmap": lambda w: read_with_trainer(folder, batch, w, mmap=True),
            "our trainer's stream": lambda w: read_with_trainer(folder, batch, w, mmap=False),
            "webdataset": lambda w: read_with_webdataset(folder, batch, w),
        }
        if workers:
            makers["our trainer's stream, processes"] = lambda w: read_with_trainer(
                folder, batch, w, mmap=True, processes=True
            )
        if import_streaming():
            makers["mosaicml-streaming"] = lambda w: read_with_streaming(folder, batch, w)
        readers |= {f"{name}, {suffix}": lambda f=f, w=workers: f(w) for name, f in makers.items()}
    rates = measure(readers)
    plain = rates["webdataset, no workers"]
    return {
        name: {
            "samples_per_s": round(per_second),
            "mb_per_s": round(per_second * size / 1e6),
            "of_raw": round(per_second / rates["raw"], 3),
            "of_webdataset": round(per_second / plain, 2),
        }
        for name, per_second in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    out = parser.parse_args().out
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        for number, (name, (samples, size, batch)) in enumerate(SETS.items()):
            result[name] = compare(Path(scratch) / str(number), samples, size, batch)
            print(f"{name}\n{'':42}{'samples/s':>12}{'MB/s':>8}{'of raw':>8}{'of webdataset':>15}")
            for reader, numbers in result[name].items():
                print(
                    f"  {reader:40}{numbers['samples_per_s']:12,}{numbers['mb_per_s']:8,}{numbers['of_raw']:8.2f}"
                    f"{numbers['of_webdataset']:15.1f}"
                )
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
