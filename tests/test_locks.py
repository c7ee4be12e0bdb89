"""Locks where the file system has none: files that name their holder, and messages that name the file."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import Timeout

from launch.checkpoint_prune import _nobody_trains
from trainer import locks
from trainer.config.compose import load
from trainer.errors import ConfigError
from trainer.folder import RunFolder, set_aside
from trainer.topology import ALONE


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(_fd: int, _how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOSYS)


@pytest.mark.usefixtures("no_flock")
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_lock_that_is_a_file_is_exclusive_and_names_its_holder(tmp_path: Path) -> None:
    lock = locks.acquire(tmp_path / "lock")
    with pytest.raises(Timeout):
        locks.acquire(tmp_path / "lock")
    told = locks.holder(tmp_path / "lock")
    assert told.startswith(f": process {os.getpid()} on ")
    assert "delete this file" in told
    assert str(tmp_path / "lock") in told
    lock.release()
    locks.acquire(tmp_path / "lock").release()


@pytest.mark.usefixtures("no_flock")
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_lock_left_by_another_machine_is_named(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "config.yaml").touch()
    left = run_dir / ".lock"
    left.write_text("4711\nnode-that-broke\n")
    config = load(["experiment=none", "model.layers=1", f"run.dir={run_dir}"])
    expected = rf"process 4711 on node-that-broke holds {left}; if that process is gone, delete this file; stop it, or"
    with pytest.raises(ConfigError, match=expected):
        RunFolder(config, lambda _: {}, ALONE, 0.0)
    with pytest.raises(ConfigError, match=f"process 4711 .* {left}"), _nobody_trains(run_dir, dry=False):
        pass
    with pytest.raises(Timeout):
        set_aside(run_dir)


@pytest.mark.usefixtures("no_flock")
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_who_is_waited_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    left = tmp_path / "lock"
    left.write_text("4711\nnode-that-broke\n")
    monkeypatch.setattr(locks, "TELL_S", 0.1)
    printed = SimpleNamespace(flush=lambda: None, write=lambda text: left.unlink(missing_ok=True) or len(text))
    monkeypatch.setattr("sys.stderr", printed)  # whoever reads it deletes the file
    with locks.waited_for(left):
        assert left.exists()
    assert not left.exists()


def test_the_kernels_lock_tells_no_holder(tmp_path: Path) -> None:
    with locks.waited_for(tmp_path / "lock"):
        assert locks.holder(tmp_path / "lock") == ""


def test_a_file_system_that_refuses_locks_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(["experiment=none", "model.layers=1", f"run.dir={tmp_path}/run"])
    refuse(monkeypatch, errno.ENOLCK)
    with pytest.raises(ConfigError, match=r"No locks available \(NFS without its lock service\?\); choose"):
        RunFolder(config, lambda _: {}, ALONE, 0.0)
