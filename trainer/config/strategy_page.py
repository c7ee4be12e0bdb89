"""Generates the parts of docs/STRATEGIES.md that come from the schema's tables and checks, for `make docs`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.config.compose import load
from trainer.config.pipeline_schedules import SCHEDULES
from trainer.errors import ConfigError
from trainer.registry import OPTIONS


class Cost(NamedTuple):
    """The costs per process and step. P: bytes of the weights, S: of optimizer state (2 P for AdamW), N: processes,
    H: bytes that pass between two layers in a step, on one process."""

    weights: str
    gradients: str
    state: str
    traffic: str
    when: str


COSTS = {
    "single": Cost("P", "P", "S", "none", "one GPU"),
    "ddp": Cost("P", "P", "S", "2 P, during the backward pass", "model and optimizer fit on each GPU: the fastest"),
    "fsdp": Cost("P / N", "P / N", "S / N", "3 P (2 P: reshard_after_forward=false)", "they do not: what to try next"),
    "hsdp": Cost(
        "P / k", "P / k", "S / k", "3 P within groups of k = shard_size, 2 P / k between them",
        "many nodes, a model that fits on one",
    ),
    "zero": Cost(
        "P; + P / N at stages 1, 2; 2 P / N at stage 3", "P; stages 2, 3: P / N", "S / N; stage 0: S",
        "2 P; stage 3: 3 P",
        "DeepSpeed is what you know, or its optimizer on the CPU (offload_optimizer)",
    ),
    "pipeline": Cost(
        "P / p", "P / p", "S / p", "2 H between neighbors, and 2 P / p between copies",
        "slow links between nodes, with strategy.data_parallel for what a stage is copied to",
    ),
    "tensor_parallel": Cost(
        "P / k", "P / k", "S / k", "4 H a layer, while it waits", "layers too wide for one GPU; only within a node"
    ),
}  # fmt: skip

TOPOLOGY = "train.deterministic=topology train.micro_batch=1"
# One case for each rule: (processes, command line).
REFUSED = [
    (2, "strategy=single"),
    (6, "strategy=hsdp strategy.shard_size=4"),
    (2, "strategy=fsdp strategy.reduce=last precision.reduce=bf16"),
    (4, "strategy=pipeline strategy.stages=3"),
    (2, "strategy=pipeline model.layers=1"),
    (2, "strategy=pipeline strategy.stages=1 strategy.schedule=zbv model.layers=1"),
    (4, "strategy=pipeline strategy.stages=2 strategy.schedule=zbv strategy.data_parallel=fsdp"),
    (2, "strategy=pipeline strategy.schedule=zbv strategy.virtual_stages=3"),
    (2, "strategy=pipeline strategy.schedule=dualpipev strategy.micro_batches=2"),
    (4, "strategy=pipeline strategy.schedule=interleaved_1f1b strategy.micro_batches=9 model.layers=8"),
    (2, "strategy=pipeline strategy.schedule=zbv train.compile=true"),
    (2, "strategy=fsdp strategy.tensor_parallel=4"),
    (3, "strategy=fsdp strategy.tensor_parallel=3 model.heads=4"),
    (2, "strategy=fsdp strategy.tensor_parallel=2 strategy.sequence_parallel=true model.dropout=0.1"),
    (2, "strategy=fsdp strategy.tensor_parallel=2 strategy.cpu_offload=true"),
    (4, "strategy=pipeline strategy.stages=2 train.global_batch=5"),
    (1, "precision=fp16 precision.param=bf16"),
    (2, "strategy=fsdp strategy.gather=compute precision=fp16"),
    (2, "train.deterministic=topology"),
    (2, f"{TOPOLOGY} train.compile=true"),
    (2, f"{TOPOLOGY} strategy=zero"),
    (2, f"{TOPOLOGY} strategy=fsdp strategy.tensor_parallel=2"),
    (2, f"{TOPOLOGY} strategy=fsdp strategy.gather=compute"),
    (2, f"{TOPOLOGY} strategy=hsdp strategy.shard_size=1"),
    (2, f"precision.reduce=bf16 {TOPOLOGY}"),
    (1, f"precision.compute=fp8 {TOPOLOGY}"),
    (2, f"optimizer=muon {TOPOLOGY}"),
    (2, f"optimizer.implementation=fused {TOPOLOGY}"),
]


def costs() -> Iterator[str]:
    yield "| `strategy=` | weights | gradients | optimizer state | sent and received a step | when |"
    yield "|---|---|---|---|---|---|"
    assert {*COSTS} - {"tensor_parallel"} == {*OPTIONS["strategy"]}
    for name, cost in COSTS.items():
        yield f"| `{name}` | {' | '.join(cost)} |"


def schedules() -> Iterator[str]:
    yield "| `strategy.schedule=` | parts on a process | least micro-batches | waits, of the time | `train.compile` | |"
    yield "|---|---|---|---|---|---|"
    for name, schedule in SCHEDULES.items():
        parts = str(schedule.parts or "2 or more") + (" (first and last on one)" if schedule.v_shaped else "")
        least = "all parts of the model" if schedule.least(2, 4) == 4 else "1"
        least += ", a multiple of m div p" if schedule.rounds else ""
        compiled = "no" if schedule.splits_backward else "yes"
        yield f"| `{name}` | {parts} | {least} | {schedule.idle} | {compiled} | {schedule.source} |"


def refused() -> Iterator[str]:
    """Yields refused combinations with the messages of the check."""
    for processes, overrides in REFUSED:
        try:
            load(overrides.split(), processes)
        except ConfigError as error:
            yield f"- `-n {processes} {overrides}`"
            yield from (f"  <br>{problem}" for problem in error.problems)
        else:
            raise AssertionError(f"not refused: -n {processes} {overrides}")


PARTS: dict[str, Callable[[], Iterator[str]]] = {"costs": costs, "schedules": schedules, "refused": refused}


def renewed(page: str) -> str:
    """Returns the page with the parts between its marks generated anew."""
    for mark, lines in PARTS.items():
        before, begin, remainder = page.partition(f"<!-- {mark} -->\n")
        _, end, after = remainder.partition(f"<!-- end of {mark} -->")
        if not (begin and end):
            raise ValueError(f"the page has no marks of {mark}")
        page = before + begin + "\n".join(lines()) + "\n" + end + after
    return page


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(renewed(path.read_text()))
