"""The composition root: a checked config becomes objects. The only place that knows every plugin."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import __version__
from trainer.checkpoint.save import Saver
from trainer.config import Config
from trainer.config.check import import_plugin
from trainer.data import shakespeare
from trainer.data import tokenizer as tokenizers
from trainer.data.index import Shards
from trainer.data.stream import Stream, Validation
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError, DataError
from trainer.folder import CHECKPOINTS, RunFolder
from trainer.loop import Job
from trainer.models import initialise
from trainer.models.gpt import GPT
from trainer.objectives.causal_lm import CausalLM
from trainer.optim.adamw import adamw
from trainer.optim.schedule import warmup_cosine
from trainer.precision import Precision
from trainer.resilience.interruption import Requests
from trainer.resilience.timeledger import TimeLedger
from trainer.strategies.base import Strategy
from trainer.strategies.ddp import DDP
from trainer.strategies.single import Single, StepOptions
from trainer.topology import Topology
from trainer.tracking import JsonLines, RunInfo, Tracker, Trackers
from trainer.tracking.console import Console
from trainer.tracking.journal import Journal
from trainer.tracking.wandb import WandB

PLUGINS: dict[str, dict[str, Any]] = {
    "model": {"gpt": GPT},
    "objective": {"causal_lm": CausalLM},
    "strategy": {"single": Single, "ddp": DDP},
    "optimizer": {"adamw": adamw},
    "schedule": {"warmup_cosine": warmup_cosine},
}
# Data sets that are made on first use: (cache folder, tokenizer) -> folder of shards and tokenizer.json.
DATASETS: dict[str, Callable[[Path, str], Path]] = {"shakespeare": shakespeare.ensure}


def plugin(config: Config, group: str) -> Any:
    """The class or function behind the option of a group, built in or the user's."""
    name = getattr(config, group).name
    return PLUGINS[group].get(name) or import_plugin(f"{group}.name", name, config.run.plugins)


@dataclass(frozen=True)
class Inputs:
    """The run's text, opened: what training reads, and what it is judged by."""

    stream: Stream
    validation: Validation | None
    tokenizer: Tokenizer

    def identity(self, config: Config) -> dict[str, Any]:
        """What the run is: what no life of it may change."""
        return {
            "model": config.model.model_dump(mode="json"),
            "objective": config.objective.model_dump(mode="json"),
            "data": {"field": config.data.field, **self.stream.fingerprint},
            "train": {"global_batch": config.train.global_batch},
            "run": {"seed": config.run.seed},
        }


def open_data(config: Config) -> tuple[Shards, Shards | None, Tokenizer]:
    """Training shards, validation shards and tokenizer. Raises ConfigError with all that is missing or damaged.

    Its exit code is DataError's where damaged shards are all that is wrong.
    """
    data, cache = config.data, Path(config.data.cache).expanduser()
    make = DATASETS.get(data.name)
    base = make(cache, data.tokenizer) if make else None
    opened: dict[str, Any] = {"validation": None}
    problems, code = [], DataError.exit_code
    for key in ("shards", "validation"):
        spec = getattr(data, key)
        if spec is None:
            continue
        paths = [str(base / part) if base else part for part in ([spec] if isinstance(spec, str) else spec)]
        try:
            opened[key] = Shards.open(paths, data.field, cache, key=f"data.{key}")
        except (ConfigError, DataError) as error:
            problems += str(error).split("\n")
            code = min(code, error.exit_code)
    try:
        name = str(base / "tokenizer.json") if base and data.tokenizer != "bytes" else data.tokenizer
        opened["tokenizer"] = tokenizers.load(name)
    except ConfigError as error:
        problems += error.problems
        code = min(code, error.exit_code)
    if problems:
        raise ConfigError(problems, code)
    return opened["shards"], opened["validation"], opened["tokenizer"]


def open_inputs(config: Config, topology: Topology) -> Inputs:
    """`open_data` on every rank, the main one first: it makes indexes that the others then find.

    Raises ConfigError on all ranks if one of them cannot read its data.
    """
    opened, problems, code = None, [], DataError.exit_code
    for mains_turn in (True, False):
        if topology.is_main == mains_turn:
            try:
                opened = open_data(config)
            except ConfigError as error:
                problems, code = error.problems, error.exit_code
        topology.barrier()
    everywhere = [problem for part in topology.gather(problems) for problem in part]
    code = min(topology.gather(code))
    if everywhere or opened is None:
        raise ConfigError(list(dict.fromkeys(everywhere)), code)
    shards, validation, tokenizer = opened
    place: dict[str, Any] = {
        "sequence_length": config.data.sequence_length,
        "micro_batch": config.train.micro_batch or config.train.global_batch // topology.dp_size,
        "dp_rank": topology.dp_rank,
        "dp_size": topology.dp_size,
    }
    stream = Stream(
        shards,
        tokenizer,
        global_batch=config.train.global_batch,
        lanes=config.data.lanes,
        window=config.data.window,
        seed=config.run.seed,
        workers=config.data.workers,
        ledger=config.data.ledger,
        **place,
    )
    sequences = config.eval.steps and config.eval.steps * config.train.global_batch
    evaluated = Validation(validation, tokenizer, sequences=sequences, **place) if validation else None
    return Inputs(stream, evaluated, tokenizer)


def build_model(config: Config, tokenizer: Tokenizer) -> nn.Module:
    """The model with its initial weights, on the CPU."""
    model = plugin(config, "model")(config.model, tokenizer.vocab_size, config.data.sequence_length)
    initialise(model, config.run.seed)
    return model


def build_strategy(config: Config, topology: Topology, tokenizer: Tokenizer) -> Strategy:
    """The strategy, set up: model on its device, optimizer made."""
    objective = plugin(config, "objective")(config.objective, tokenizer.token_bytes, tokenizer.token_chars)
    train = config.train
    strategy = plugin(config, "strategy")(
        config.strategy,
        topology,
        Precision.resolve(config.precision.compute, topology.device),
        objective,
        StepOptions(train.clip_norm, train.activation_checkpointing, train.compile),
    )
    strategy.setup(partial(build_model, config, tokenizer), partial(plugin(config, "optimizer"), config.optimizer))
    return strategy


def build_journal(config: Config, topology: Topology, folder: Path) -> Journal:
    info = RunInfo(
        name=config.run.name,
        folder=folder,
        steps=config.train.steps,
        step=0,
        config=config.resolved(),
        environment=environment(topology),
    )
    if not topology.is_main:
        return Journal(topology, info, None, config.data.ledger)
    wandb = WandB(config.track.wandb.mode, config.track.wandb.project)
    others: list[Tracker] = [Console(), wandb] if config.track.console else [wandb]
    return Journal(topology, info, Trackers(JsonLines(folder), others), config.data.ledger)


def build(config: Config, topology: Topology, inputs: Inputs, folder: RunFolder, born: float) -> Job:
    """Everything the loop talks to."""
    checkpoint = config.checkpoint
    return Job(
        config=config,
        topology=topology,
        strategy=build_strategy(config, topology, inputs.tokenizer),
        schedule=plugin(config, "schedule")(config.schedule, config.optimizer.lr, config.train.steps),
        stream=inputs.stream,
        validation=inputs.validation,
        saver=Saver(folder.path / CHECKPOINTS, topology, checkpoint.keep, checkpoint.asynchronous),
        requests=Requests(folder.path, watch_files=topology.is_main),
        journal=build_journal(config, topology, folder.path),
        clock=TimeLedger(folder.path / "goodput.jsonl" if topology.is_main else None, born),
        folder=folder,
        identity=inputs.identity(config),
    )


def environment(topology: Topology) -> dict[str, Any]:
    """Versions and hardware, for the record."""
    facts = {
        "onecurve": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        **topology.describe(),
    }
    if topology.device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(topology.device)
    return facts
