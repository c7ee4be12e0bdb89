"""What `onecurve plan` says of memory against what ranks then take: `python benchmarks/plan_error.py [NAME ...]` writes
plan_error.json, in about 10 minutes on 2 cores.

Each rank builds its strategy and takes two steps on zeros. Measured is the most that torch's allocator has given out at
once: on GPUs torch.cuda.max_memory_allocated, on CPUs the same from torch's profiler, which is told of each allocation
and release. `kernel`: how far the process's resident memory (VmHWM) rose in a run without the profiler, less what it
rises for a model of 0.01M parameters; glibc is told to give back what is freed. The plan is for the fullest rank.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

MODEL = ("model.layers=6", "model.width=256", "model.heads=4", "data.tokenizer=bytes")
WEIGHTS = (*MODEL, "data.sequence_length=32", "train.global_batch=4")  # of which there is more than of activations
TOKENS = (*MODEL, "data.sequence_length=256", "train.global_batch=8")  # the other way round
LLAMA = (
    "model=llama", "model.config.hidden_size=256", "model.config.intermediate_size=768",
    "model.config.num_hidden_layers=6", "model.config.num_attention_heads=4", "model.config.num_key_value_heads=2",
    "data.tokenizer=bytes", "data.sequence_length=128", "train.global_batch=8",
)  # fmt: skip
FULL, HALF = "train.activation_checkpointing=full", "precision=bf16"
PIPELINE = ("strategy=pipeline", "train.activation_checkpointing=none")

CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "single, weights": (1, ("strategy=single", *WEIGHTS)),
    "single, tokens": (1, ("strategy=single", *TOKENS, "train.micro_batch=4")),
    "ddp, weights": (2, ("strategy=ddp", *WEIGHTS)),
    "ddp, tokens": (2, ("strategy=ddp", *TOKENS)),
    "ddp, tokens, recomputed": (2, ("strategy=ddp", FULL, *TOKENS)),
    "ddp, tokens, selective": (2, ("strategy=ddp", "train.activation_checkpointing=selective", *TOKENS)),
    "ddp, tokens, bf16": (2, ("strategy=ddp", HALF, *TOKENS)),
    "fsdp, weights": (4, ("strategy=fsdp", *WEIGHTS)),
    "fsdp, tokens": (2, ("strategy=fsdp", *TOKENS)),
    "fsdp, tokens, recomputed": (2, ("strategy=fsdp", FULL, *TOKENS)),
    "fsdp, weights, bf16": (2, ("strategy=fsdp", HALF, *WEIGHTS)),
    "fsdp, weights, bf16, recomputed": (2, ("strategy=fsdp", HALF, FULL, *WEIGHTS)),
    "fsdp, accumulated": (2, ("strategy=fsdp", *TOKENS, "train.micro_batch=2")),
    "hsdp 2 x 2, weights": (4, ("strategy=hsdp", "strategy.shard_size=2", *WEIGHTS)),
    "zero 0, weights": (2, ("strategy=zero", "strategy.stage=0", *WEIGHTS)),
    "zero 1, weights": (2, ("strategy=zero", "strategy.stage=1", *WEIGHTS)),
    "zero 2, weights": (2, ("strategy=zero", "strategy.stage=2", *WEIGHTS)),
    "zero 3, weights": (2, ("strategy=zero", "strategy.stage=3", *WEIGHTS)),
    "zero 3, tokens": (2, ("strategy=zero", "strategy.stage=3", *TOKENS)),
    "zero 3, tokens, recomputed": (2, ("strategy=zero", "strategy.stage=3", FULL, *TOKENS)),
    "pipeline 1f1b, weights": (2, (*PIPELINE, *WEIGHTS)),
    "pipeline 1f1b, tokens": (4, (*PIPELINE, *TOKENS)),
    "pipeline gpipe, tokens": (2, (*PIPELINE, "strategy.schedule=gpipe", *TOKENS)),
    "pipeline zero bubble, tokens": (2, (*PIPELINE, "strategy.schedule=interleaved_zero_bubble", *TOKENS)),
    "pipeline 2 x fsdp 2, tokens": (4, (*PIPELINE, "strategy.stages=2", "strategy.data_parallel=fsdp", *TOKENS)),
    "pipeline 2 x ddp 2, weights": (4, (*PIPELINE, "strategy.stages=2", *WEIGHTS)),
    "tensor 2, tokens": (2, ("strategy=fsdp", "strategy.tensor_parallel=2", *TOKENS)),
    "tensor 2 x fsdp 2, sequences": (
        4, ("strategy=fsdp", "strategy.tensor_parallel=2", "strategy.sequence_parallel=true", *TOKENS)
    ),
    "llama, ddp": (2, ("strategy=ddp", *LLAMA)),
    "llama, fsdp, recomputed": (2, ("strategy=fsdp", FULL, *LLAMA)),
    "llama, pipeline": (2, (*PIPELINE, *LLAMA)),
}  # fmt: skip
COMMON = ("experiment=none",)
TINY = (1, ("strategy=single", "model.layers=1", "model.width=32", "model.heads=1", "data.tokenizer=bytes"))


def planned(procs: int, overrides: tuple[str, ...]) -> list[int]:
    """Bytes of each place, for the device that is here."""
    from launch.planning.memory import Accountant
    from launch.planning.subject import Subject
    from trainer.config.compose import load
    from trainer.precision import Precision

    config = load([*COMMON, *overrides], procs)
    import torch

    here = Precision.resolve(config.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    precision = Precision(torch.device("cpu"), here.compute, here.param, here.reduce)
    return [parts.total for parts in Accountant(Subject(config, precision), config, procs).peaks()]


def measured(procs: int, overrides: tuple[str, ...], how: str) -> list[float]:
    """Bytes of each rank."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={procs}"] if procs > 1 else []
        command = [sys.executable, *launcher, __file__, "--rank", folder, how, *COMMON, *overrides]
        glibc = {"MALLOC_MMAP_THRESHOLD_": "131072"} if how == "kernel" else {}
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **glibc})
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        return [float((Path(folder) / str(rank)).read_text()) for rank in range(procs)]


def rank(folder: str, how: str, *overrides: str) -> None:
    """One rank: two steps of its strategy, without a loop and without data."""
    import torch

    from launch.planning.subject import example
    from trainer import topology
    from trainer.build import build_strategy
    from trainer.config.compose import load
    from trainer.inputs import tokenizer_of

    torch.set_num_threads(1)
    config = load(list(overrides), topology.world_size())
    ranks = topology.join(120, config.layout(topology.world_size()))
    stream = SimpleNamespace(share=SimpleNamespace(example=lambda: example(config)))
    inputs = SimpleNamespace(tokenizer=tokenizer_of(config), stream=stream)
    rows = config.train.global_batch // ranks.dp_size
    micro = min(config.train.micro_batch or rows, rows)
    batch = {name: value.expand(micro, *value.shape[1:]).clone() for name, value in example(config).items()}
    on_gpu, kernel = ranks.device.type == "cuda", how == "kernel"
    before = _status("VmRSS")
    profiler: Any = nullcontext() if on_gpu or kernel else torch.autograd.profiler.profile(profile_memory=True)
    with profiler:
        strategy = build_strategy(config, ranks, cast(Any, inputs))
        for _ in range(2):
            strategy.train_step([batch] * (rows // micro))
            strategy.update(1e-4)
    if kernel:
        found = float(_status("VmHWM") - before)
    else:
        found = torch.cuda.max_memory_allocated() if on_gpu else _peak(profiler)
    (Path(folder) / str(ranks.rank)).write_text(str(found))
    strategy.close()
    ranks.close()


def _peak(profiler: Any) -> int:
    alive = most = 0
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def _status(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def main(names: list[str], kernel: bool, again: bool) -> None:
    """`again`: only plan again, and compare with what was measured before."""
    path = Path(__file__).with_suffix(".json")
    result = json.loads(path.read_text()) if path.exists() and (names or again) else {"cases": {}}
    own = measured(*TINY, "kernel")[0] if kernel else 0.0
    for name, (procs, overrides) in CASES.items():
        row = result["cases"].get(name, {})
        if (names and not any(wanted in name for wanted in names)) or (again and not row):
            continue
        row |= {"processes": procs, "planned_mb": max(planned(procs, overrides)) / 1e6}
        if not again:
            row["measured_mb"] = max(measured(procs, overrides, "allocator")) / 1e6
        if kernel:
            row["kernel_mb"] = (max(measured(procs, overrides, "kernel")) - own) / 1e6
        row["error"] = row["planned_mb"] / row["measured_mb"] - 1
        beside = ""
        if "kernel_mb" in row:
            row["error_kernel"] = row["planned_mb"] / row["kernel_mb"] - 1
            beside = f"  kernel {row['kernel_mb']:7.1f} ({row['error_kernel']:+.1%})"
        result["cases"][name] = {key: round(value, 4) for key, value in row.items()}
        print(
            f"{name:34} {procs} planned {row['planned_mb']:7.1f} MB  measured {row['measured_mb']:7.1f}  "
            f"{row['error']:+.1%}{beside}",
            flush=True,
        )
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(*sys.argv[2:])
    else:
        flags = {"--kernel", "--again"}
        main([argument for argument in sys.argv[1:] if argument not in flags], *(f in sys.argv for f in sorted(flags, reverse=True)))
