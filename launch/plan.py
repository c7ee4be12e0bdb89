"""`onecurve plan [-n PROCS] [--gpu NAME] [overrides]`: what a run would do, before it starts.

The user's own model is built and traced without values: no GPU and no memory is needed, nor any data but the tokenizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from launch.sizes import size
from trainer.config import Config
from trainer.config.compose import load_sized, recipe_message
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from launch.planning.gpus import Gpu
    from launch.planning.planned_model import PlannedModel

Line = tuple[str, str]


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("plan", help="what a run would do: batches, memory, traffic, disk, and what fits")
    parser.add_argument("-n", "--procs", type=int, help="processes of the whole run (default: launch.procs, or 1)")
    parser.add_argument("--gpu", help="what it is to run on, such as h100 (the default), a100-40, l40s, mi300x")
    parser.add_argument("--memory", type=float, metavar="GiB", help="memory of a GPU, instead of its own")
    parser.add_argument("--config-dir", help="folder with config groups of your own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see `python -m trainer --help`")
    parser.set_defaults(func=plan)


def plan(arguments: argparse.Namespace) -> int:
    from launch.planning.gpus import target

    gpu, folder = target(arguments.gpu, arguments.memory), arguments.config_dir
    if arguments.procs is not None and arguments.procs < 1:
        raise ConfigError(f"-n {arguments.procs}: should be 1 or more")
    config, procs = load_sized(arguments.overrides, arguments.procs, folder)
    for title, text in chain([("recipe", recipe_message())], lines(config, procs, gpu, arguments.overrides, folder)):
        print(f"{title:12}{text}", flush=True)
    return 0


def lines(
    config: Config, procs: int, gpu: Gpu | None = None, overrides: Sequence[str] = (), config_dir: str | None = None
) -> Iterator[Line]:
    """Yields (title, text) of each line of the plan. Without a `gpu` nothing is proposed."""
    yield from batch(config, procs)
    from launch.planning.gpus import target as default  # late: torch takes seconds, and problems should show at once
    from launch.planning.planned_model import planned_model

    gpu_or_default = gpu or default(None, None)
    subject = planned_model(config, gpu_or_default.bf16)
    yield from _model(config, subject)
    yield from _schedule(config)
    traced = yield from _memory_and_traffic(config, procs, subject, gpu_or_default)
    if gpu is not None and traced:
        yield from _proposals(config, procs, subject, gpu, overrides, config_dir)


def batch(config: Config, procs: int) -> Iterator[Line]:
    """Yields the lines that need no model: processes, sequences, steps."""
    layout, train = config.layout(procs), config.train
    replicas = procs // layout.processes
    share = train.global_batch // replicas
    micro = min(train.micro_batch or share, share)
    tokens = train.global_batch * config.data.sequence_length
    yield "processes", f"{procs} = {replicas} x {layout.processes} that share a copy of the model"
    passes = f"{replicas} x {share // micro} x train.micro_batch of {micro}"
    yield "batch", f"{train.global_batch} sequences = {passes}; {tokens:,} tokens"
    yield "steps", f"{train.steps:,}: {train.steps * tokens:,} tokens, if no batch is smaller"


def _model(config: Config, subject: PlannedModel) -> Iterator[Line]:
    precision, parameters = subject.precision, subject.whole.parameters
    types = f"held in {precision.param}, computed with in {precision.compute}, gradients added up in {precision.reduce}"
    yield "model", f"{sum(parameter.numel for parameter in parameters):,} parameters, {types}"
    nbytes, retention = subject.checkpoint, config.checkpoint
    more = "".join(f", and those of {key}" for key in ("keep_every", "keep_best") if getattr(retention, key))
    disk = f"{retention.keep} are kept{more}, one more is written: {size(nbytes * (retention.keep + 1))} of disk"
    yield "checkpoint", f"{size(nbytes)} every {retention.every}; {disk}"


def _schedule(config: Config) -> Iterator[Line]:
    from launch.planning.chart import rows
    from trainer.registry import plugin

    steps = config.train.steps
    curve = plugin(config, "schedule")(config.schedule, config.optimizer.lr, steps)
    summary = f"{config.schedule.name}: {curve(1):.2e} at step 1, {curve(steps):.2e} at step {steps:,}"
    yield "schedule", f"{summary}, at most {config.optimizer.lr:.2e}"
    for row in rows(curve, steps):
        yield "", row


def _memory_and_traffic(config: Config, procs: int, subject: PlannedModel, gpu: Gpu) -> Generator[Line, None, bool]:
    """Yields the lines that need a traced model; returns whether it can be traced."""
    from launch.planning.memory import accountant

    estimate = accountant(subject, config, procs)
    try:
        peaks = estimate.peaks()
    except ConfigError:
        raise
    except Exception as error:  # of the user's code: it looks at values, or computes with them on its own
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        yield "memory", f"not known: the model or the objective cannot be traced without values ({reason[:160]})"
        return False
    stages = estimate.layout.stages
    flops = sum(estimate.flops(position) for position in range(stages)) * (procs // stages)
    tokens = config.train.global_batch * config.data.sequence_length
    yield (
        "arithmetic",
        (
            f"{flops:.3g} FLOP a step, recomputation included; {flops / tokens:.3g} a token, "
            f"{flops * config.train.steps:.3g} in all"
        ),
    )
    yield from estimate.details()
    fullest = max(peaks, key=lambda parts: parts.total)
    fits = "fits" if fullest.total <= gpu.usable else "does NOT fit"
    yield (
        "memory",
        f"{size(fullest.total)} of a process at its fullest: {fits} {gpu.name} ({gpu.gib:g} GiB, 90 % usable)",
    )
    columns = fullest._fields
    yield "", "".join(f"{name:>14}" for name in ("", *columns, "total"))
    for first, last in _runs([parts.total for parts in peaks]):
        scope = "each" if len(peaks) == 1 else f"stage {first}" + (f"-{last}" if last > first else "")
        cells = [size(value) for value in (*peaks[first], peaks[first].total)]
        yield "", "".join(f"{cell:>14}" for cell in (scope, *cells))
    for transfer in estimate.traffic():
        how = "while it waits" if transfer.waits else "while it computes"
        text = f"{size(transfer.nbytes)} a step by each process: {transfer.name}, among {transfer.processes}, {how}"
        yield "sent", text
    return True


def _runs(values: list[int]) -> Iterator[tuple[int, int]]:
    """Yields (first, last) of each run of equal values."""
    first = 0
    for end in range(1, len(values) + 1):
        if end == len(values) or values[end] != values[first]:
            yield first, end - 1
            first = end


def _proposals(
    config: Config, procs: int, subject: PlannedModel, gpu: Gpu, overrides: Sequence[str], config_dir: str | None
) -> Iterator[Line]:
    from launch.planning.propose import command, proposals

    fit, too_large = proposals(subject, config, procs, gpu)
    for proposal in fit:
        yield "fits", f"{size(proposal.parts.total):>10}  {' '.join(proposal.overrides)}"
    for proposal in too_large:
        yield "too large", f"{size(proposal.parts.total):>10}  {' '.join(proposal.overrides)}"
    if fit:
        folder = f" --config-dir {config_dir}" if config_dir else ""
        start = config.launch.command_line(procs)
        yield "proposed", f"onecurve {start}{folder} {command(overrides, fit[0])}"
    elif too_large:
        yield "proposed", f"nothing fits {gpu.name} on {procs} processes: more of them, or a smaller model or batch"
