"""`onecurve sweep`: from the grammar to runs that were really trained, and what is told of them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.report import report
from launch.sweeps.search import Search, value_of
from launch.sweeps.summary import outcome, show
from launch.sweeps.trials import Sweep, Trial, expand, folder_of, read
from tests.end_to_end.test_refusals import onecurve, refused
from tests.runs import Run
from trainer.config.sweep import name_of
from trainer.errors import ConfigError

SMOKE = ("experiment=smoke", "train.steps=4", "eval.every=2", "sample.count=0", "track.report=false")


def values(trials: list[Trial]) -> list[list[str]]:
    return [list(trial.values.values()) for trial in trials]


def test_every_combination_is_a_trial() -> None:
    trials = expand([*SMOKE, "optimizer.lr=0.001,0.01", "model.layers=range(1,3)", "strategy=glob(*ddp)"], 1)
    assert values(trials) == [[lr, layers, "ddp"] for lr in ("0.001", "0.01") for layers in ("1", "2")]
    assert len({trial.folder for trial in trials}) == 4
    assert all(trial.folder.startswith("runs/smoke/") for trial in trials)
    assert [trial.number for trial in trials] == [0, 1, 2, 3]


def test_names_of_folders() -> None:
    ours = {Path(trial.folder).name for trial in expand([*SMOKE, "model.layers=1,2"], 1)}
    assert name_of(["++b=2", "++a=1", "launch=slurm", "++launch.nodes=2"]) == "a=1,b=2"
    assert all(re.fullmatch(r"[A-Za-z0-9=.,+_-]+", name) for name in ours)
    assert len(name_of([f"key{number}=value" for number in range(99)])) < 150


@pytest.mark.slow
def test_folders_are_those_of_hydras_own_sweeps(tmp_path: Path) -> None:
    """Both may go on with each other's runs."""
    overrides = (*SMOKE[:1], "train.steps=1", "eval.every=0", "sample.count=0", "model.layers=1,2")
    subprocess.run([sys.executable, "-m", "trainer", "-m", *overrides], cwd=tmp_path, check=True, capture_output=True)
    theirs = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.glob("runs/smoke/*/status.json")}
    assert theirs == {trial.folder for trial in expand(overrides, 1)}


def test_a_trials_own_overrides_compose_to_its_folder() -> None:
    from trainer.config.compose import load

    odd = "run.dir='it''s, {here}'".replace("''", "\\'")
    for trial in expand([*SMOKE, "optimizer.lr=0.001,0.01", odd], 1):
        assert load(trial.overrides).run.dir == trial.folder
        assert trial.folder.startswith("it's, {here}/")
        wandb = load(trial.overrides).track.wandb
        assert (wandb.group, wandb.name) == ("smoke", trial.name)
        assert trial.name == f"optimizer.lr={trial.values['optimizer.lr']}"
    (own,) = expand([*SMOKE, "run.seed=1,2", "track.wandb.name=mine", "track.wandb.group=ours"], 1)[:1]
    assert (load(own.overrides).track.wandb.group, load(own.overrides).track.wandb.name) == ("ours", "mine")
    assert str(folder_of([*SMOKE, "optimizer.lr=0.001,0.01", odd], None)) == "it's, {here}"


def test_refused_in_one_block(tmp_path: Path) -> None:
    wrong = ("optimizer.lr=0.001,-1", "model.widht=2", "nonsense", "train.steps=interval(1,2)")
    assert refused(onecurve("sweep", "-n", "1", *SMOKE, *wrong), tmp_path) == [
        "nonsense: is not an override; write key=value, and a sweep as key=1,2 or key=range(1,4)",
        "train.steps=interval(1,2): an interval has no end of values: give --trials N",
        "model.widht: no such key; did you mean 'model.width'?",
        "optimizer.lr=-1: should be greater than 0 (with optimizer.lr=-1)",
    ]


def test_refused_arguments() -> None:
    with pytest.raises(ConfigError, match="strategy=fdsp: no such option"):
        expand([*SMOKE, "strategy=ddp,fdsp"], 1)
    with pytest.raises(ConfigError, match=r"batch.*3 processes"):
        expand([*SMOKE, "train.global_batch=7,9", "train.micro_batch=1"], 3)


def sweep_of(folder: Path, *steps: int) -> Sweep:
    """A sweep's folder, with trials that were really trained as far as `steps` says; 0: not begun."""
    trials = []
    for number, count in enumerate(steps):
        rate, run = f"0.00{number + 1}", Run(folder / f"lr-{number}", base=SMOKE)
        run.overrides = (f"optimizer.lr={rate}", f"train.steps={count}")
        if count:
            run.train()
        trials.append(Trial(number, str(run.folder), [*SMOKE, *run.overrides], {"optimizer.lr": rate}, count or 4))
    sweep = Sweep(folder, ["optimizer.lr"], 1, None, trials)
    sweep.save()
    return sweep


@pytest.mark.slow
def test_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = sweep_of(tmp_path, 2, 4, 0)
    assert read(tmp_path) == sweep
    assert [trial.is_finished for trial in sweep.trials] == [True, True, False]
    rows = Run(tmp_path / "lr-1").metrics()
    came = outcome(sweep.trials[1])
    assert (came.state, came.step, came.loss) == ("finished", 4, rows[-1]["loss"])
    assert came.best == min(row["eval"]["loss"] for row in rows if row.get("eval"))
    assert value_of(sweep.trials[1], "eval.loss") == rows[-1]["eval"]["loss"]
    assert value_of(sweep.trials[1], "loss") == rows[-1]["loss"]
    assert value_of(sweep.trials[1], "eval.other") is None
    assert show(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 of 3 trials are finished"
    assert [line.split()[0] for line in lines[2:5]] == ["0.002", "0.001", "0.003"]  # the best first
    page = (tmp_path / "sweep.html").read_text()
    assert page.count("<figure") == 2
    assert not re.search(r"(src|href)=|https?://", page)
    assert "optimizer.lr=0.002" in page


def test_report_takes_a_sweeps_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    Sweep(tmp_path, ["a"], 1, None, [Trial(0, str(tmp_path / "x"), ["a=<b>"], {"a": "<b>"}, 4)]).save()
    assert report(argparse.Namespace(run_dir=tmp_path)) == 0
    assert "0 of 1 trials are finished" in capsys.readouterr().out
    assert "<b>&lt;b&gt;</b>" in (tmp_path / "sweep.html").read_text()
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ConfigError, match="run the sweep again"):
        read(tmp_path)


def swept(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = onecurve("sweep", "-n", "1", *arguments)
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_sweep_is_trained_and_the_same_command_leaves_it_as_it_is(tmp_path: Path) -> None:
    """One of its trials fails: that is the exit code, and it is named."""
    arguments = (*SMOKE, "train.steps=20", "schedule.warmup_steps=0", "optimizer.lr=0.001,1e30", "--parallel", "2")
    process = swept(tmp_path, *arguments)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 4, output
    assert "1 of 2 trials failed" in output
    states = [json.loads(path.read_text())["state"] for path in tmp_path.glob("runs/smoke/*/status.json")]
    assert sorted(states) == ["failed", "finished"]
    (kept,) = tmp_path.glob("runs/smoke/*lr=0.001*/metrics.jsonl")
    before = kept.stat().st_mtime_ns
    process = swept(tmp_path, *arguments)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 4, output
    assert kept.stat().st_mtime_ns == before
    assert (tmp_path / "runs/smoke/sweep.html").exists()


@pytest.mark.slow
def test_ctrl_c_stops_all_saved_and_the_same_command_goes_on(tmp_path: Path) -> None:
    arguments = (*SMOKE[:1], "train.steps=9000", "sample.count=0", "eval.every=0", "optimizer.lr=0.001,0.002")
    stopped: dict[str, int] = {}
    for _life in range(2):
        process = swept(tmp_path, *arguments, "--parallel", "2")
        deadline = time.monotonic() + 200
        while True:
            rows = {str(path): Run(path.parent).last_step() for path in tmp_path.glob("runs/smoke/*/metrics.jsonl")}
            if len(rows) == 2 and all(step > stopped.get(name, 0) for name, step in rows.items()):
                break
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 75, output
        for name in rows:
            run = Run(Path(name).parent)
            assert run.status()["state"] == "interrupted"
            stopped[name] = run.last_step()
            assert [row["step"] for row in run.metrics()] == list(range(1, stopped[name] + 1))


@pytest.mark.slow
def test_a_search_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = (*SMOKE, "optimizer.lr=tag(log,interval(1e-4,1e-2))", "model.layers=1,2")
    for count in (2, 3):
        process = swept(tmp_path, *space, "--trials", str(count))
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        assert f"{count} of {count} trials are finished" in output
    rates = [float(trial.values["optimizer.lr"]) for trial in read(tmp_path / "runs/smoke").trials]
    assert len(set(rates)) == 3
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    starts = [path.read_text().count("started: python") for path in tmp_path.glob("runs/smoke/*/logs/rank-0.log")]
    assert starts == [1, 1, 1]


def test_a_search_is_refused_before_it_starts(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(ConfigError, match="optimizer\\.lr=-1"):
        Search([*SMOKE, "optimizer.lr=interval(-1.0,1)"], 2, "eval.loss", 1, tmp_path / "sweep", None)
    with pytest.raises(ConfigError, match="nothing is searched"):
        Search(SMOKE, 2, "eval.loss", 1, tmp_path / "sweep", None)
    assert not list(tmp_path.iterdir())
