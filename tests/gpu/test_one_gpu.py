"""What only a GPU can show, on one of them: `make test-gpu`. Skipped where there is none.

Several GPUs are not asked for: what processes do together is tested over gloo, on CPUs.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.end_to_end.test_refusals import onecurve
from tests.runs import Run, assert_same_bits, assert_same_curve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

STEPS = "train.steps=40"
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def run(folder: Path, *overrides: str, env: dict[str, str] | None = None) -> Run:
    return Run(folder, 1, (STEPS, *overrides), env=env or {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    undisturbed = run(tmp_path_factory.mktemp("cpu") / "run", env=NO_GPU)
    undisturbed.train()
    return undisturbed


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy=single",),
        ("strategy=single", "train.micro_batch=6", "train.activation_checkpointing=full"),
        ("strategy=ddp",),
        ("strategy=fsdp",),
        ("strategy=zero", "strategy.stage=1"),
        ("strategy=zero", "strategy.stage=2"),
        ("strategy=zero", "strategy.stage=3"),
        ("strategy=zero", "strategy.stage=2", "strategy.offload_optimizer=true"),
    ],
    ids=" ".join,
)
def test_the_curve_of_a_cpu(overrides: tuple[str, ...], on_cpu: Run, tmp_path: Path) -> None:
    if "strategy=zero" in overrides:
        pytest.importorskip("deepspeed")
    here = run(tmp_path / "run", *overrides)
    here.train()
    assert all("mem_gib" in row for row in here.metrics())
    assert_same_curve(here, on_cpu, 40)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("point", ["step.after_backward:kill:25", "checkpoint.before_rename:kill:2"])
def test_killed_it_ends_the_same_to_the_bit(precision: str, point: str, tmp_path: Path) -> None:
    """The model's shapes are those of the main job, so that attention is a flash kernel in bf16."""
    shape = ("model.width=128", "model.layers=4", "data.sequence_length=256", f"precision={precision}")
    undisturbed = run(tmp_path / "undisturbed", *shape)
    undisturbed.train()
    killed = run(tmp_path / "killed", *shape)
    command = onecurve("train", "-n", "1", *killed.base, *killed.overrides, f"run.dir={killed.folder}")
    done = subprocess.run([*command, f"debug.faults=[{point}]"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(row["kind"] == "resume" for row in killed.rows("events.jsonl")), "it was not killed"
    assert_same_bits(killed, undisturbed)


def test_from_cpu_to_gpu_and_back(on_cpu: Run, tmp_path: Path) -> None:
    """Killed on a CPU at step 13, on the GPU at step 27, finished on a CPU."""
    folder = tmp_path / "run"
    run(folder, "debug.faults=[step.after_backward:kill:13]", env=NO_GPU).train(expect=-9)
    run(folder, "debug.faults=[step.after_backward:kill:17]").train(expect=-9)
    moved = run(folder, env=NO_GPU)
    moved.train()
    assert_same_curve(moved, on_cpu, 40)


def test_compiled_with_dropout_it_is_the_same_curve(tmp_path: Path) -> None:
    deep = ("model.dropout=0.1", "model.layers=10", "optimizer.lr=0.0005")
    eager, compiled = run(tmp_path / "eager", *deep), run(tmp_path / "compiled", *deep, "train.compile=true")
    eager.train()
    compiled.train()
    assert_same_curve(compiled, eager, 40)


@pytest.mark.parametrize(
    "overrides",
    [("precision=fp8",), ("precision=bf16", "train.compile=true"), ("precision=fp8", "train.compile=true")],
    ids=" ".join,
)
def test_what_only_gpus_do_well(overrides: tuple[str, ...], tmp_path: Path) -> None:
    if "precision=fp8" in overrides:
        pytest.importorskip("torchao")
    here = run(tmp_path / "run", *overrides, "model.width=64")
    here.train()
    fp32 = run(tmp_path / "fp32", "model.width=64")
    fp32.train()
    ours, theirs = here.metrics()[-1]["loss"], fp32.metrics()[-1]["loss"]
    assert ours == pytest.approx(theirs, rel=0.02)


def test_out_of_memory_is_one_block(tmp_path: Path) -> None:
    wide = ("model.width=2048", "model.layers=16", "data.sequence_length=1024", "train.global_batch=1024")
    large = run(tmp_path / "run", *wide)
    command = onecurve("train", "-n", "1", *large.base, *large.overrides, f"run.dir={large.folder}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode not in (0, 2), done.stderr
    first = next(line for line in done.stderr.splitlines() if line.startswith("onecurve: "))
    assert "out of memory" in first, done.stderr


def test_told_to_stop_it_saves_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    shape = ("precision=bf16", "model.width=128", "train.steps=400", "eval.every=0", "checkpoint.every=1000")
    undisturbed, stopped = run(tmp_path / "undisturbed", *shape), run(tmp_path / "stopped", *shape)
    undisturbed.train()
    process = stopped.start()
    while stopped.last_step() < 20:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75, process.communicate()[0]
    assert stopped.status()["state"] == "interrupted"
    assert 20 <= stopped.last_step() < 400
    stopped.train()
    assert_same_bits(stopped, undisturbed)


def test_doctor(tmp_path: Path) -> None:
    done = subprocess.run(onecurve("doctor"), capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert torch.cuda.get_device_name() in done.stdout, done.stdout + done.stderr


WATCHED = """
import sys, time, warnings, torch
from trainer.__main__ import guarded
warnings.simplefilter("always")
torch.cuda.set_sync_debug_mode("warn")
sys.exit(guarded(sys.argv[1:], time.monotonic()))
"""


def test_a_step_waits_for_nothing(tmp_path: Path) -> None:
    """torch's own detector: between two lines of the log the host is never made to wait for the device."""
    waits = {}
    for steps in (20, 40):
        quiet = ("train.log_every=50", "eval.every=0", "checkpoint.every=1000")
        here = run(tmp_path / str(steps), f"train.steps={steps}", *quiet)
        command = [sys.executable, "-c", WATCHED, *here.base, f"run.dir={here.folder}", *here.overrides]
        process = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert process.returncode == 0, process.stdout + process.stderr
        lines = process.stderr.splitlines()
        waits[steps] = sorted(line for line in lines if "synchronizing CUDA" in line)
    assert waits[20], "the detector sees nothing, not even the readings at the end"
    assert waits[40] == waits[20]
