"""What looking after a run costs a step: `python benchmarks/survival.py` writes survival.json, in 3 minutes.

One process trains the main job's model in one run. Every 20 steps watchdog and guards (spikes of norms and losses by a
window of 128 steps) are switched off or on, and the times of neighboring blocks compared: a bound as wide as the
machine is noisy. Each part is timed by itself, too: the guards' work, the processor time of the watchdog's thread, and
a call of a fault point times the calls of a step.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from trainer import fault_points, loop, run
from trainer.build import build
from trainer.config.compose import load
from trainer.data.stream import StepData
from trainer.job import Job
from trainer.resilience.guard import Guard

BLOCK, BLOCKS = 20, 31
POINTS_A_STEP = 40  # six in the loop, one a micro-batch, one a sequence that is read (24), those of saves
CONFIG = (
    "experiment=shakespeare", "strategy=single", "train.global_batch=24", f"train.steps={BLOCK * BLOCKS}",
    "checkpoint.every=0", "eval.every=0", "eval.steps=1", "sample.count=0", "track.report=false", "track.console=false",
    "track.wandb.mode=disabled", "guard.norm_spike=1000", "guard.loss_spike=1000", "data.workers=1",
)  # fmt: skip


class Switching:
    """The run's stream, which switches at each block and keeps the time of the last one."""

    def __init__(self, stream: Any, job: Job, watchdog: Any):
        self.stream, self.job, self.watchdog = stream, job, watchdog
        self.activities, self.started_at, self.watchdog_share = list(watchdog.activities), time.perf_counter(), 0.0
        self.loss_s, mean_loss = 0.0, loop.mean_loss

        def timed(*arguments: Any) -> float:
            loss_start = time.perf_counter()
            loss = mean_loss(*arguments)
            self.loss_s += time.perf_counter() - loss_start
            return loss

        loop.mean_loss = timed
        self.guards, self.steps, self.block_start = job.resilience.guard.windows, 0, (0.0, 0.0)
        self.blocks: list[tuple[float, float]] = []  # seconds by the clock and of the processor; odd ones are guarded

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __next__(self) -> StepData:
        if self.steps % BLOCK == 0:
            now = time.perf_counter(), time.process_time()
            if self.steps:
                self.blocks.append((now[0] - self.block_start[0], now[1] - self.block_start[1]))
            guarded = len(self.blocks) % 2 == 1
            self.job.resilience.guard.windows = self.guards if guarded else {}
            self.watchdog.activities[:] = self.activities if guarded else []
            self.block_start = time.perf_counter(), time.process_time()
            self.watchdog_share = thread_seconds("watchdog") / (time.perf_counter() - self.started_at)
        self.steps += 1
        return next(self.stream)


def measure() -> dict[str, Any]:
    streams: list[Switching] = []

    def build_switching(*arguments: Any) -> Job:
        job, watchdog = build(*arguments), arguments[7]
        job.stream = Switching(job.stream, job, watchdog)  # type: ignore[assignment]
        streams.append(job.stream)  # type: ignore[arg-type]
        return job

    run.build = build_switching  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        run.run(load([*CONFIG, f"run.dir={folder}/run"]), time.monotonic())
    blocks = streams[0].blocks[1:]  # the first one warms up
    pairs = [(blocks[i], blocks[i + 1]) if i % 2 else (blocks[i + 1], blocks[i]) for i in range(len(blocks) - 1)]
    step_s = statistics.median(off[0] for off, _ in pairs) / BLOCK
    parts = {
        "guards": 100 * (guard_s() + streams[0].loss_s / streams[0].steps * 2) / step_s,  # every other block has them
        "watchdog": 100 * streams[0].watchdog_share,
        "fault points": 100 * POINTS_A_STEP * call_s() / step_s,
    }
    return {
        "step_ms, off": round(1000 * step_s, 2),
        "each part by itself, % of a step": {name: round(value, 4) for name, value in parts.items()},
        "their sum, % of a step": round(sum(parts.values()), 3),
        "watchdog and guards, % of a step, by the clock": percent([on[0] / off[0] for off, on in pairs]),
        "watchdog and guards, % of a step, of the processor": percent([on[1] / off[1] for off, on in pairs]),
    }


def thread_seconds(name: str) -> float:
    """Returns the processor time of a thread so far, in seconds."""
    (thread,) = [thread for thread in threading.enumerate() if thread.name == name]
    fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percent(ratios: list[float]) -> dict[str, float]:
    """Returns the median, and the standard error of the mean."""
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    return {"median": round(100 * (statistics.median(ratios) - 1), 3), "standard error": round(100 * error, 3)}


def call_s() -> float:
    """Returns the seconds of a call of a fault point where nothing is armed."""
    begin = time.perf_counter()
    for _ in range(1_000_000):
        fault_points.point("step.after_update")
    return (time.perf_counter() - begin) / 1_000_000


def guard_s() -> float:
    config = load(CONFIG).guard
    guard, norm, no = Guard(config, torch.device("cpu")), torch.tensor(1.0), torch.tensor(False)
    begin = time.perf_counter()
    for _ in range(2000):
        guard.limit(2.0)
        guard.record(norm, 2.0, no)
    return (time.perf_counter() - begin) / 2000


if __name__ == "__main__":
    result = measure()
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
