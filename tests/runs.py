"""Real runs for tests: start them as a person would, watch them, kill them, read what they left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests import forks
from trainer.checkpoint.format import verify
from trainer.checkpoint.load import FoundCheckpoint, read_all
from trainer.checkpoint.retention import complete_checkpoints

# Small enough for seconds, with everything in it: two layers, accumulation possible, all topologies up to 4 divide.
# The learning rate is one at which the model's gradient is a tame function of its weights: at 0.01 a relative change of
# 2e-7 in the weights moves the fp64 gradient by 2e-3 from step 20 on, and no two orders of summation would agree.
TINY = (
    "model.layers=2", "model.width=32", "model.heads=2", "data.tokenizer=bytes", "data.sequence_length=48",
    "train.global_batch=24", "schedule.warmup_steps=10", "optimizer.lr=0.002", "eval.every=25", "eval.steps=1",
    "checkpoint.every=10", "sample.count=0", "track.report=false", "data.ledger=true", "precision=fp32",
)  # fmt: skip


class Launched:
    """A run in processes of its own, watched as one of the fork server is."""

    def __init__(self, run: Run):
        self._run, self._process = run, run.start()

    def running(self, timeout: float = 0.0) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        return self._process.returncode is None

    def signal(self, number: signal.Signals) -> None:
        for process in self._run.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def end(self) -> tuple[list[int], str]:
        output, _ = self._process.communicate(timeout=300)
        return [self._process.returncode], output


@dataclass
class Run:
    """A run's folder and the command that trains it."""

    folder: Path
    procs: int = 1
    overrides: tuple[str, ...] = ()
    plain: bool = False  # python -m trainer instead of torchrun
    launcher: bool = False  # also `train` starts a launcher: imports and all
    env: dict[str, str] = field(default_factory=dict)
    base: tuple[str, ...] = TINY

    @property
    def command(self) -> list[str]:
        launcher = [sys.executable]
        if not (self.plain or self.procs == 1):
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.procs)]
        return [*launcher, "-m", "trainer", *self.base, f"run.dir={self.folder}", *self.overrides]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.env},
            cwd=self.folder.parent,
        )

    def begin(self) -> forks.Job | Launched:
        """Starts the ranks by the fork server of this test process: no imports, no launcher. Not a run that finds its
        config in the folder where it is started."""
        if any(part.startswith("--") for part in self.overrides):
            return Launched(self)
        return forks.Job([*self.base, f"run.dir={self.folder}", *self.overrides], self.procs)

    def train(self, expect: int = 0) -> str:
        """Runs to its end, by the fork server of this test process; gives the output. Checks the exit code."""
        of_users = any("plugins=" in part or part.startswith("--") for part in self.overrides)  # found in their folder
        if self.env or self.launcher or of_users:
            return self._train_by_torchrun(expect)
        codes, output = self.begin().end()
        assert set(codes) == {expect} or (self.procs > 1 and expect in codes), f"exit codes {codes}\n{output}"
        return output

    def _train_by_torchrun(self, expect: int) -> str:
        """The same as a user of torchrun does it, which turns every failure into 1."""
        process = self.start()
        output, _ = process.communicate(timeout=300)
        if expect and self.procs > 1:
            expect = 1
        assert process.returncode == expect, f"exit code {process.returncode}\n{output}"
        return output

    def kill_at(self, step: int) -> int:
        """Starts, waits until `step` is recorded, then kills every process. Gives the last step recorded."""
        return self._kill_when(lambda: self.last_step() >= step, f"step {step}")

    def kill_in_checkpoint(self, step: int) -> None:
        """Kills every process while the checkpoint of `step` is being written."""
        attempts = f".attempt-step-{step:08d}-*"
        self._kill_when(lambda: any((self.folder / "checkpoints").glob(attempts)), f"the save of step {step}")
        assert any((self.folder / "checkpoints").glob(attempts)), "the kill came too late"

    def _kill_when(self, condition: Callable[[], bool], what: str) -> int:
        job, deadline = self.begin(), time.monotonic() + 200
        while not condition():
            assert job.running(timeout=0.002), f"ended before {what}:\n{job.end()[1]}"
            assert time.monotonic() < deadline, f"did not reach {what}"
        job.signal(signal.SIGKILL)
        job.end()
        return self.last_step()

    def processes(self) -> list[int]:
        """Launcher and ranks of this run, orphans too: all that name its folder on their command line."""
        mine = f"run.dir={self.folder}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if mine in entry.read_bytes().split(b"\0"):
                    found.append(int(entry.parent.name))
        return found

    def rows(self, name: str) -> list[dict]:
        path = self.folder / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def metrics(self) -> list[dict]:
        return self.rows("metrics.jsonl")

    def last_step(self) -> int:
        """The newest step recorded; 0 before the first (a resumed run cuts the file back)."""
        return next((row["step"] for row in reversed(self.metrics())), 0)

    def ledger(self) -> list[dict]:
        return self.rows("ledger.jsonl")

    def status(self) -> dict:
        return json.loads((self.folder / "status.json").read_text())

    def curve(self) -> list[tuple]:
        """What must be the same in every life: all but the timings, and what of a GPU's memory a life has used."""
        of_a_life = {"step_s", "data_wait_s", "tokens_per_s", "mfu", "mem_gib"}
        return [
            tuple((name, str(value)) for name, value in row.items() if name not in of_a_life) for row in self.metrics()
        ]

    def weights(self) -> dict[str, torch.Tensor]:
        """Every tensor of the newest checkpoint: model, optimizer."""
        path = complete_checkpoints(self.folder / "checkpoints")[-1]
        return read_all(FoundCheckpoint(path, verify(path)))


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, by /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        children = [child for child, its_parent in parents.items() if its_parent == parent]
        found += children
        todo += children
    return found


def assert_same_bits(one: Run, other: Run) -> None:
    """Ledger, curve, weights and optimizer state equal to the last bit."""
    assert one.ledger() == other.ledger()
    assert one.curve() == other.curve()
    ours, theirs = one.weights(), other.weights()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def assert_same_curve(one: Run, other: Run, steps: int, weights: float = 1e-4) -> None:
    """Invariant I3: equal ledgers, loss within 1e-5 and gradient norm within 1e-4 relative on each of the steps,
    and weights that agree as far as that lets them."""
    assert one.ledger()[:steps] == other.ledger()[:steps]
    ours, theirs = one.metrics()[:steps], other.metrics()[:steps]
    assert len(ours) == len(theirs) == steps
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-5 * abs(b["loss"]), (a, b)
        assert abs(a["grad_norm"] - b["grad_norm"]) <= 1e-4 * abs(b["grad_norm"]), (a, b)
    a_weights, b_weights = one.weights(), other.weights()
    for name in a_weights:
        if name.startswith("model/"):
            torch.testing.assert_close(a_weights[name], b_weights[name], rtol=weights, atol=weights)
