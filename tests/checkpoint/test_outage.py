"""A hiccup of the storage is not damage: no checkpoint is set aside, deleted or passed over because of one."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from tests.checkpoint.test_checkpoint import restored, tensors
from tests.checkpoint.test_state import Ranks
from tests.test_outage import failing
from trainer import outage, topology
from trainer.checkpoint import reader, retention
from trainer.checkpoint import save as saving
from trainer.checkpoint.format import folder_name, verify
from trainer.checkpoint.load import find_newest, read_all
from trainer.checkpoint.retention import Retention, complete_checkpoints
from trainer.checkpoint.save import Saver
from trainer.config.compose import load
from trainer.errors import Outage
from trainer.run_directory import RunDirectory
from trainer.topology import ALONE

WAYS = ["read", "EAGAIN", "open", "lstat", "list"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saver = Saver(tmp_path, ALONE, Retention(keep=9), asynchronous=False, pauses=())
    for step in (10, 20):
        saver.save(step, tensors(step), {"evaluation": {"loss": step}})
    saver.close()
    return tmp_path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "LONGEST_WAIT_S", 0.01)


def broken(monkeypatch: pytest.MonkeyPatch, way: str, times: int) -> Any:
    """The storage fails so often in this way; gives what counts."""
    place, name = {
        "read": (reader, "_read_into"),
        "EAGAIN": (reader, "_read_into"),
        "open": (reader, "_open_regular"),
        "lstat": (Path, "lstat"),
        "list": (Path, "iterdir"),
    }[way]
    number = errno.EAGAIN if way == "EAGAIN" else errno.EIO
    call = failing(getattr(place, name), number, times)
    monkeypatch.setattr(place, name, lambda *given: call(*given))
    return call


@pytest.mark.parametrize("way", WAYS)
def test_it_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    with monkeypatch.context() as storage:
        call = broken(storage, way, 3)
        assert restored(folder) == 20
        assert call.left[0] == 0
    assert [path.name for path in complete_checkpoints(folder)] == [folder_name(10), folder_name(20)]


@pytest.mark.parametrize("way", WAYS)
def test_at_the_end_of_patience_it_is_refused_and_nothing_is_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(outage, "PATIENCE_S", 0.05)
    before = sorted(os.listdir(folder))
    with monkeypatch.context() as storage:
        broken(storage, way, 10**6)
        with pytest.raises(
            Outage, match=r"cannot be read: (Input/output|Resource).*run the same command again"
        ) as caught:
            find_newest(folder)
    assert (caught.value.exit_code, caught.value.retry) == (4, True)
    assert sorted(os.listdir(folder)) == before
    assert restored(folder) == 20


def test_a_run_ends_with_the_files_name_and_may_be_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    saver = Saver(run / "checkpoints", ALONE, Retention(), asynchronous=False, pauses=())
    saver.save(10, tensors(10), {})
    saver.close()
    monkeypatch.setattr(outage, "PATIENCE_S", 0.05)
    broken(monkeypatch, "read", 10**6)
    with pytest.raises(Outage):
        RunDirectory(load(["experiment=none", "model.layers=1", f"run.dir={run}"]), lambda _: {}, ALONE, 0.0)
    told = json.loads((run / "logs" / "failure.json").read_text())
    assert (told["exit_code"], told["retry"]) == (4, True)
    assert f"{run}/checkpoints/step-00000010/manifest.json: cannot be read: Input/output error" in told["reason"]


def test_what_was_read_and_is_wrong_is_damage_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / folder_name(20) / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    call = broken(monkeypatch, "read", 3)
    found, events = find_newest(folder)
    assert found
    assert found.manifest["step"] == 10
    assert [event["kind"] for event in events] == ["checkpoint_damaged"]
    assert call.left[0] == 0


def test_a_read_goes_on_from_the_same_byte_of_a_file_opened_anew(tmp_path: Path) -> None:
    """A stale handle stays stale: without a new one this would never end."""
    content = bytes(range(256)) * 64
    (tmp_path / "a").write_bytes(content)
    with reader.open_file(tmp_path / "a") as file:
        first = file.read(1000)
        assert file._file is not None
        os.dup2(os.open("/proc/self/mem", os.O_RDONLY), file._file.fileno())  # reads of byte 1000 of it give EIO
        assert first + b"".join(iter(lambda: file.read(4096), b"")) == content


def test_the_best_one_is_not_deleted_because_it_cannot_be_read_for_now(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = Retention(keep=1, best="loss")
    assert rule.removable(folder) == []  # 10 has the lowest
    real = retention.read_manifest

    def read(path: Path, **named: Any) -> Any:
        if path.name == folder_name(10):
            raise Outage("away")
        return real(path, **named)

    monkeypatch.setattr(retention, "read_manifest", read)
    assert rule.removable(folder) == []
    assert Retention(keep=1).removable(folder) == [folder / folder_name(10)]  # where it plays no part


class Beats(Barrier):
    """Of ranks that let each other know that they are there."""

    count = 0

    def wait(self, timeout: float | None = None) -> int:
        self.count += 1
        return super().wait(timeout)

    def last_through(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work` that takes as long as very many collectives do."""

        def long(*given: Any) -> Any:
            end, deadline = self.count + 40, time.monotonic() + 60
            while self.count < end and not self.broken:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return work(*given)

        return long


def test_all_ranks_wait_for_the_one_whose_storage_is_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes: no collective waits for it."""
    monkeypatch.setattr(topology, "HEARTBEAT_S", 0.05)
    ranks, times = Ranks(2), list[int]()
    ranks.barrier = beats = Beats(2, timeout=30)
    real = reader._read_into

    def away(*given: Any) -> int:
        times.append(beats.count)
        if beats.count < 40:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*given)

    monkeypatch.setattr(reader, "_read_into", away)
    found = ranks.each(lambda rank: find_newest(folder, ranks.topology(rank))[0])
    assert times[0] < 40 <= times[-1]
    assert [it.manifest["step"] for it in found] == [20, 20]


@pytest.mark.parametrize("told", ["at once", "to the next try"])
def test_a_save_whose_rename_is_not_answered_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    saver = Saver(tmp_path, ALONE, Retention(), asynchronous=False, pauses=(0.0, 0.0))
    lost = failing(os.rename if told == "at once" else saving.move, errno.ENOENT, 1, before=False)
    if told == "at once":
        monkeypatch.setattr(os, "rename", lost)
    else:  # not even seen there for now
        monkeypatch.setattr(saving, "move", lost)
    (event,) = saver.save(5, tensors(5), {})
    assert lost.left[0] == 0  # type: ignore[attr-defined]
    assert (event["kind"], event["tries"]) == ("checkpoint", 1 if told == "at once" else 2)
    assert restored(tmp_path) == 5
    assert not list(tmp_path.glob(".attempt-*"))
    other = Saver(tmp_path, ALONE, Retention(), asynchronous=False, pauses=())
    (event,) = other.save(5, tensors(5), {})  # of another life: not this very save
    assert (event["kind"], "is there already" in event["reason"]) == ("checkpoint_failed", True)


def test_files_of_many_ranks_are_not_open_at_once(tmp_path: Path) -> None:
    ranks, before = Ranks(40), resource.getrlimit(resource.RLIMIT_NOFILE)

    def save(rank: int) -> Any:
        saver = Saver(tmp_path, ranks.topology(rank), Retention(), asynchronous=False, pauses=())
        return saver.save(1, {"model/a": dealt[rank]}, {}), saver.close()

    from trainer.checkpoint.state import FlatShard

    whole = torch.arange(400.0)
    dealt = [FlatShard(whole[10 * rank : 10 * rank + 10].clone(), whole.shape, 10 * rank) for rank in range(40)]
    ranks.each(save)
    assert len(list((tmp_path / folder_name(1)).glob("rank-*"))) == 40
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, before[1]))
    try:
        found, _ = find_newest(tmp_path)
        assert found
        assert torch.equal(read_all(found)["model/a"], whole)
        verify(found.path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# The same by strace: the kernel's own errors, in another process.

CODE = """
import json, sys
from pathlib import Path
from trainer import outage
from trainer.checkpoint.load import find_newest_or_fetch, read_all
from trainer.errors import Outage
from trainer.run_directory import RunDirectory
from trainer.topology import ALONE
outage.PATIENCE_S = float(sys.argv[2])
try:
    found, events = find_newest_or_fetch(Path(sys.argv[1]), ALONE, True)
    print(json.dumps([found.manifest["step"], events, read_all(found)["optimizer/step/a"].item()]))
except Outage as error:
    print(json.dumps([str(error), error.exit_code, error.retry]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize("call", ["read", "openat", "newfstatat"])
@pytest.mark.parametrize("error", ["EIO", "ESTALE", "ETIMEDOUT"])
def test_by_strace(folder: Path, tmp_path: Path, call: str, error: str) -> None:
    before = sorted(path.name for path in folder.iterdir())
    for when, patience in (("1..3", 60), ("1+", 1)):
        log = tmp_path.parent / f"{tmp_path.name}.strace"
        paths = [folder / folder_name(step) / "rank-00000.safetensors" for step in (10, 20)]
        tracer = ["strace", "-f", "-qq", "-o", str(log), *(part for path in paths for part in ("-P", str(path)))]
        tracer += ["-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}"]
        done = subprocess.run(
            [*tracer, sys.executable, "-c", CODE, str(folder), str(patience)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "INJECTED" in log.read_text()
        got = json.loads(done.stdout)
        if when == "1+":
            assert got[1:] == [4, True]
            assert "rank-00000.safetensors: cannot be read: " in got[0]
        else:
            assert got == [20, [], 20.0]
        assert sorted(path.name for path in folder.iterdir()) == before
