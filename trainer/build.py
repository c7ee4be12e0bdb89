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


@dataclass
class Data:
    """The run's text."""

    shards: Shards
    validation: Shards | None
    tokenizer: Tokenizer

    @classmethod
    def open(cls, config: Config) -> Data:
        """Prepares and indexes what `data` names. Raises ConfigError for what is missing or damaged."""
        data, cache = config.data, Path(config.data.cache).expanduser()
        base = _prepared(config)
        validation = Shards.open(_under(base, data.validation), data.field, cache) if data.validation else None
        return cls(Shards.open(_under(base, data.shards), data.field, cache), validation, read_tokenizer(config))


def read_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of the run's data. Raises ConfigError."""
    base, name = _prepared(config), config.data.tokenizer
    return tokenizers.load(str(base / "tokenizer.json") if base and name != "bytes" else name)


def _prepared(config: Config) -> Path | None:
    """The folder of a data set of ours; None for the user's own shards."""
    make = DATASETS.get(config.data.name)
    return make(Path(config.data.cache).expanduser(), config.data.tokenizer) if make else None


def _under(base: Path | None, spec: str | list[str]) -> list[str]:
    return [str(base / part) if base else part for part in ([spec] if isinstance(spec, str) else spec)]


def identity(config: Config, stream: Stream) -> dict[str, Any]:
    """What the run is: what no life of it may change."""
    return {
        "model": config.model.model_dump(mode="json"),
        "objective": config.objective.model_dump(mode="json"),
        "data": {"field": config.data.field, **stream.fingerprint},
        "train": {"global_batch": config.train.global_batch},
        "run": {"seed": config.run.seed},
    }


def build_model(config: Config, tokenizer: Tokenizer) -> nn.Module:
    """The model with its initial weights, on the CPU."""
    model = plugin(config, "model")(config.model, tokenizer.vocab_size, config.data.sequence_length)
    initialise(model, config.run.seed)
    return model


def build_stream(config: Config, topology: Topology, data: Data) -> tuple[Stream, Validation | None]:
    micro_batch = config.train.micro_batch or config.train.global_batch // topology.dp_size
    place: dict[str, Any] = {
        "sequence_length": config.data.sequence_length,
        "micro_batch": micro_batch,
        "dp_rank": topology.dp_rank,
        "dp_size": topology.dp_size,
    }
    stream = Stream(
        data.shards,
        data.tokenizer,
        global_batch=config.train.global_batch,
        lanes=config.data.lanes,
        window=config.data.window,
        seed=config.run.seed,
        workers=config.data.workers,
        ledger=config.data.ledger,
        **place,
    )
    if data.validation is None:
        return stream, None
    sequences = config.eval.steps and config.eval.steps * config.train.global_batch
    return stream, Validation(data.validation, data.tokenizer, sequences=sequences, **place)


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


def build(config: Config, topology: Topology, born: float) -> Job:
    """Everything the loop talks to. Raises ConfigError before anything in the run's folder changed."""
    data = Data.open(config)
    stream, validation = build_stream(config, topology, data)
    folder = RunFolder(config, identity(config, stream), topology)
    strategy = build_strategy(config, topology, data.tokenizer)
    checkpoint = config.checkpoint
    return Job(
        config=config,
        topology=topology,
        strategy=strategy,
        schedule=plugin(config, "schedule")(config.schedule, config.optimizer.lr, config.train.steps),
        stream=stream,
        validation=validation,
        saver=Saver(folder.path / CHECKPOINTS, topology, checkpoint.keep, checkpoint.asynchronous),
        requests=Requests(folder.path, watch_files=topology.is_main),
        journal=build_journal(config, topology, folder.path),
        clock=TimeLedger(folder.path / "goodput.jsonl" if topology.is_main else None, born),
        tokenizer=data.tokenizer,
        folder=folder,
        identity=identity(config, stream),
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
