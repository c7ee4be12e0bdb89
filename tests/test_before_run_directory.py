"""What goes wrong before a run's folder is taken is said in words, once, by a process that is there to say it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from launch.supervisor import Budget, Life, Supervisor
from trainer import topology
from trainer.__main__ import print_error
from trainer.config import compose
from trainer.config.compose import load
from trainer.data.storage import default_cache
from trainer.errors import ConfigError, Crashed
from trainer.launchers import LAUNCHERS, are_by_hand, variables_to_unset
from trainer.resilience import interruption

LEFT_OVER = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LEFT_OVER, "TORCHELASTIC_RUN_ID", "ONECURVE_STORE", *(one.by for one in LAUNCHERS)):
        monkeypatch.delenv(name, raising=False)


def left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LEFT_OVER.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("variable", "with_gpus"), [("GLOO_SOCKET_IFNAME", False), ("NCCL_SOCKET_IFNAME", True)])
def test_an_interface_that_is_not_here_is_named(variable: str, with_gpus: bool, monkeypatch) -> None:
    for good in ("lo", "", "lo,lo"):
        monkeypatch.setenv(variable, good)
        topology.check_interfaces(with_gpus)
    monkeypatch.setenv(variable, "ib77")
    with pytest.raises(ConfigError, match=rf"{variable}=ib77: no such network interface .* which has .*lo") as caught:
        topology.check_interfaces(with_gpus)
    assert caught.value.local
    monkeypatch.delenv(variable)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib77")
    topology.check_interfaces(with_gpus=False)  # which uses none of NCCL
    for good in ("^ib77", "=lo", "l"):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", good)
        topology.check_interfaces(with_gpus=True)


def nobody_comes() -> None:
    with topology._report_waiting(3, 8):
        time.sleep(0.5)
        raise dist.DistStoreError("Wait timeout")


def test_who_waits_says_for_what(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    left_over(monkeypatch)
    monkeypatch.setattr(topology, "REPORT_AFTER_S", 0.05)
    with pytest.raises(ConfigError, match="did not find each other: DistStoreError: Wait timeout") as caught:
        nobody_comes()
    assert "RANK=3 WORLD_SIZE=8" in str(caught.value)
    assert "to train alone: unset RANK WORLD_SIZE" in str(caught.value)
    assert "onecurve: rank 3 waits for 8 processes to come: RANK=3 WORLD_SIZE=8" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # whose other processes may yet come, at another attempt
    with pytest.raises(Crashed):
        nobody_comes()
    assert "waits" not in capsys.readouterr().err  # rank 0 says it


def test_a_rank_without_a_main_one_tells_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left_over(monkeypatch)
    assert are_by_hand()
    print_error(ConfigError("train.stpes: no such key"))
    assert "onecurve: rank 3: 1 problem, nothing was started:\n  train.stpes" in capsys.readouterr().err
    for launcher in ("TORCHELASTIC_RUN_ID", "ONECURVE_STORE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        with monkeypatch.context() as patch:
            patch.setenv(launcher, "8")
            assert not are_by_hand()
            assert variables_to_unset() == ([] if launcher in ("TORCHELASTIC_RUN_ID", "ONECURVE_STORE") else [launcher])
            print_error(ConfigError("train.stpes: no such key"))
            assert capsys.readouterr().err == ""
            patch.setenv("LOCAL_RANK", "0")
            print_error(topology._local_error("GLOO_SOCKET_IFNAME=ib0"))
            assert "rank 3: 1 problem" in capsys.readouterr().err


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "ONECURVE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # of which passwd knows nothing
    with pytest.raises(ConfigError, match=r"data.cache=~/.cache/onecurve: this user has no home folder: set HOME"):
        load([])
    with pytest.raises(ConfigError, match="no home folder to keep a cache in: set HOME or ONECURVE_CACHE"):
        default_cache()
    with pytest.raises(ConfigError, match=r"run\.dir=~/runs: this user has no home folder"):
        load(["run.dir=~/runs", "data.cache=/tmp/cache"])
    assert compose.homeless_paths(load(["data.cache=/tmp/cache"])) == []
    monkeypatch.setenv("HOME", "/tmp")
    load([])


def test_what_fails_twice_before_the_run_begins_is_not_tried_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("launch.supervisor.Ranks", lambda procs: SimpleNamespace(close=int))  # none are started
    budget, cause = Budget(3), (-1, "exit codes {4}")
    assert budget.spend(False, cause) is None
    assert budget.spend(False, cause) == "the same failure twice before the run began"
    with Supervisor(load([f"run.dir={tmp_path / 'run'}"]), 2) as supervisor:
        failed = Life(codes={0: 4, 1: 4}, first_failures=[1])
        told = [supervisor._charge_failure(failed, [0, 1], progressed=False) for _ in range(2)]
        assert told == [None, "the same failure twice before the run began"]
        supervisor.budget = Budget(3)
        killed = Life(codes={0: -9, 1: 4}, first_failures=[0])  # which may not happen again
        assert [supervisor._charge_failure(killed, [0, 1], progressed=False) for _ in range(2)] == [None, None]


def test_a_hangup_asks_to_stop_but_not_under_nohup() -> None:
    before = interruption.handlers()
    try:
        interruption.listen()
        os.kill(os.getpid(), signal.SIGHUP)
        assert interruption.is_stop_requested()
        interruption.stop_listening(before)
        assert interruption.handlers() == before
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        interruption.listen()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interruption.is_stop_requested()
    finally:
        interruption.stop_listening(before)


@pytest.mark.slow
def test_processes_that_never_come_are_named_and_a_hangup_saves(tmp_path: Path) -> None:
    small = ["experiment=smoke", "track.wandb.mode=disabled", "run.dir=run", "launch.timeout_s=15"]
    command = [sys.executable, "-m", "trainer", *small]
    environment = {**os.environ, **LEFT_OVER, "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "rank 3 waits for 8 processes to come" in done.stderr
    assert "to train alone: unset RANK WORLD_SIZE" in done.stderr
    assert "Traceback" not in done.stderr
    longer = [*command, "train.steps=100000", "eval.every=0"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    # Not as under nohup, which these tests may run under themselves.
    with subprocess.Popen(
        longer, cwd=tmp_path, preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    ) as process:
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                assert process.poll() is None
                time.sleep(0.1)
            process.send_signal(signal.SIGHUP)
            assert process.wait(timeout=300) == 75
        finally:
            process.kill()
