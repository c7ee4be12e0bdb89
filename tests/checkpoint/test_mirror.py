"""Checkpoints in a bucket (moto's S3): whole or not there, and a new disk goes on from them."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.test_outage import Beats
from tests.checkpoint.test_state import Ranks
from tests.data.servers import s3_server
from tests.runs import Run
from trainer import topology
from trainer.checkpoint import mirror as module
from trainer.checkpoint.format import folder_name, verify
from trainer.checkpoint.load import find_newest_or_fetch, read_all
from trainer.checkpoint.mirror import Mirror, part_size
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.save import Saver
from trainer.errors import Outage
from trainer.topology import ALONE

pytest.importorskip("obstore")
URL = "s3://shards/runs/one"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import boto3

    with s3_server(monkeypatch):
        yield boto3.client("s3")


def names(s3: Any) -> list[str]:
    return [item["Key"] for item in s3.list_objects_v2(Bucket="shards", Prefix="runs/").get("Contents", [])]


def save(folder: Path, *steps: int, retention: Retention = Retention()) -> list[dict[str, Any]]:  # noqa: B008
    folder.mkdir(exist_ok=True)
    saver = Saver(folder, ALONE, retention, asynchronous=False, mirror=Mirror(URL, ALONE, retention), pauses=())
    return [event for step in steps for event in saver.save(step, {"model/a": torch.full((9,), float(step))}, {})]


def test_a_new_disk_goes_on_from_it(s3: Any, tmp_path: Path) -> None:
    events = save(tmp_path / "old", 1, 2, 3, 4, retention=Retention(keep=2, every=4))
    assert [event["kind"] for event in events] == ["checkpoint", "checkpoint_mirrored"] * 4
    assert Mirror(URL, ALONE).steps() == [3, 4]  # the same are kept there
    assert not [name for name in names(s3) if "step-00000001" in name]
    (tmp_path / "new").mkdir()
    found, events = find_newest_or_fetch(tmp_path / "new", ALONE, True, Mirror(URL, ALONE))
    assert [event["kind"] for event in events] == ["checkpoint_fetched"]
    assert found
    assert read_all(found)["model/a"].tolist() == [4.0] * 9
    assert find_newest_or_fetch(tmp_path / "new", ALONE, True, Mirror(URL, ALONE))[1] == []  # it has it now
    (tmp_path / "new" / folder_name(4) / "index.json").write_text("{}")  # also where nothing on the disk is whole
    assert [event["kind"] for event in find_newest_or_fetch(tmp_path / "new", ALONE, True, Mirror(URL, ALONE))[1]] == [
        "checkpoint_damaged",
        "checkpoint_fetched",
    ]


def test_only_what_is_whole_counts(s3: Any, tmp_path: Path) -> None:
    save(tmp_path / "old", 1, 2)
    (file,) = [name for name in names(s3) if "step-00000002" in name and name.endswith("rank-00000.safetensors")]
    content = s3.get_object(Bucket="shards", Key=file)["Body"].read()
    s3.put_object(Bucket="shards", Key=file, Body=content[:-1] + bytes([content[-1] ^ 1]))
    (tmp_path / "new").mkdir()
    found, events = find_newest_or_fetch(tmp_path / "new", ALONE, True, Mirror(URL, ALONE))
    assert found
    assert found.manifest["step"] == 1
    assert [event["kind"] for event in events] == ["checkpoint_damaged", "checkpoint_fetched"]
    s3.delete_object(Bucket="shards", Key="runs/one/step-00000002/manifest.json")  # as cut short before the end
    assert Mirror(URL, ALONE).steps() == [1]


def test_nobody_overwrites_what_counts(s3: Any, tmp_path: Path) -> None:
    save(tmp_path / "one", 5)
    before = {name: s3.get_object(Bucket="shards", Key=name)["Body"].read() for name in names(s3)}
    events = save(tmp_path / "other", 5)
    assert events[-1]["kind"] == "checkpoint_not_mirrored"
    assert "another run has put a checkpoint of this step there" in events[-1]["reason"]
    after = {name: s3.get_object(Bucket="shards", Key=name)["Body"].read() for name in names(s3)}
    assert {name: after[name] for name in before} == before


def test_without_the_bucket_training_goes_on_but_nothing_begins(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    saver = Saver(tmp_path, ALONE, Retention(), asynchronous=False, mirror=quick(Mirror(URL, ALONE)), pauses=())
    kinds = [event["kind"] for event in saver.save(1, {"model/a": torch.zeros(9)}, {})]
    assert kinds == ["checkpoint", "checkpoint_not_mirrored"]
    assert verify(tmp_path / folder_name(1))
    shutil.rmtree(tmp_path / folder_name(1))
    with pytest.raises(Outage, match=r"checkpoint\.mirror=s3://shards/runs/one: cannot be read"):
        find_newest_or_fetch(tmp_path, ALONE, True, quick(Mirror(URL, ALONE)))


def quick(mirror: Mirror) -> Mirror:
    from obstore.store import from_url

    mirror._store = from_url(URL, client_options={"allow_http": True}, retry_config={"max_retries": 0})  # type: ignore
    return mirror


def test_ranks_share_the_work(s3: Any, tmp_path: Path) -> None:
    ranks = Ranks(3)
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    state = {f"model/{i}": torch.full((50,), float(i)) for i in range(9)}

    def save_one(rank: int) -> Any:
        topology = ranks.topology(rank)
        saver = Saver(tmp_path / "old", topology, Retention(), asynchronous=False, mirror=Mirror(URL, topology))
        return [event["kind"] for event in saver.save(1, state, {})]

    assert ranks.each(save_one) == [["checkpoint", "checkpoint_mirrored"]] * 3
    assert len([name for name in names(s3) if "rank-" in name]) == 3

    def fetch(rank: int) -> Any:
        return find_newest_or_fetch(tmp_path / "new", ranks.topology(rank), True, Mirror(URL, ranks.topology(rank)))

    for found, events in ranks.each(fetch):
        assert events[0]["kind"] == "checkpoint_fetched"
        assert read_all(found)["model/7"].tolist() == [7.0] * 50


def test_a_slow_upload_or_check_holds_nobody_up(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than any collective may take: neither ends the run."""
    monkeypatch.setattr(topology, "HEARTBEAT_S", 0.05)
    ranks, slow = Ranks(2), list[str]()
    ranks.barrier = beats = Beats(2, timeout=30)
    for place in ("old", "new"):
        (tmp_path / place).mkdir()

    def slowly(name: str, real: Any) -> Any:
        return beats.last_through(lambda *given: (slow.append(name), real(*given))[1])

    monkeypatch.setattr(Mirror, "_put", slowly("upload", Mirror._put))
    monkeypatch.setattr(module, "check_contents", slowly("check", module.check_contents))

    def save_one(rank: int) -> Any:
        its = ranks.topology(rank)
        saver = Saver(tmp_path / "old", its, Retention(), asynchronous=False, mirror=Mirror(URL, its))
        return [event["kind"] for event in saver.save(1, {"model/0": torch.zeros(50), "model/1": torch.ones(5)}, {})]

    assert ranks.each(save_one) == [["checkpoint", "checkpoint_mirrored"]] * 2

    def fetch(rank: int) -> Any:
        return find_newest_or_fetch(tmp_path / "new", ranks.topology(rank), True, Mirror(URL, ranks.topology(rank)))[1]

    assert [[event["kind"] for event in events] for events in ranks.each(fetch)] == [["checkpoint_fetched"]] * 2
    assert sorted(slow) == ["check", "check", "upload", "upload"]  # each rank checks what it fetched


def test_a_large_file_has_few_parts(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [part_size(size) for size in (0, 1 << 20, 9000 * (5 << 20))] == [5 << 20] * 3
    for size in (52_428_800_001, 1 << 40, 5 << 40):  # the last: the largest object that S3 takes
        assert -(-size // part_size(size)) <= 10_000
    monkeypatch.setattr(module, "MOST_PARTS", 2)
    (tmp_path / "old").mkdir()
    saver = Saver(tmp_path / "old", ALONE, Retention(), asynchronous=False, mirror=Mirror(URL, ALONE), pauses=())
    saver.save(1, {"model/a": torch.zeros(3 << 20)}, {})  # 12 MiB: three parts of 5 MiB, as a rule
    (file,) = [name for name in names(s3) if name.endswith("rank-00000.safetensors")]
    assert s3.head_object(Bucket="shards", Key=file)["ETag"].endswith('-2"')
    monkeypatch.setattr(module, "RANGE_BYTES", 5 << 20)
    (tmp_path / "new").mkdir()
    found, _ = find_newest_or_fetch(tmp_path / "new", ALONE, True, Mirror(URL, ALONE))
    assert found
    assert not read_all(found)["model/a"].any()


def test_a_bucket_that_goes_away_is_no_damage(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest is not passed over for an older one; what is cut short there is."""
    save(tmp_path / "old", 1, 2)
    (tmp_path / "new").mkdir()
    mirror = quick(Mirror(URL, ALONE))

    def download(*_: Any) -> None:
        raise mirror._ob.exceptions.GenericError("connection closed before message completed")

    with monkeypatch.context() as away:
        away.setattr(mirror, "_download", download)
        with pytest.raises(Outage, match=rf"{URL}: step 2 cannot be fetched: .*connection closed") as caught:
            find_newest_or_fetch(tmp_path / "new", ALONE, True, mirror)
    assert (caught.value.exit_code, caught.value.retry) == (4, True)
    (file,) = [name for name in names(s3) if "step-00000002" in name and name.endswith("rank-00000.safetensors")]
    s3.put_object(Bucket="shards", Key=file, Body=s3.get_object(Bucket="shards", Key=file)["Body"].read()[:-1])
    found, events = find_newest_or_fetch(tmp_path / "new", ALONE, True, mirror)
    assert found
    assert found.manifest["step"] == 1
    assert "rank-00000.safetensors has" in events[0]["reason"]


@pytest.mark.slow
def test_a_slow_upload_over_gloo(s3: Any, tmp_path: Path) -> None:
    """Two processes, whose collectives may take 4 s, and an upload that takes 10: both go on."""
    (tmp_path / "old").mkdir()
    context = multiprocessing.get_context("spawn")  # not a fork: of the bucket's library it would have no threads
    processes = [context.Process(target=_saves, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert Mirror(URL, ALONE).steps() == [1]


def _saves(rank: int, folder: Path) -> None:
    code = 1
    try:
        store = dist.FileStore(str(folder / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=4))
        groups = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
        its = topology.Topology(rank, 2, rank, 2, torch.device("cpu"), rank, 2, *groups)
        mirror = Mirror(URL, its)
        real = mirror._put
        mirror._put = lambda *given: (time.sleep(10 * rank), real(*given))[1]  # type: ignore[method-assign]
        saver = Saver(folder / "old", its, Retention(), asynchronous=False, mirror=mirror)
        events = saver.save(1, {"model/0": torch.zeros(50), "model/1": torch.ones(5)}, {})
        code = [event["kind"] for event in events] != ["checkpoint", "checkpoint_mirrored"]
    finally:
        os._exit(code)


@pytest.mark.slow
def test_a_run_moves_to_another_machine(s3: Any, tmp_path: Path) -> None:
    """Its disk is lost; the same bits all the same."""
    options = ("train.steps=20", "checkpoint.every=5", f"checkpoint.mirror={URL}", "train.log_every=1")
    whole = Run(tmp_path / "whole", 2, (*options[:2], "train.log_every=1"))
    whole.train()
    moved = Run(tmp_path / "moved", 2, options)
    moved.kill_at(12)
    shutil.rmtree(moved.folder)
    moved.train()
    kinds = [event["kind"] for event in moved.rows("events.jsonl")]
    assert "checkpoint_fetched" in kinds
    rows, last = whole.metrics(), json.loads((moved.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] == rows[-1]["loss"]
    ours, theirs = moved.weights(), whole.weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    refused = Run(tmp_path / "moved", 1, (*options, "run.fresh=true")).train(expect=2)
    assert "with run.fresh=true choose another" in refused


def test_an_evaluation_reaches_the_copy(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the bucket did not take it at first: until then the manifest on disk says which one is the best."""
    retention = Retention(keep=1, best="loss")
    mirror = Mirror(URL, ALONE, retention)
    saver = Saver(tmp_path, ALONE, retention, mirror=mirror, pauses=())

    def saved(step: int, loss: float) -> None:
        saver.save(step, {"model/a": torch.zeros(3)}, {"evaluation": None})
        saver.record_evaluation(step, {"loss": loss})
        saver.wait()

    saved(1, 5.0)
    assert mirror._manifest(1)["evaluation"] == {"loss": 5.0}
    with monkeypatch.context() as broken:
        broken.setattr(mirror, "_get", lambda _: (_ for _ in ()).throw(OSError("no way to it")))
        saver.record_evaluation(1, {"loss": 1.0})
        saver.wait()
    assert mirror._manifest(1)["evaluation"] == {"loss": 5.0}
    saved(2, 3.0)
    saved(3, 4.0)
    assert mirror.steps() == [1, 3]
    saver.record_evaluation(1, {"loss": 1.0})  # as a later attempt says it again
    saver.wait()
    assert mirror._manifest(1)["evaluation"] == {"loss": 1.0}
