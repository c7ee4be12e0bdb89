"""Storage that does not answer, and system calls that a file system may not have: the rule, without a run around it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer import files, outage
from trainer.errors import DataError, Outage
from trainer.files import create_file, move, read_file, replace_file, sync_folder


def failing(real: Callable[..., Any], number: int, times: int, before: bool = True) -> Callable[..., Any]:
    """`real`, which fails so often; `before` it did anything, or behind it, as where only the answer is lost."""
    left = [times]

    def call(*given: Any, **named: Any) -> Any:
        if left[0]:
            left[0] -= 1
            if not before:
                real(*given, **named)
            raise OSError(number, os.strerror(number))
        return real(*given, **named)

    call.left = left  # type: ignore[attr-defined]
    return call


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.EAGAIN])
@pytest.mark.parametrize("more", [errno.ESHUTDOWN, errno.ENOTCONN, errno.EREMOTEIO, errno.EHOSTDOWN, errno.EBUSY])
def test_what_is_no_answer_is_an_outage(number: int, more: int) -> None:
    assert outage.is_outage(OSError(number, ""))
    assert outage.is_outage(OSError(more, ""))


@pytest.mark.parametrize(
    "number", [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.EMFILE, errno.ENOTDIR, errno.ENOSPC, errno.ELOOP]
)
def test_an_answer_is_none(number: int) -> None:
    assert not outage.is_outage(OSError(number, ""))
    assert not outage.is_outage(OSError("Invalid data stream"))  # as bz2 says it
    assert not outage.is_outage(ValueError())


def test_an_outage_is_neither_bad_data_nor_final() -> None:
    assert not issubclass(Outage, DataError)
    assert Outage("x").retry


def test_it_is_waited_for_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").write_bytes(b"content")
    call = failing(open, errno.ESTALE, 3)
    patience = outage.Patience("a", "a", 60, first_s=0.01)

    def read() -> bytes:
        with call(tmp_path / "a", "rb") as file:
            return file.read()

    assert outage.retry_during_outage(read, patience) == b"content"
    told = capfd.readouterr().err.splitlines()
    assert [line.partition(" (")[0].partition(",")[0] for line in told] == [
        "onecurve: waiting for a",
        "onecurve: a is back",
    ]
    assert not outage.is_ongoing()


def test_what_was_asked_for_before_does_not_say_that_it_is_back(capfd: pytest.CaptureFixture[str]) -> None:
    """Of a server that goes away, answers are still on their way."""
    before, failed = (outage.Patience("a", "a", 60, first_s=0.001) for _ in range(2))
    failed.wait("the connection broke")
    before.note_answer()
    assert outage.is_ongoing()
    outage.Patience("a", "a", 60).note_answer()
    assert not outage.is_ongoing()
    assert capfd.readouterr().err.count("is back") == 1


def test_it_ends_with_a_refusal_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "PATIENCE_S", 0)
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):  # an answer comes at once, as it is
        read_file(tmp_path / "a")
    (tmp_path / "b").touch()
    call = failing(os.stat, errno.EIO, 99)
    with monkeypatch.context() as broken:
        broken.setattr(os, "stat", call)
        with pytest.raises(Outage, match=rf"{tmp_path}/b: cannot be read: Input/output error") as caught:
            files.stat_file(tmp_path / "b")
    assert call.left[0] < 99  # type: ignore[attr-defined]
    assert caught.value.exit_code == 4
    monkeypatch.setattr(outage, "PATIENCE_S", 0.05)
    with monkeypatch.context() as broken:
        broken.setattr(os, "stat", failing(os.stat, errno.EIO, 99))
        with pytest.raises(Outage, match="attempts"):
            files.stat_file(tmp_path / "b")
    assert not outage.is_ongoing()  # or the watchdog would wait with it for ever


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
def test_a_rename_whose_answer_is_lost_took_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    for path in (tmp_path / "folder", tmp_path / "other"):
        path.mkdir()
    call = failing(os.rename, number, 2, before=False)
    monkeypatch.setattr(os, "rename", call)
    move(tmp_path / "folder", tmp_path / "moved")
    replace_file(tmp_path / "file", b"content")
    assert call.left[0] == 0  # type: ignore[attr-defined]
    assert (tmp_path / "file").read_bytes() == b"content"
    assert sorted(os.listdir(tmp_path)) == ["file", "moved", "other"]


def test_a_rename_that_failed_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    monkeypatch.setattr(os, "rename", failing(os.rename, errno.EIO, 1))
    with pytest.raises(OSError, match="Input/output"):
        move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"2"


@pytest.mark.parametrize("number", [None, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_a_file_is_created_once_with_and_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    call = failing(os.link, number or 0, 2 if number else 0)
    monkeypatch.setattr(os, "link", call)
    assert create_file(tmp_path / "a", b"first")
    assert not create_file(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]
    assert call.left[0] == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_syncs_no_folders_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    call = failing(os.fsync, number, 3)
    monkeypatch.setattr(os, "fsync", call)
    replace_file(tmp_path / "a", b"content")
    sync_folder(tmp_path)
    assert call.left[0] == 0  # type: ignore[attr-defined]
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EIO, 1))
    with pytest.raises(OSError, match="Input/output"):  # that is no matter of what it can
        sync_folder(tmp_path)


def test_room_that_is_not_told_is_not_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: files.shutil._ntuple_diskusage(0, 0, 0))  # type: ignore
    assert files.free_bytes(tmp_path) is None


@pytest.mark.parametrize("ends_with", [FileNotFoundError(errno.ENOENT, "gone"), ValueError("is no such thing")])
def test_whatever_comes_after_an_outage_ends_it(ends_with: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody would look after hangs any more."""
    monkeypatch.setattr(outage.time, "sleep", lambda _: None)
    errors = [OSError(errno.ESTALE, "stale"), ends_with]
    with pytest.raises(type(ends_with)):
        outage.retry_during_outage(lambda: (_ for _ in ()).throw(errors.pop(0)), outage.Patience("a", "a", 60))
    assert not errors
    assert not outage.is_ongoing()
