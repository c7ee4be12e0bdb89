"""Which strategies fit a GPU, the one that should be fastest first.

The order is that of a bound: half of the GPU's arithmetic or the time to launch it, and links at their full speed, with
what can go on at the same time counted once. It tells which is faster, not how fast.
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
RECOMPUTED = ("none", "selective", "full")
ROWS = 8  # sequences of a micro-batch, at the most that is tried besides those asked for and all at once
BUSY = 0.5  # of a GPU's arithmetic, that a good run reaches
HOST_S = 5e-4  # what Python and the driver need for a layer, forward and backward: the limit of small models


@dataclass(frozen=True)
class Proposal:
    overrides: tuple[str, ...]
    """In place of REPLACED."""
    parts: MemoryParts
    """Memory of the fullest process."""
    seconds: float
    """A step's bound."""


def proposals(
    subject: PlannedModel, config: Config, procs: int, gpu: Gpu, within: float = 6.0
) -> tuple[list[Proposal], list[Proposal]]:
    """(those that fit, those that do not), each the fastest or the smallest first. After `within`
    seconds of computing it looks no further: the most usual are tried first."""
    fit: list[Proposal] = []
    too_large: list[Proposal] = []
    started = time.process_time()
    for changes, tried in candidates(config, procs, subject):
        rows = sizes(tried, procs)
        least = _tried(subject, tried, changes, RECOMPUTED[-1], rows[-1], procs, gpu)
        if least is None or time.process_time() > started + within:
            continue
        if least.parts.total > gpu.usable:
            too_large.append(least)
            continue
        # More recomputation and smaller micro-batches only take longer.
        for recomputed, size in product(RECOMPUTED, rows):
            if time.process_time() > started + within:
                fit.append(least)
                break
            way = _tried(subject, tried, changes, recomputed, size, procs, gpu)
            if way is not None and way.parts.total <= gpu.usable:
                fit.append(way)
                break
    return sorted(fit, key=lambda one: one.seconds), sorted(too_large, key=lambda one: one.parts.total)


def _tried(
    subject: PlannedModel, config: Config, changes: tuple[str, ...], recomputed: str, rows: int, procs: int, gpu: Gpu
) -> Proposal | None:
    train = {"activation_checkpointing": recomputed, "micro_batch": rows}
    try:
        counted = accountant(subject, validate(_replaced(config, {"train": train}), procs), procs)
        parts = max(counted.peaks(), key=lambda parts: parts.total)
        seconds = time_bound(counted, gpu)
    except ConfigError:  # a model that cannot be cut so
        return None
    return Proposal((*changes, *(f"train.{key}={value}" for key, value in train.items())), parts, seconds)


def candidates(config: Config, procs: int, subject: PlannedModel) -> Iterator[tuple[tuple[str, ...], Config]]:
    """(overrides, config) of each way to use that many processes that the check takes."""
    ways: list[Way] = []
    for option in OPTIONS["strategy"].values():
        strategy: type[Strategy] = load(option.section)
        ways += load(strategy.accountant).ways(subject, procs)
    defaults = {name: compose([f"strategy={name}"])[0]["strategy"] for name in OPTIONS["strategy"]}
    for way in ways:
        section = dict(defaults[way[0].removeprefix("strategy=")])
        for key, _, value in (override.removeprefix("strategy.").partition("=") for override in way[1:]):
            section[key] = {"true": True, "compute": value}.get(value) or int(value)
        try:
            yield tuple(way), validate(_replaced(config, {"train": {"micro_batch": None}}, strategy=section), procs)
        except ConfigError:
            continue


def sizes(config: Config, procs: int) -> list[int]:
    """Returns the micro-batch sizes that divide a process's share of the global batch, the largest first."""
    layout = config.layout(procs)
    share = max(1, config.train.global_batch // (procs // layout.processes))
    wanted = {share, ROWS, 4, 2, 1, config.train.micro_batch or share}
    wanted |= {4 * layout.stages}  # the micro-batch is what goes through a pipeline at once
    return sorted((size for size in wanted if size <= share and share % size == 0), reverse=True)


def _replaced(config: Config, changed: dict[str, Any], **sections: Any) -> dict[str, Any]:
    raw = config.model_dump(mode="json") | sections
    return raw | {name: raw[name] | values for name, values in changed.items()}


def time_bound(of: Accountant, gpu: Gpu) -> float:
    """Seconds of a step, at the least."""
    stages = of.layout.stages
    flops = sum(of.flops(position) for position in range(stages)) / stages
    launching = HOST_S * max(1, len(of.subject.whole.blocks)) / stages * of.passes * of.micro_batches()[0]
    computing = max(flops / (gpu.tflops * 1e12 * BUSY), launching) * of.waiting()
    waiting = besides = 0.0
    for sent in of.traffic():
        seconds = sent.nbytes / ((gpu.link if sent.processes <= NODE else NETWORK) * 1e9)
        waiting += seconds if sent.waits else 0
        besides += 0 if sent.waits else seconds
    return max(computing, besides) + waiting


def command(base: Sequence[str], proposal: Proposal) -> str:
    """The user's overrides, with those of the proposal in their place; secrets are masked."""
    kept = [text for text in base if not text.lstrip("+").split("=")[0].startswith(REPLACED)]
    return " ".join([*map(shown_override, kept), *proposal.overrides])
