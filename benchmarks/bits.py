"""What `train.deterministic=topology` costs against the default: time of a step, bytes sent, memory.

python benchmarks/bits.py    writes benchmarks/bits.json

The main job's model on 2 processes with a thread each. Both ways are set up side by side in one group of processes and
take turns, ROUNDS times STEPS steps each; memory is the largest resident set of processes that do only one of them.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from trainer import topology
from trainer.config.compose import load
from trainer.data.deal import Deal
from trainer.data.tokenizer import load as load_tokenizer
from trainer.facts import Facts
from trainer.models import ModelFactory
from trainer.models.gpt import GPT
from trainer.objectives.causal_lm import CausalLM
from trainer.optim.build import build_optimizer
from trainer.precision import Precision
from trainer.registry import load as load_class
from trainer.registry import plugin
from trainer.strategies.arithmetic import StepArithmetic, StepOptions

ROOT = Path(__file__).parents[1]
ROUNDS, STEPS = 12, 8
LEAF, LENGTH, VOCABULARY = 4, 128, 1024
PROCESSES = 2
CELLS = [
    ("ddp, a micro-batch each", "strategy=ddp", 8),
    ("ddp, four micro-batches each", "strategy=ddp", 32),
    ("fsdp, a micro-batch each", "strategy=fsdp", 8),
    ("fsdp, four micro-batches each", "strategy=fsdp", 32),
    ("pipeline 1f1b, four micro-batches", "strategy=pipeline strategy.micro_batches=4", 16),
]
WAYS = ("run", "topology")


def build(overrides: str, sequences: int, way: str, ranks: topology.Topology) -> tuple[StepArithmetic, Deal, int]:
    """Returns the strategy, how it is dealt rows, and the rows of the loop's micro-batches."""
    shape = [f"train.global_batch={sequences}", f"data.sequence_length={LENGTH}", "optimizer.implementation=foreach"]
    pipeline = "pipeline" in overrides
    size = sequences if pipeline and way == "run" else LEAF  # which the pipeline cuts itself
    mode = [f"train.micro_batch={size}", f"train.deterministic={way}"]
    config = load(["model=gpt", "precision=fp32", *shape, *mode, *overrides.split()], PROCESSES)
    ranks = ranks.with_layout(config.layout(PROCESSES))
    kind: Any = plugin(config, "strategy") if way == "run" else load_class(config.strategy.leafwise)
    deal = Deal.of(config, ranks.dp_size, ranks.local_size)
    facts = Facts(VOCABULARY, LENGTH, 1, load_tokenizer("bytes"))
    objective = CausalLM(config.objective, facts)
    options = StepOptions(1.0, "none", False, micro_batch=size, deal=deal)
    strategy = kind(config.strategy, ranks, Precision(ranks.device, "fp32"), objective, options)
    example = {name: value[:1] for name, value in batch(sequences).items()}
    factory = ModelFactory(lambda: GPT(config.model, facts), seed=1, example=lambda: example)
    strategy.setup(factory, lambda module: build_optimizer(config, module))
    return strategy, deal, size


def batch(sequences: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (sequences, LENGTH + 1), generator=generator)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "draws": torch.arange(sequences)}


def step(built: tuple[StepArithmetic, Deal, int], sequences: int) -> None:
    strategy, deal, size = built
    rows = torch.from_numpy(deal.rows(sequences, strategy.topology.dp_rank, strategy.topology.dp_size))
    local = {name: value[rows] for name, value in batch(sequences).items()}
    parts = [value.split(size) for value in local.values()]
    strategy.train_step([dict(zip(local, part, strict=True)) for part in zip(*parts, strict=True)])
    strategy.update(1e-3)


def sent() -> int:
    """Returns the bytes that went over the loopback interface, on which gloo's processes talk."""
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[0])


def rank(out: Path, which: str) -> None:
    ranks, results = topology.join(timeout_s=120), {}
    torch.set_num_threads(1)
    for name, overrides, sequences in CELLS:
        if which not in ("times", name):
            continue
        built = {way: build(overrides, sequences, way, ranks) for way in WAYS}
        for way in WAYS:
            step(built[way], sequences)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        traffic = dict.fromkeys(WAYS, 0)
        for turn in range(ROUNDS):
            for way in WAYS if turn % 2 else WAYS[::-1]:
                ranks.barrier()
                before, started = sent(), time.perf_counter()
                for _ in range(STEPS):
                    step(built[way], sequences)
                ranks.barrier()
                seconds[way].append((time.perf_counter() - started) / STEPS)
                traffic[way] = (sent() - before) // STEPS
        ratios = [b / a for a, b in zip(seconds["run"], seconds["topology"], strict=True)]
        results[name] = {
            "step_s": {way: round(statistics.median(seconds[way]), 4) for way in WAYS},
            "ratio": round(statistics.median(ratios), 3),
            "bytes_a_step": traffic,
        }
        for strategy, _, _ in built.values():
            strategy.close()
    if ranks.is_main:
        out.write_text(json.dumps(results))
    ranks.close()


def rank_of_one(out: Path, name: str, way: str) -> None:
    """The memory of one way alone."""
    ranks = topology.join(timeout_s=120)
    torch.set_num_threads(1)
    _, overrides, sequences = next(cell for cell in CELLS if cell[0] == name)
    built = build(overrides, sequences, way, ranks)
    for _ in range(3):
        step(built, sequences)
    largest = max(ranks.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    if ranks.is_main:
        out.write_text(json.dumps(largest))
    built[0].close()
    ranks.close()


def launch(*words: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
        command = [*launcher, __file__, "--rank", str(out), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-8000:]}")
        return json.loads(out.read_text())


def main() -> None:
    results = launch("times")
    for name, of_cell in results.items():
        of_cell["memory_mib"] = {way: round(launch("memory", name, way) / 1024, 1) for way in WAYS}
        print(name, json.dumps(of_cell))
    about = {"processes": PROCESSES, "rounds": ROUNDS, "steps": STEPS, "micro_batch": LEAF, "torch": torch.__version__}
    (ROOT / "benchmarks" / "bits.json").write_text(json.dumps({"about": about, "cells": results}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--rank"]:
        main()
        sys.exit()
    if sys.argv[3] == "memory":
        rank_of_one(Path(sys.argv[2]), *sys.argv[4:6])
    else:
        rank(Path(sys.argv[2]), sys.argv[3])
    os._exit(0)  # groups that strategies hold may end behind their threads, with the interpreter: an abort
