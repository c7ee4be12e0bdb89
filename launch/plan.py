"""`onecurve plan [-n PROCS] [overrides]`: what a run would do, before it starts: batches, sizes, a pipeline's parts.

The model is built without values: no GPU and no memory is needed, nor any data but the tokenizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from launch.sizes import size
from trainer.config import Config
from trainer.config.compose import load
from trainer.config.pipelines import micro_batches
from trainer.config.strategy import Pipeline

if TYPE_CHECKING:
    from trainer.data.tokenizer import Tokenizer
    from trainer.models import ModelFactory


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("plan", help="what a run would do: batches, parameters, how a pipeline cuts the model")
    parser.add_argument("-n", "--procs", type=int, help="processes of the whole run (default: launch.procs, or 1)")
    parser.add_argument("--config-dir", help="folder with config groups of your own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see `python -m trainer --help`")
    parser.set_defaults(func=plan)


def plan(arguments: argparse.Namespace) -> int:
    procs = arguments.procs
    if procs is None:
        procs = load(arguments.overrides, config_dir=arguments.config_dir).launch.procs or 1
    config = load(arguments.overrides, procs, arguments.config_dir)
    for title, text in lines(config, procs):
        print(f"{title:12}{text}")
    return 0


def lines(config: Config, procs: int) -> Iterator[tuple[str, str]]:
    """(title, text) of each line."""
    layout, train = config.layout(procs), config.train
    copies = procs // layout.processes
    share = train.global_batch // copies
    micro = min(train.micro_batch or share, share)
    tokens = train.global_batch * config.data.sequence_length
    yield "processes", f"{procs} = {copies} x {layout.processes} that share a copy of the model"
    passes = f"{copies} x {share // micro} x train.micro_batch of {micro}"
    yield "batch", f"{train.global_batch} sequences = {passes}; {tokens:,} tokens"
    yield "steps", f"{train.steps:,}: {train.steps * tokens:,} tokens, if no batch is smaller"
    import torch  # late: it takes seconds, and problems of the config should show at once

    from trainer.build import model_factory
    from trainer.inputs import tokenizer_of

    tokenizer, example = tokenizer_of(config), torch.zeros(1, config.data.sequence_length, dtype=torch.int64)
    batch = {"inputs": example, "targets": example, "draws": example[0, :1]}
    factory = model_factory(config, tokenizer, lambda: batch)
    yield from _sizes(config, factory)
    if isinstance(config.strategy, Pipeline) and layout.stages > 1:
        yield from _pipeline(config, config.strategy, layout.stages, micro, factory, tokenizer)


def _sizes(config: Config, factory: ModelFactory) -> Iterator[tuple[str, str]]:
    from trainer.build import build_optimizer
    from trainer.models import without_values
    from trainer.optim.state import bytes_of

    with without_values():
        model = factory.build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield "model", f"{parameters:,} parameters"
    saved, kept = bytes_of(model, build_optimizer(config, model)), config.checkpoint
    more = "".join(f", and those of {key}" for key in ("keep_every", "keep_best") if getattr(kept, key))
    disk = f"{kept.keep} are kept{more}, one more is written: {size(saved * (kept.keep + 1))} of disk"
    yield "checkpoint", f"{size(saved)} every {kept.every}; {disk}"


def _pipeline(
    config: Config, strategy: Pipeline, stages: int, micro: int, factory: ModelFactory, tokenizer: Tokenizer
) -> Iterator[tuple[str, str]]:
    import torch

    from trainer.build import plugin
    from trainer.precision import Precision
    from trainer.strategies.stages import balance, hosts, measure

    objective = plugin(config, "objective")(config.objective, tokenizer.token_bytes, tokenizer.token_chars)
    device = torch.device("cpu")
    compute = config.precision.compute if config.precision.compute in ("bf16", "fp16") else "fp32"
    measured = measure(factory, objective, Precision(device, compute).autocast(), device)
    parts = balance(measured, stages * strategy.parts_a_process)
    count = micro_batches(strategy, stages, micro)
    what = f"{strategy.schedule}: {stages} processes, {strategy.parts_a_process} part(s) on each"
    yield "pipeline", f"{what}; {count} micro-batches of {-(-micro // count)}"
    for place in range(stages):
        costs, names = [], []
        for part in [part for part in range(len(parts)) if hosts(strategy, stages, part) == place]:
            blocks = parts[part]
            ends = [(part == 0, "embedding", measured.embedding), (part == len(parts) - 1, "head", measured.head)]
            names += [f"blocks {blocks[0]} to {blocks[-1]}", *(name for is_here, name, _ in ends if is_here)]
            costs += [*(measured.blocks[block] for block in blocks), *(cost for is_here, _, cost in ends if is_here)]
        yield (
            f"  {place}",
            f"{', '.join(names)}: {sum(cost.parameters for cost in costs):,} parameters, of a sequence "
            f"{sum(cost.flops for cost in costs) / 1e9:.3g} GFLOP forward, "
            f"{sum(cost.activations for cost in costs) / 1e6:.3g} MB of activations",
        )
