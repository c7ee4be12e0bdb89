from __future__ import annotations

import io
import json
import multiprocessing
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import Stateful, StatefulDataLoader

from tests.data.ordered_shards import N, make, shards
from trainer.errors import DataError

__all__ = ["shards"]  # a fixture


def keys(samples, count: int) -> list[str]:
    return [sample["__key__"] for sample in islice(samples, count)]


def test_samples_are_webdatasets_own(shards: list[str]) -> None:
    """As bytes and as the library decodes them, member by member."""
    theirs = webdataset.DataPipeline(webdataset.SimpleShardList(shards), webdataset.tarfile_to_samples())
    expected = {sample["__key__"]: {k: v for k, v in sample.items() if k[:2] != "__"} for sample in theirs}
    ours = {sample.pop("__key__"): sample for sample in islice(make(shards), N)}
    assert {sample.pop("__url__") for sample in ours.values()} == set(shards)
    assert ours == expected
    decoded = webdataset.DataPipeline(make(shards), webdataset.decode(), webdataset.to_tuple("__key__", "txt", "json"))
    for key, text, label in islice(decoded, N):
        assert text == expected[key]["txt"].decode()
        assert label == json.loads(expected[key]["json"])


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    lanes=st.integers(1, 40),
    window=st.integers(1, 4),
    lives=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 8)), max_size=12),
)
def test_one_order_for_any_ranks_stops_and_resizes(shards: list[str], lanes: int, window: int, lives: list) -> None:
    """Lives of random length on random numbers of ranks, each from the saved state: the order of one process."""
    reference = keys(make(shards, lanes=lanes, window=window), 12 * 6 * 8)
    for epoch in range(len(reference) // N):
        assert set(Counter(reference[epoch * N : (epoch + 1) * N]).values()) == {1}
    seen: list[str] = []
    state = None
    for size, rounds in lives:
        ranks = [make(shards, lanes=lanes, window=window, rank=rank, world_size=size) for rank in range(size)]
        for rank in ranks:
            if state:
                rank.load_state_dict(json.loads(state))
        streams = [iter(rank) for rank in ranks]
        seen += [next(stream)["__key__"] for _ in range(rounds) for stream in streams]
        states = {json.dumps(rank.state_dict()) for rank in ranks}
        assert len(states) == 1
        state = states.pop()
        assert len(state) < 1024
    assert seen == reference[: len(seen)]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_one_order_for_any_workers(shards: list[str], workers: int) -> None:
    context = multiprocessing.get_context("spawn") if workers == 2 else None
    loader = DataLoader(make(shards), batch_size=None, num_workers=workers, multiprocessing_context=context)
    assert keys(loader, 2 * N) == keys(make(shards), 2 * N)


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_dataloader_resumes_exactly(shards: list[str], workers: int) -> None:
    assert isinstance(make(shards), Stateful)
    expected = keys(make(shards), 2 * N)
    loader = StatefulDataLoader(make(shards), batch_size=None, num_workers=workers)
    iterator = iter(loader)
    first = keys(iterator, 17)
    state = loader.state_dict()
    del iterator
    again = StatefulDataLoader(make(shards), batch_size=None, num_workers=workers)
    again.load_state_dict(state)
    assert first + keys(again, 2 * N - 17) == expected


def test_a_state_of_other_data_is_refused(shards: list[str]) -> None:
    state = make(shards).state_dict()
    with pytest.raises(ValueError, match="seed differ"):
        make(shards, seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match="shards differ"):
        make(shards[:3]).load_state_dict(state)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        make(shards, rank=2, world_size=2)


def test_long_names_of_gnu_tar(tmp_path: Path) -> None:
    source = make([write_samples(tmp_path / "long.tar")])
    assert {sample["txt"] for sample in islice(source, 3)} == {b"text0", b"text1", b"text2"}


@pytest.mark.parametrize("members", [0, 1])
def test_a_shard_that_is_replaced_under_the_run(tmp_path: Path, members: int) -> None:
    """Before its first sample is read: by a shorter one, and by an empty one."""
    path = write_samples(tmp_path / "long.tar")
    source = make([path])
    write_samples(tmp_path / "long.tar", members)
    with pytest.raises(DataError, match=r"long\.tar: was changed after it had been indexed"):
        keys(source, 3)
    assert source.state_dict()["taken"] == 0


def write_samples(path: Path, count: int = 3) -> str:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for i in range(count):
            member = tarfile.TarInfo(f"{'long' * 40}/{i}.txt")
            member.size = 5
            archive.addfile(member, io.BytesIO(b"text%d" % i))
    return str(path)


def test_tensors_of_a_pipeline(shards: list[str]) -> None:
    """The stage feeds a pipeline with a user's own stages and batching, as webdataset's own sources do."""
    pipeline = webdataset.DataPipeline(
        make(shards),
        webdataset.decode(),
        webdataset.map(lambda s: {"label": s["json"]["label"]}),
        webdataset.batched(4),
    )
    batch = next(iter(pipeline))
    assert torch.as_tensor(batch["label"]).shape == (4,)
