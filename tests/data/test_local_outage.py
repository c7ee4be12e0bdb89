"""A local file system that does not answer for a while (NFS, Lustre): waited for as a server is, and never bad data."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.ranks import on_ranks
from tests.data.tars import make, write
from tests.test_outage import failing
from trainer import outage
from trainer.data import external_indexes, index, tokens
from trainer.data.batch_sizes import Batches
from trainer.data.mixture import Mixture
from trainer.data.shard_spec import expand
from trainer.data.shards import Shards
from trainer.data.shared_work import WorkSharing
from trainer.data.storage import Storage, local, unpack
from trainer.data.stream import OrderedSource, RankStream
from trainer.data.tokenizer import ByteTokenizer
from trainer.data.tokens import TokenLine
from trainer.errors import ConfigError, DataError, Outage

CONTENT = bytes(range(256)) * 100


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "LONGEST_WAIT_S", 0.01)


def storage(tmp_path: Path, **options: Any) -> Storage:
    return Storage(tmp_path / "cache", **{"wait_s": 0.001, "retries": 5, **options})


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN])
@pytest.mark.parametrize("call", ["pread", "open", "fstat", "stat"])
def test_it_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    broken = failing(getattr(os, call), number, 3)
    monkeypatch.setattr(os, call, broken)
    its = storage(tmp_path)
    blob = its.open(str(tmp_path / "a.tar"))
    assert blob.read(5, 1000) == CONTENT[5:1005]
    assert its.stamp(str(tmp_path / "a.tar")) == blob.stamp
    assert broken.left[0] == 0  # type: ignore[attr-defined]


def test_a_stale_handle_is_opened_anew(tmp_path: Path) -> None:
    """The old one never answers again."""
    (tmp_path / "a.tar").write_bytes(CONTENT)
    blob = storage(tmp_path).open(str(tmp_path / "a.tar"))
    os.dup2(os.open("/proc/self/mem", os.O_RDONLY), blob._file.number)  # type: ignore[attr-defined]  # gives EIO
    assert blob.read(5, 1000) == CONTENT[5:1005]


def test_it_ends_as_an_outage_that_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    blob = storage(tmp_path, patience_s=0.05).open(str(tmp_path / "a.tar"))
    with monkeypatch.context() as away:
        away.setattr(os, "pread", failing(os.pread, errno.EIO, 10**6))
        with pytest.raises(
            Outage, match=r"a\.tar: byte 5: cannot be read: Input/output error \(\d+ attempts\)"
        ) as caught:
            blob.read(5, 10)
    assert (caught.value.exit_code, caught.value.retry) == (DataError.exit_code, True)
    assert blob.read(5, 10) == CONTENT[5:15]


def test_an_answer_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    its = storage(tmp_path, patience_s=600)
    with pytest.raises(DataError, match="No such file"):
        its.open(str(tmp_path / "b.tar"))
    with pytest.raises(DataError, match="Is a directory"):
        its.open(str(tmp_path)).read(0, 1)
    monkeypatch.setattr(os, "open", failing(os.open, errno.EMFILE, 1))
    with pytest.raises(OSError, match="Too many open files"):  # that is not a fault of the shard's
        its.open(str(tmp_path / "a.tar"))


def test_a_file_system_that_maps_no_files_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    broken = failing(local.mmap.mmap, errno.ENODEV, 1)
    monkeypatch.setattr(local.mmap, "mmap", broken)
    assert storage(tmp_path, mmap=True).open(str(tmp_path / "a.tar")).read(5, 10) == CONTENT[5:15]
    assert broken.left[0] == 0  # type: ignore[attr-defined]


def test_no_sample_is_quarantined_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waited for; and where that has an end the run does, not the sample."""
    paths = make(tmp_path / "in", samples=10)
    shards = Shards.open(paths, "txt", storage(tmp_path))

    class Source:
        n, bytes, faults, fingerprint = shards.n, shards.bytes, (), ""

        def read(self, unit: int, draw: int) -> dict[str, Any]:
            return {"size": np.int64(len(shards.read(unit)))}

        def foresee(self, units: Any) -> None:
            pass

    part = OrderedSource(Source(), 2, 2, 1, 2)  # type: ignore[arg-type]
    share = RankStream([part], Mixture([(0, [1])]), Batches(12), None, 1, tolerant=True)
    expected = share.step(0).micro_batches[0]["size"].tolist()
    broken = failing(os.pread, errno.ESTALE, 4)
    with monkeypatch.context() as away:
        away.setattr(os, "pread", broken)
        data = share.step(0)
    assert broken.left[0] == 0  # type: ignore[attr-defined]
    assert (data.faults, data.micro_batches[0]["size"].tolist()) == ([], expected)
    with monkeypatch.context() as away:
        away.setattr(os, "pread", failing(os.pread, errno.ESTALE, 10**6))
        with pytest.raises(Outage):
            share.step(0)


@pytest.mark.parametrize("where", ["index", "summary", "foreign"])
def test_what_is_kept_beside_a_shard_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Else the run would be another one: a shard known by another's index, or damage forgotten."""
    (path,) = make(tmp_path / "in", shards=1)
    its = storage(tmp_path)
    built = index.ShardIndex.open(path, its)
    (tmp_path / "in" / external_indexes.SIZES).write_text(json.dumps({"s-00.tar": 7}))
    real, broken = open, failing(open, errno.EIO, 2)
    monkeypatch.setattr(
        "builtins.open",
        lambda file, *more, **named: (
            broken(file, *more, **named) if "r" in "".join(more) else real(file, *more, **named)
        ),
    )
    monkeypatch.setattr(index.ShardIndex, "build", None)
    if where == "index":
        assert index.ShardIndex.open(path, its) == built
    elif where == "summary":
        assert index.summary(path, its) == built.summary
    else:
        assert external_indexes.ExternalCounts(its).count(its.open(path)) == external_indexes.SampleCount(
            7, str(tmp_path / "in" / external_indexes.SIZES)
        )
    assert broken.left[0] == 0  # type: ignore[attr-defined]


def test_a_folder_that_cannot_be_listed_for_now_has_no_fewer_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make(tmp_path / "in")
    for call, pattern in (("listdir", "*.tar"), ("stat", "s-{00..02}.tar"), ("stat", "*.tar")):
        broken = failing(getattr(os, call), errno.EIO, 2)
        with monkeypatch.context() as away:
            away.setattr(os, call, lambda *given, broken=broken: broken(*given))
            assert expand(f"{tmp_path}/in/{pattern}") == paths
        assert broken.left[0] == 0  # type: ignore[attr-defined]


def test_what_this_process_may_not_have_is_told_on_all_ranks(tmp_path: Path) -> None:
    def make(team: WorkSharing) -> Any:
        return team.share("files", [0, 1], failing(str, errno.EMFILE, team.rank))

    for error in on_ranks(2, make):
        assert isinstance(error, ConfigError)
        assert "Too many open files: raise the limit of open files" in str(error)
        assert error.exit_code == 4


def test_cached_tokens_and_unpacked_shards_are_not_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tar", [(f"{i}.txt", b"some text") for i in range(9)])
    its = storage(tmp_path)

    def line() -> TokenLine:
        return TokenLine(Shards.open([path], "txt", its), ByteTokenizer(), tmp_path / "cache")

    whole = line().read(0, 999).tolist()
    command = f"pipe:echo x >> {tmp_path}/ran; cat {path}"
    piped = storage(tmp_path, allow_pipe=True)
    unpack.piped(piped, command)
    monkeypatch.setattr(TokenLine, "_encode", None)
    for module in (tokens, unpack):
        real = module.read_file
        broken = failing(os.stat, errno.EIO, 2)
        with monkeypatch.context() as away:
            away.setattr(os, "stat", lambda place, *more, broken=broken, **named: broken(place, *more, **named))
            if module is tokens:
                assert line().read(0, 999).tolist() == whole
            else:
                unpack.piped(piped, command)
        assert broken.left[0] == 0  # type: ignore[attr-defined]
        assert module.read_file is real
    assert (tmp_path / "ran").read_text() == "x\n"


def test_a_cache_that_maps_no_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tar", [(f"{i}.txt", b"some text") for i in range(9)])
    line = TokenLine(Shards.open([path], "txt", storage(tmp_path)), ByteTokenizer(), tmp_path / "cache")
    monkeypatch.setattr(np, "load", failing(np.load, errno.ENODEV, 1))
    with pytest.raises(ConfigError, match=r"data\.cache: .*cannot map files into memory; choose a folder on another"):
        line.read(0, 5)


RUN = ("experiment=smoke", "data=webdataset", "data.field=txt", "data.tokenizer=bytes", "train.steps=6")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize(("when", "patience", "code"), [("30..33", 600, 0), ("30+", 2, 3)])
def test_a_run_by_strace(tmp_path: Path, when: str, patience: int, code: int) -> None:
    """The kernel's own ESTALE while a run under quarantine reads its shard."""
    text = b"to be or not to be, that is the question " * 20
    path = write(
        tmp_path / "a.tar",
        [(f"{i:04d}.u16", np.frombuffer(text, np.uint8).astype("<u2").tobytes()) for i in range(400)],
    )
    run = tmp_path / "run"
    overrides = [
        *RUN,
        "data.field=u16",
        f"data.shards={path}",
        "data.validation=null",
        "eval.every=0",
        f"data.cache={tmp_path}/cache",
    ]
    overrides += [f"run.dir={run}", "data.on_error=quarantine", f"data.patience_s={patience}", "sample.count=0"]
    log = tmp_path / "log"
    tracer = ["strace", "-f", "-qq", "-o", str(log), "-P", path, "-e", "trace=pread64"]
    tracer += ["-e", f"inject=pread64:error=ESTALE:when={when}"]
    done = subprocess.run([*tracer, sys.executable, "-m", "trainer", *overrides], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "INJECTED" in log.read_text()
    assert not (run / "quarantine.jsonl").exists()
    if code:
        told = json.loads((run / "logs" / "failure.json").read_text())
        assert (told["exit_code"], told["retry"]) == (3, True)
        assert "Stale file handle" in told["reason"]
