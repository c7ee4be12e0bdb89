"""Which strategies fit a GPU, the one that should be fastest first.

The order is that of a bound: half of the GPU's arithmetic or the time to launch it, and links at their full speed, with
overlapping work counted once. It says which strategy is faster, not how fast it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from launch.planning.gpus import NETWORK, NODE, Gpu
from launch.planning.memory import Accountant, Way, accountant
from launch.planning.memory_parts import MemoryParts
from launch.planning.planned_model import PlannedModel
from trainer.config import Config, Strategy
from trainer.config.compose import compose
from trainer.config.validate import validate
from trainer.errors import ConfigError
from trainer.registry import OPTIONS, load
from trainer.secrets import shown_override

REPLACED = ("strategy", "train.activation_checkpointing", "train.micro_batch")
CHECKPOINTING = ("none", "selective", "full")
ROWS = 8  # largest micro-batch that is tried, besides the configured one and the whole share
BUSY = 0.5  # fraction of a GPU's arithmetic that a good run reaches
HOST_S = 5e-4  # time of Python and the driver for a layer, forward and backward: the limit of small models


@dataclass(frozen=True)
class Proposal:
    overrides: tuple[str, ...]
    """Overrides that replace REPLACED."""
    parts: MemoryParts
    """Memory of the fullest process."""
    seconds: float
    """Lower bound of a step's time."""


def proposals(
    subject: PlannedModel, config: Config, procs: int, gpu: Gpu, limit_s: float = 6.0
) -> tuple[list[Proposal], list[Proposal]]:
    """Returns (proposals that fit, proposals that do not), the fastest and the smallest first. Stops after `limit_s`
    seconds of CPU time; the most common strategies are tried first."""
    fit: list[Proposal] = []
    too_large: list[Proposal] = []
    start = time.process_time()
    for changes, candidate in candidates(config, procs, subject):
        rows = sizes(candidate, procs)
        smallest = _propose(subject, candidate, changes, CHECKPOINTING[-1], rows[-1], procs, gpu)
        if smallest is None or time.process_time() > start + limit_s:
            continue
        if smallest.parts.total > gpu.usable:
            too_large.append(smallest)
            continue
        # More recomputation and smaller micro-batches only take longer.
        for checkpointing, size in product(CHECKPOINTING, rows):
            if time.process_time() > start + limit_s:
                fit.append(smallest)
                break
            proposal = _propose(subject, candidate, changes, checkpointing, size, procs, gpu)
            if proposal is not None and proposal.parts.total <= gpu.usable:
                fit.append(proposal)
                break
    return sorted(fit, key=lambda proposal: proposal.seconds), sorted(
        too_large, key=lambda proposal: proposal.parts.total
    )


def _propose(
    subject: PlannedModel, config: Config, changes: tuple[str, ...], checkpointing: str, rows: int, procs: int, gpu: Gpu
) -> Proposal | None:
    train = {"activation_checkpointing": checkpointing, "micro_batch": rows}
    try:
        estimate = accountant(subject, validate(_override(config, {"train": train}), procs), procs)
        parts = max(estimate.peaks(), key=lambda parts: parts.total)
        seconds = time_bound(estimate, gpu)
    except ConfigError:  # a model that cannot be cut this way
        return None
    return Proposal((*changes, *(f"train.{key}={value}" for key, value in train.items())), parts, seconds)


def candidates(config: Config, procs: int, subject: PlannedModel) -> Iterator[tuple[tuple[str, ...], Config]]:
    """Yields (overrides, config) of each valid way to use that many processes."""
    ways: list[Way] = []
    for option in OPTIONS["strategy"].values():
        strategy: type[Strategy] = load(option.section)
        ways += load(strategy.accountant).ways(subject, procs)
    defaults = {name: compose([f"strategy={name}"])[0]["strategy"] for name in OPTIONS["strategy"]}
    for way in ways:
        section = dict(defaults[way[0].removeprefix("strategy=")])
        for key, _, value in (override.removeprefix("strategy.").partition("=") for override in way[1:]):
            section[key] = {"true": True, "compute": value}.get(value) or int(value)
        size = config.train.micro_batch if config.train.deterministic == "topology" else None
        try:
            yield tuple(way), validate(_override(config, {"train": {"micro_batch": size}}, strategy=section), procs)
        except ConfigError:
            continue


def sizes(config: Config, procs: int) -> list[int]:
    """Returns the micro-batch sizes that divide a process's share of the global batch, the largest first."""
    if config.train.deterministic == "topology":  # it is part of what the run is
        return [config.train.micro_batch or 1]
    layout = config.layout(procs)
    share = max(1, config.train.global_batch // (procs // layout.processes))
    choices = {share, ROWS, 4, 2, 1, config.train.micro_batch or share}
    choices |= {4 * layout.stages}  # the micro-batch is what goes through a pipeline at once
    return sorted((size for size in choices if size <= share and share % size == 0), reverse=True)


def _override(config: Config, changes: dict[str, Any], **sections: Any) -> dict[str, Any]:
    raw = config.model_dump(mode="json") | sections
    return raw | {name: raw[name] | values for name, values in changes.items()}


def time_bound(estimate: Accountant, gpu: Gpu) -> float:
    """Returns a lower bound of the seconds of a step."""
    stages = estimate.layout.stages
    flops = sum(estimate.flops(position) for position in range(stages)) / stages
    launch_s = (
        HOST_S * max(1, len(estimate.subject.whole.blocks)) / stages * estimate.passes * estimate.micro_batches()[0]
    )
    compute_s = max(flops / (gpu.tflops * 1e12 * BUSY), launch_s) * estimate.bubble_factor()
    exposed_s = overlapped_s = 0.0
    for transfer in estimate.traffic():
        seconds = transfer.nbytes / ((gpu.link if transfer.processes <= NODE else NETWORK) * 1e9)
        exposed_s += seconds if transfer.waits else 0
        overlapped_s += 0 if transfer.waits else seconds
    return max(compute_s, overlapped_s) + exposed_s


def command(base: Sequence[str], proposal: Proposal) -> str:
    """Returns the user's overrides, replaced by those of the proposal where they differ; secrets are masked."""
    base_overrides = [text for text in base if not text.lstrip("+").split("=")[0].startswith(REPLACED)]
    return " ".join([*map(shown_override, base_overrides), *proposal.overrides])
