"""What is wrong is said once, in one block, with code 2, before anything exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from webdataset import TarWriter

from tests.runs import TINY, Run


def refused(arguments: list[str], cwd: Path, code: int = 2) -> list[str]:
    """Runs a command that must be refused; the problems of its block. Nothing may appear in `cwd`."""
    before = sorted(cwd.rglob("*"))
    done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("onecurve: ")
    assert lines[0].endswith("nothing was started:")
    assert sorted(cwd.rglob("*")) == before
    return [line.strip() for line in lines[1:]]


def trainer(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "trainer", *overrides]


def onecurve(*arguments: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        "import sys; from launch.cli import main; sys.argv[0] = 'onecurve'; main()",
        *arguments,
    ]


def test_config(tmp_path: Path) -> None:
    problems = refused(trainer("train.stpes=5", "train.steps=abc", "strategy=ddb"), tmp_path)
    assert problems == [
        "strategy=ddb: no such option; did you mean 'ddp'?",
        "train.steps=abc: should be a valid integer, unable to parse string as an integer",
        "train.stpes: no such key; did you mean 'train.steps'?",
    ]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there they may be had")
def test_what_this_machine_does_not_have(tmp_path: Path) -> None:
    wanted = ("precision=fp8", "optimizer.implementation=apex", "model.bias=true", "model.fused_norm=true")
    kept = [override for override in TINY if not override.startswith("precision")]
    fp8, norm, apex = refused(trainer(*kept, *wanted), tmp_path)
    assert fp8.startswith("precision.compute=fp8: needs a GPU with fp8 units")
    assert fp8.endswith("here: no GPU; nearest: precision=bf16")
    assert apex.startswith("optimizer.implementation=apex: NVIDIA Apex is not installed")
    assert apex.endswith("nearest: optimizer.implementation=fused")
    assert norm.startswith("model.fused_norm=true: NVIDIA Apex is not installed")


def test_batch_on_two_processes(tmp_path: Path) -> None:
    command = onecurve("train", "-n", "2", "train.global_batch=7", "train.micro_batch=2")
    (problem,) = refused(command, tmp_path)
    assert "2 processes x train.micro_batch=2 = 4" in problem


@pytest.mark.slow
def test_under_torchrun_one_rank_speaks(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "trainer", "train.stpes=5"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.count("did you mean 'train.steps'?") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "launcher",
    [trainer, pytest.param(lambda *rest: onecurve("train", "-n", "2", *rest), marks=pytest.mark.slow)],
)
def test_missing_shards(launcher, tmp_path: Path) -> None:
    problems = refused(launcher(*TINY, "data=webdataset", "data.shards='gone-{0..2}.tar'"), tmp_path)
    assert problems == [f"data.shards: missing file gone-{number}.tar" for number in range(3)]


def test_unwritable_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (problem,) = refused(trainer(*TINY, "run.dir=file/run"), tmp_path)
    assert "run.dir=file/run: cannot be written: Not a directory; choose another run.dir" in problem
    if os.getuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        (problem,) = refused(trainer(*TINY, "run.dir=closed/run"), tmp_path)
        assert "Permission denied" in problem


@pytest.mark.slow
def test_another_run_in_the_folder(tmp_path: Path) -> None:
    """What the run is may not change; where and how it runs may, and so may its length, which is recorded."""
    run = Run(tmp_path / "run", overrides=("train.steps=10",))
    run.train()
    problems = refused([*run.command, "run.seed=2", "model.width=64", "data.sequence_length=32"], tmp_path)
    assert any("model.width: the run has 32, this command 64" in problem for problem in problems)
    assert any("run.seed: the run has 1337, this command 2" in problem for problem in problems)
    assert any("sequence_length: the run has 48, this command 32" in problem for problem in problems)
    assert "run.fresh=true" in problems[-1]

    run.overrides = ("train.steps=15", "optimizer.lr=0.001", "train.micro_batch=3")
    run.train()
    (changed,) = [event["changes"] for event in run.rows("events.jsonl") if event["kind"] == "config_changed"]
    assert changed["train.steps"] == [10, 15]
    assert changed["optimizer.lr"] == [0.002, 0.001]
    assert [row["step"] for row in run.metrics()] == list(range(1, 16))

    (problem,) = refused([*run.command, "train.steps=12"], tmp_path)
    assert problem == "train.steps=12: this run has done 15 steps already"

    run.overrides = ("train.steps=5", "run.seed=2", "run.fresh=true")
    run.train()
    assert len(run.metrics()) == 5
    assert len(Run(tmp_path / "run.old-1").metrics()) == 15


@pytest.mark.slow
def test_other_data_in_the_words_of_the_config(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        with TarWriter(str(tmp_path / f"{name}.tar")) as tar:
            for i in range(40):
                tar.write(
                    {"__key__": f"{name}{i}", "txt": "words of one piece, then of another"[: 20 + ord(name) - 97]}
                )
    mixed = "{{x: {{shards: {0}/{1}.tar, weight: {2}}}, y: {{shards: {0}/b.tar, weight: 1}}}}"
    run = Run(tmp_path / "run", overrides=("data=webdataset", "data.validation=null", "train.steps=3"))
    run.overrides += ("data.sources=" + mixed.format(tmp_path, "a", 1),)
    run.train()
    subprocess.run(onecurve("data", "index", "c.tar"), cwd=tmp_path, check=True, capture_output=True)
    other = "data.sources=" + mixed.format(tmp_path, "c", 2)
    problems = refused([*run.command, other], tmp_path)
    assert problems[0].startswith("data.sources.x.shards: not the shards that the run began with")
    assert problems[1] == "data.sources, weights: the run has [1.0, 1.0], this command [2.0, 1.0]"
    run.overrides += ("data.reweight={3: {x: 1, y: 2}}", "train.steps=5")  # what is to come may change
    run.train()


@pytest.mark.slow
def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", overrides=("train.steps=2000",))
    process = run.start()
    try:
        while len(run.metrics()) < 2:
            assert process.poll() is None
        done = subprocess.run(run.command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert "another process trains in this folder" in done.stderr
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_diverging_training_stops_with_advice(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", overrides=("train.steps=20", "optimizer.lr=1e30", "schedule.warmup_steps=0"))
    output = run.train(expect=4)
    assert "not finite" in output
    assert re.search(r"Lower optimizer.lr \(now \d", output)
    assert run.status()["state"] == "failed"
    assert run.status()["exit_code"] == 4


def bad_text(folder: Path) -> tuple[str, ...]:
    """Shards in which one payload is not text: found only when its turn comes."""
    with tarfile.open(folder / "bad.tar", "w") as tar:
        for number in range(40):
            path = folder / f"{number}.txt"
            path.write_bytes(b"to be or not to be " * 40 if number != 11 else b"\xff\xfe\xfd" * 99)
            tar.add(path, path.name)
    return ("data=webdataset", f"data.shards={folder}/bad.tar", "train.steps=200")


@pytest.mark.parametrize("procs", [1, 2])
def test_a_bad_sample_stops_with_its_name(procs: int, tmp_path: Path) -> None:
    """Code 3, told once, by the rank that met it; the run's status says the same."""
    run = Run(tmp_path / "run", procs, bad_text(tmp_path))
    output = run.train(expect=3)
    assert output.count("bad.tar") == 1
    status = run.status()
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert "bad.tar" in status["reason"]
    assert "11" in status["reason"]


@pytest.mark.slow
def test_a_damaged_shard_is_found_before_the_start(tmp_path: Path) -> None:
    """Code 3, and the place named; 2 where the command itself is wrong too."""
    overrides = bad_text(tmp_path)
    with open(tmp_path / "bad.tar", "r+b") as file:
        file.seek(5 * 1536)
        file.write(b"x" * 300)
    (problem,) = refused(trainer(*TINY, *overrides), tmp_path, code=3)
    assert "bad.tar: byte" in problem
    (problem,) = refused(onecurve("train", "-n", "2", *TINY, *overrides), tmp_path, code=3)
    assert "bad.tar: byte" in problem
    problems = refused(trainer(*TINY, *overrides, "data.tokenizer=gone.json"), tmp_path, code=2)
    assert len(problems) == 2
