"""The stage in other people's loaders: passes, workers that come and go or stay, mapped files, servers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import webdataset
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.data.ordered_shards import SIZES, N, make, shards
from tests.data.servers import http_server
from trainer.data.ordered_samples import OrderedSamples
from trainer.data.pipeline import OrderedPipeline
from trainer.data.storage import Storage

__all__ = ["shards"]  # a fixture


def keys(samples: Iterable[dict[str, Any]], count: int | None = None) -> list[str]:
    return [sample["__key__"] for sample in islice(samples, count)]


def plain(source: OrderedSamples, workers: int = 2, **options: Any) -> Iterable[dict[str, Any]]:
    return DataLoader(source, batch_size=None, num_workers=workers, **options)


def by_torchdata(source: OrderedSamples, workers: int = 2, **options: Any) -> Iterable[dict[str, Any]]:
    return StatefulDataLoader(source, batch_size=None, num_workers=workers, **options)


def by_webdataset(source: OrderedSamples, workers: int = 2, **options: Any) -> Iterable[dict[str, Any]]:
    pipeline = webdataset.DataPipeline(source, webdataset.decode())
    return webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers, **options)


def by_webdatasets_epochs(source: OrderedSamples, workers: int = 2, **options: Any) -> Iterable[dict[str, Any]]:
    """Which ends a pass by not asking for what follows its last sample."""
    return by_webdataset(source, workers, **options).with_epoch(9)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("loader", [plain, by_torchdata, by_webdataset, by_webdatasets_epochs])
def test_passes_follow_one_another(shards: list[str], loader: Any, persistent: bool) -> None:
    """In one order, whatever is prefetched; 9 samples are not as many for each of two workers."""
    passes = loader(make(shards, epoch_length=9), persistent_workers=persistent)
    assert [key for _ in range(4) for key in keys(passes)] == keys(make(shards), 36)


@pytest.mark.parametrize("persistent", [False, True])
def test_webdatasets_epochs_follow_one_another(shards: list[str], persistent: bool) -> None:
    """`with_epoch`, of which each worker takes as many samples."""
    pipeline = webdataset.DataPipeline(make(shards), webdataset.decode()).with_epoch(5)
    loader = DataLoader(pipeline, batch_size=None, num_workers=2, persistent_workers=persistent)
    assert [key for _ in range(3) for key in keys(loader)] == keys(make(shards), 30)


def test_passes_with_other_numbers_of_workers(shards: list[str]) -> None:
    source = make(shards, epoch_length=8)
    found = [keys(plain(source, workers), 8) for workers in (2, 0, 3, 2, 1)]
    assert [key for one in found for key in one] == keys(make(shards), 40)
    assert source.state_dict()["taken"] == 40
    again = make(shards)
    again.load_state_dict(source.state_dict())
    assert keys(plain(again, 2), 5) == keys(make(shards), 45)[40:]
    source.load_state_dict(make(shards).state_dict())  # back to the start
    assert keys(plain(source, 3)) == keys(make(shards), 8)


def test_passes_of_ranks_and_workers(shards: list[str]) -> None:
    """Two ranks of two workers each, in three passes: the first samples of the run, each once."""
    ranks = [plain(make(shards, rank=rank, world_size=2, epoch_length=6)) for rank in range(2)]
    found = [[keys(rank) for _ in range(3)] for rank in ranks]
    merged = [key for passes in zip(*found, strict=True) for pair in zip(*passes, strict=True) for key in pair]
    assert merged == keys(make(shards), 36)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_pass_that_is_broken_off_repeats_nothing(shards: list[str], persistent: bool) -> None:
    """What was prefetched is lost, no more; the next pass ends this one, and those after it are whole."""
    loader = plain(make(shards, epoch_length=12), persistent_workers=persistent, prefetch_factor=2)
    first, rest = keys(loader, 5), keys(loader)
    expected = keys(make(shards), 24)
    assert first == expected[:5]
    assert set(rest) <= set(expected[5:12])
    assert len(rest) >= 12 - 5 - 2 * 2 - 1
    assert keys(loader) == expected[12:]


def test_stateful_dataloader_resumes_within_and_between_passes(shards: list[str]) -> None:
    """Passes of 5 in two workers, one of which has no sample left where the other one has."""
    expected = keys(make(shards), 15)
    for taken in (4, 5, 8):  # within a pass, at its end, in the next one
        loader = by_torchdata(make(shards, epoch_length=5))
        seen: list[str] = []
        state = {}
        while not state:
            for sample in loader:
                seen.append(sample["__key__"])
                if len(seen) == taken:
                    state = loader.state_dict()
                    break
        again = by_torchdata(make(shards, epoch_length=5))
        again.load_state_dict(state)
        while len(seen) < 15:
            seen += keys(again)
        assert seen == expected, taken


@pytest.mark.parametrize(("workers", "batch_size"), [(0, None), (2, 2)])
def test_a_pipeline_with_a_state_is_not_replayed(shards: list[str], workers: int, batch_size: int | None) -> None:
    decoded: list[str] = []

    def noted(sample: dict[str, Any]) -> dict[str, Any]:
        decoded.append(sample["__key__"])
        return sample

    def loader() -> Any:
        stages = (webdataset.map(noted), webdataset.decode(), webdataset.to_tuple("__key__", "txt"))
        pipeline = OrderedPipeline(make(shards), *stages)
        return StatefulDataLoader(pipeline, batch_size=batch_size, num_workers=workers)

    whole = list(islice(loader(), 12))
    first = loader()
    seen, state = list(islice(first, 5)), first.state_dict()
    decoded.clear()
    again = loader()
    again.load_state_dict(state)
    assert seen + list(islice(again, 7)) == whole
    assert decoded == ([] if workers else keys(make(shards), 12)[5:])


@pytest.mark.parametrize("workers", [0, 1])
def test_members_of_mapped_shards_are_bytes(shards: list[str], tmp_path: Path, workers: int) -> None:
    """Which others decode, and which go to another process."""
    source = make(shards, storage=Storage(tmp_path, mmap=True), epoch_length=N)
    pipeline = webdataset.DataPipeline(source, webdataset.decode(), webdataset.to_tuple("txt", "json"))
    found = list(DataLoader(pipeline, batch_size=None, num_workers=workers))
    assert {text for text, _ in found} == {f"text {n} {i}" for n, size in enumerate(SIZES) for i in range(size)}
    members = next(iter(plain(make(shards, storage=Storage(tmp_path, mmap=True)), workers)))
    assert {type(members[name]) for name in ("txt", "json")} == {bytes}


@pytest.mark.slow
def test_remote_shards_in_forked_workers(shards: list[str], tmp_path: Path) -> None:
    """The constructor reads them, and the workers do, in two passes; what has read them here itself is refused."""
    with http_server() as server:
        urls = [server.put(Path(path).name, Path(path).read_bytes()) for path in shards]
        code = f"""
import json
from pathlib import Path
from torch.utils.data import DataLoader
from trainer.data.ordered_samples import OrderedSamples
from trainer.data.storage import Storage
source = OrderedSamples({urls!r}, seed=3, lanes=4, window=2, epoch_length=10, storage=Storage(Path({str(tmp_path)!r})))
loader = DataLoader(source, batch_size=None, num_workers=2, multiprocessing_context="fork")
print(json.dumps([sample["__key__"] for _ in range(2) for sample in loader]))
next(iter(source))
try:
    next(iter(loader))
except Exception as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, *words = done.stdout.splitlines()
    assert json.loads(found) == keys(make(shards), 20)
    assert "start it by spawn or forkserver, as by DataLoader(..., multiprocessing_context='forkserver')" in " ".join(
        words
    )


def test_wrong_lengths_of_a_pass_are_refused(shards: list[str]) -> None:
    with pytest.raises(ValueError, match="epoch_length=0: a pass has at least one sample"):
        make(shards, epoch_length=0)
