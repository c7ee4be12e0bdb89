"""What `onecurve plan` says of memory against what ranks then take: `python benchmarks/plan_error.py [NAME ...]` writes
plan_error.json, in about 10 minutes on 2 cores; on a GPU other cases, of one process, and plan_error_gpu.json.

Each rank builds its strategy and takes two steps on zeros. Measured is the most memory that was given out at once: on
GPUs torch.cuda.max_memory_allocated; on CPUs glibc's own record of it (`malloc_stats`: max mmap bytes), told to map all
that takes 32 KiB or more on its own (MALLOC_MMAP_THRESHOLD_), less what was given out before the model was built. It
counts every thread, and neither holes nor Python's own. torch's profiler, tried first, is not told of what gloo's
threads release. Plan and measurement are of the fullest rank.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
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
    "pipeline zbv, tokens": (2, (*PIPELINE, "strategy.schedule=zbv", *TOKENS)),
    "pipeline zero bubble, weights": (2, (*PIPELINE, "strategy.schedule=interleaved_zero_bubble", *WEIGHTS)),
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
SHARDS = ("data=webdataset", "data.shards=none.tar")
GPT2 = (
    *SHARDS,
    "model.layers=12", "model.width=768", "model.heads=12", "data.tokenizer=@50257", "data.sequence_length=1024",
    "train.global_batch=16",
)  # fmt: skip
BILLION = (
    *SHARDS,
    "model=llama", "model.config.hidden_size=2048", "model.config.intermediate_size=5632",
    "model.config.num_hidden_layers=16", "model.config.num_attention_heads=32", "model.config.num_key_value_heads=8",
    "data.tokenizer=@32000", "data.sequence_length=2048", "train.global_batch=4",
)  # fmt: skip
GPU_CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "gpt2 124M, fp32": (1, ("precision=fp32", *GPT2)),
    "gpt2 124M, bf16": (1, (HALF, *GPT2)),
    "gpt2 124M, bf16, selective": (1, (HALF, "train.activation_checkpointing=selective", *GPT2)),
    "gpt2 124M, bf16, recomputed": (1, (HALF, FULL, *GPT2)),
    "gpt2 124M, bf16, accumulated": (1, (HALF, "train.micro_batch=4", *GPT2)),
    "gpt2 124M, fp16": (1, ("precision=fp16", *GPT2)),
    "gpt2 124M, muon, bf16": (1, (HALF, "optimizer=muon", "train.micro_batch=4", *GPT2)),
    "llama 1B, bf16": (1, (HALF, *BILLION)),
    "llama 1B, bf16, recomputed": (1, (HALF, FULL, *BILLION)),
    "llama 1B, bf16, 1 sequence": (1, (HALF, "train.micro_batch=1", *BILLION)),
    "gpt2 124M, bf16, zero 1": (1, (HALF, "strategy=zero", "strategy.stage=1", *GPT2)),
    "gpt2 124M, bf16, zero 3": (1, (HALF, "strategy=zero", "strategy.stage=3", *GPT2)),
}
COMMON = ("experiment=none",)


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@cache
def vocabulary(size: str) -> str:
    """Writes a tokenizer.json of that many tokens and returns its path."""
    from tokenizers import Tokenizer, models

    words = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, int(size))}}
    file = Path(_scratch().name) / f"{size}.json"
    Tokenizer(models.WordLevel(words, unk_token="w1")).save(str(file))
    return str(file)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def plan_bytes(procs: int, overrides: tuple[str, ...]) -> list[int]:
    """Returns the planned bytes of each stage, for the device of this machine."""
    from launch.planning.memory import accountant
    from launch.planning.planned_model import PlannedModel
    from trainer.config.compose import load
    from trainer.precision import Precision

    config = load([*COMMON, *overrides], procs)
    import torch

    resolved = Precision.resolve(config.precision, torch.device("cuda" if on_gpu() else "cpu"))
    precision = Precision(torch.device("cpu"), resolved.compute, resolved.param, resolved.reduce)
    return [parts.total for parts in accountant(PlannedModel(config, precision), config, procs).peaks()]


def measure_bytes(procs: int, overrides: tuple[str, ...]) -> list[float]:
    """Runs two steps and returns the measured bytes of each rank."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={procs}"] if procs > 1 else []
        command = [sys.executable, *launcher, __file__, "--rank", folder, *COMMON, *overrides]
        glibc = {"MALLOC_MMAP_THRESHOLD_": "32768"}
        process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **glibc})
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{process.stderr[-3000:]}")
        return [float((Path(folder) / str(rank)).read_text()) for rank in range(procs)]


def rank(folder: str, *overrides: str) -> None:
    """Runs one rank: two steps of its strategy, without a loop and without data."""
    import torch

    from launch.planning.planned_model import example
    from trainer import topology
    from trainer.config.compose import load
    from trainer.run_data import tokenizer_of
    from trainer.strategies.build import build_strategy

    torch.set_num_threads(1)
    config = load(list(overrides), topology.world_size())
    ranks = topology.join(120, config.layout(topology.world_size()))
    stream = SimpleNamespace(share=SimpleNamespace(example=lambda: example(config)))
    inputs = SimpleNamespace(tokenizer=tokenizer_of(config), stream=stream)
    rows = config.train.global_batch // ranks.dp_size
    micro = min(config.train.micro_batch or rows, rows)
    batch = {name: value.expand(micro, *value.shape[1:]).clone() for name, value in example(config).items()}
    bytes_before = mapped_bytes()[0]
    strategy = build_strategy(config, ranks, cast(Any, inputs))
    for _ in range(2):
        strategy.train_step([batch] * (rows // micro))
        strategy.update(1e-4)
    most_bytes = torch.cuda.max_memory_allocated() if on_gpu() else mapped_bytes()[1] - bytes_before
    (Path(folder) / str(ranks.rank)).write_text(str(most_bytes))
    strategy.close()
    ranks.close()


def mapped_bytes() -> tuple[int, int]:
    """Returns the bytes that glibc has mapped for this process now, and the most that they ever were."""
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        ctypes.CDLL(None).malloc_stats()
        os.dup2(stderr, 2)
        os.close(stderr)
        file.seek(0)
        text = file.read().decode()
    most = int(re.findall(r"max mmap bytes\s*=\s*(\d+)", text)[-1])
    return mapped_now(), most


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _names_ = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names_.split()]


def mapped_now() -> int:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo
    return int(libc.mallinfo2().hblkhd)


def main(names: list[str], only_plan: bool) -> None:
    """Measures the cases; with `only_plan`, plans again and compares with earlier measurements."""
    path = Path(__file__).with_name("plan_error_gpu.json" if on_gpu() else "plan_error.json")
    result = json.loads(path.read_text()) if path.exists() and (names or only_plan) else {"cases": {}}
    for name, (procs, words) in (GPU_CASES if on_gpu() else CASES).items():
        overrides = tuple(re.sub("@([0-9]+)$", lambda match: vocabulary(match[1]), part) for part in words)
        row = result["cases"].get(name, {})
        if (names and not any(text in name for text in names)) or (only_plan and not row):
            continue
        row |= {"processes": procs, "planned_mb": max(plan_bytes(procs, overrides)) / 1e6}
        if not only_plan:
            row["measured_mb"] = max(measure_bytes(procs, overrides)) / 1e6
        row["error"] = row["planned_mb"] / row["measured_mb"] - 1
        result["cases"][name] = {key: round(value, 4) for key, value in row.items()}
        print(
            f"{name:34} {procs}  planned {row['planned_mb']:7.1f} MB  measured {row['measured_mb']:7.1f} MB  "
            f"{row['error']:+.1%}",
            flush=True,
        )
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(*sys.argv[2:])
    else:
        main([argument for argument in sys.argv[1:] if argument != "--again"], "--again" in sys.argv)
