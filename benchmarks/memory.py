"""How much memory a process of each strategy takes: `python benchmarks/memory.py` writes memory.json, in 12 minutes.

A GPT of 85M parameters (fp32: 341 MB; gradients and AdamW's state three times as much again) takes steps on 4
processes. Peaks are the kernel's (VmHWM) up to the second step, less those of the same command with a model of 0.01M,
which are Python's and torch's own. glibc is told to give back what is freed: else the holes in its heap are measured.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROCESSES, LAYERS, WIDTH = 4, 12, 768
STRATEGIES = {
    "ddp": ["strategy=ddp"],
    "fsdp": ["strategy=fsdp"],
    "hsdp, 2 x 2": ["strategy=hsdp", "strategy.shard_size=2"],
    "zero 3": ["strategy=zero", "strategy.stage=3"],
    "zero 3, buckets of 10 MiB": ["strategy=zero", "strategy.stage=3", "strategy.bucket_mb=10"],
    "pipeline": ["strategy=pipeline"],
    "pipeline 2 x fsdp 2": ["strategy=pipeline", "strategy.stages=2", "strategy.data_parallel=fsdp"],
    "tensor 2 x fsdp 2": ["strategy=fsdp", "strategy.tensor_parallel=2"],
}
COMMON = [
    "experiment=smoke", "train.steps=4", "train.log_every=1", "train.global_batch=4", "data.sequence_length=32",
    "schedule.warmup_steps=1", "eval.every=0", "checkpoint.every=0", "sample.count=0", "track.report=false",
    "track.wandb.mode=disabled", "track.console=false",
]  # fmt: skip


def peaks(overrides: list[str]) -> list[float]:
    """Returns the most resident memory of each rank up to its second step, MB."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
        command = [sys.executable, *launcher, "-m", "trainer", *COMMON, *overrides, f"run.dir={folder}/run"]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        peak_of_process: dict[int, float] = {}
        metrics, steps = Path(folder) / "run" / "metrics.jsonl", 0
        while process.poll() is None:
            if steps < 2:  # behind the last one comes a checkpoint, which is a copy
                peak_of_process |= dict(ranks(process.pid))
                steps = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            time.sleep(0.02)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return sorted(peak_of_process.values())[-PROCESSES:]


def ranks(launcher: int) -> Iterator[tuple[int, float]]:
    """Yields (process, its peak so far in MB) of the launcher's children."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError, TypeError):
            text = status.read_text()
            if re.search(rf"^PPid:\s+{launcher}$", text, re.M):
                yield int(status.parent.name), int(re.search(r"VmHWM:\s+(\d+)", text)[1]) / 1000  # type: ignore[index]


def main() -> None:
    small = statistics.median(peaks(["strategy=ddp", "model.layers=1", "model.width=32", "model.heads=1"]))
    shape = [f"model.layers={LAYERS}", f"model.width={WIDTH}", "model.heads=12"]
    above_mb = {}
    for name, overrides in STRATEGIES.items():
        above_mb[name] = [round(peak - small) for peak in peaks([*overrides, *shape])]
        print(f"{name:12} {above_mb[name]} MB a process above {small:.0f} MB")
    result = {"cpus": os.cpu_count(), "processes": PROCESSES, "own_mb": round(small), "above_mb": above_mb}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
