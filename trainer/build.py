"""The composition root: a checked config becomes objects. The only place that knows every plugin."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from trainer import __version__
from trainer.checkpoint.save import Saver
from trainer.config import Config
from trainer.config import transforms as schema
from trainer.config.interval import Interval
from trainer.data.stream import Stream
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.extras import without_torchao
from trainer.facts import Facts
from trainer.files import replace_file
from trainer.folder import CHECKPOINTS, Identity, RunFolder
from trainer.inputs import Inputs
from trainer.job import Job
from trainer.models import Fill, ModelFactory, of_type, without_values
from trainer.optim.ema import track_average
from trainer.optim.schedule import Schedule
from trainer.precision import DTYPES, Precision
from trainer.randomness import key
from trainer.registry import missing, plugin, transforms
from trainer.resilience.agreement import AgreedStream
from trainer.resilience.guard import Guard
from trainer.resilience.interruption import Requests
from trainer.resilience.quarantine import Quarantine
from trainer.resilience.replicas import Replicas
from trainer.resilience.stragglers import RANKS, Stragglers
from trainer.resilience.timeledger import TimeLedger
from trainer.resilience.watchdog import Activity, Watchdog
from trainer.run_models import RunModels
from trainer.step import MAIN
from trainer.strategies.base import Strategy
from trainer.strategies.single import Single, StepOptions
from trainer.topology import Topology
from trainer.tracking import JsonLines, RunInfo, Tracker, Trackers
from trainer.tracking.aside import Aside
from trainer.tracking.console import Console
from trainer.tracking.disk import Disk
from trainer.tracking.journal import Journal
from trainer.tracking.wandb import WandB
from trainer.transforms import Transform, apply
from trainer.transforms.fp8 import FP8
from trainer.utilization import Meter


def model_factory(
    config: Config,
    tokenizer: Tokenizer,
    example: Callable[[], dict[str, torch.Tensor]] | None = None,
    given: Fill | None = None,
    loaded: bool = False,
    before: Sequence[Transform] = (),
) -> ModelFactory:
    """What makes the model and gives it its initial weights: drawn ones, unless others are given, or loaded from a
    checkpoint. `before`: transforms that are applied before those of the config."""

    facts, changes = Facts.of(config, tokenizer, example), [*before, *transforms(config)]

    def make() -> nn.Module:
        model = plugin(config, "model")(config.model, facts)
        apply(changes, model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(f"model={config.model.name}: all of its parameters are frozen, nothing would be trained")
        return model if config.precision.param == "fp32" else of_type(model, DTYPES[config.precision.param])

    return ModelFactory(make, config.run.seed, example, given, loaded, [change.initialise for change in changes])


def without_transforms(config: Config) -> Config:
    """The config of the same run, whose model is as its class makes it."""
    return config.model_copy(update={"model": config.model.model_copy(update={"transforms": {}})})


def not_saved(config: Config, tokenizer: Tokenizer) -> frozenset[str]:
    """The parameters that checkpoints of the run leave out: each life reads or draws their values again."""
    if not config.model.transforms:
        return frozenset()
    with without_values():
        model: Any = model_factory(config, tokenizer).build()
    return getattr(model, "not_saved", frozenset())


def check_transforms(config: Config, tokenizer: Tokenizer) -> None:
    """Raises ConfigError where a transform does not fit the run's model. A model that looks at the data while it is
    made is not made here."""
    with suppress(ValueError):
        not_saved(config, tokenizer)


def check_machine(config: Config, device: torch.device) -> None:
    """Raises ConfigError with all that the config asks for and this machine does not have."""
    problems = []
    try:
        precision = Precision.resolve(config.precision, device)
        if precision.compute == "fp8" and (reason := without_torchao()):
            problems.append(f"precision.compute=fp8: {reason}; nearest: precision=bf16")
    except ConfigError as error:
        problems += error.problems
    problems += missing(config)
    if problems:
        raise ConfigError(problems)


def build_strategy(
    config: Config, topology: Topology, inputs: Inputs, given: Fill | None = None, loaded: bool = False
) -> Strategy:
    """The strategy, set up: model on its device, with its own initial values or those given, optimizer made. `loaded`:
    a checkpoint's values follow, so the model has none but those that are not saved."""
    strategy = strategy_for(config, topology, inputs)
    fp8 = [FP8(schema.FP8(name="fp8"))] if strategy.precision.compute == "fp8" else []
    factory = model_factory(config, inputs.tokenizer, inputs.stream.share.example, given, loaded, fp8)
    strategy.setup(factory, partial(build_optimizer, config))
    return strategy


def strategy_for(config: Config, topology: Topology, inputs: Inputs, frozen: bool = False) -> Single:
    """The strategy, not yet set up. DeepSpeed shards what has an optimizer: a `frozen` model is FSDP2's there."""
    train, kind, section = config.train, plugin(config, "strategy"), config.strategy
    if frozen and (instead := getattr(kind, "instead_for_frozen", None)):
        kind, section = instead()
    return kind(
        section,
        topology,
        Precision.resolve(config.precision, topology.device),
        inputs.objective,
        StepOptions(
            train.clip_norm,
            "none" if frozen else train.activation_checkpointing,
            train.compile,
            train.micro_batch or train.global_batch // topology.dp_size,
            unequal=inputs.stream.share.tolerant,
        ),
    )


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    optimizer = plugin(config, "optimizer")(config.optimizer, model)
    decay = getattr(config.optimizer, "ema", None)  # which the Config of a user's may not have
    return track_average(optimizer, decay) if decay else optimizer


def build_schedule(config: Config) -> Schedule:
    return plugin(config, "schedule")(config.schedule, config.optimizer.lr, config.train.steps)


def build_trained(config: Config, topology: Topology, inputs: Inputs, loaded: bool) -> dict[str, Strategy]:
    """The models that are trained beside the run's own, each under a strategy of its own of the same kind."""
    return {
        name: build_strategy(of_model, topology, inputs, loaded=loaded) for name, of_model in trained(config).items()
    }


def trained(config: Config) -> dict[str, Config]:
    """Of each model that is trained beside the run's own the config, as if it were the run's."""
    return {
        name: config.model_copy(
            update={
                "model": other.model, "optimizer": other.optimizer, "schedule": other.schedule,
                "run": config.run.model_copy(update={"seed": key(config.run.seed, "model", name)}),
            }
        )
        for name, other in sorted(config.models.trained.items())
    }  # fmt: skip


def build_journal(config: Config, topology: Topology, disk: Disk) -> Journal:
    info = RunInfo(
        name=config.run.name,
        folder=disk.folder,
        steps=config.train.steps,
        step=0,
        config=config.resolved(),
        environment=environment(topology),
    )
    if not topology.is_main:
        return Journal(topology, info, None, config.data.ledger)
    told = info.config["track"]["wandb"]
    wandb = Aside(WandB(told["mode"], told["project"], group=told["group"], name=told["name"]))
    others: list[Tracker] = [Console(), wandb] if config.track.console else [wandb]
    return Journal(topology, info, Trackers(JsonLines(disk.folder, disk), others), config.data.ledger)


def build_stream(stream: Stream, topology: Topology) -> Stream | AgreedStream:
    alike = topology.layout.processes == 1 or not stream.share.tolerant
    return stream if alike else AgreedStream(stream, topology)


def build_quarantine(config: Config, topology: Topology, folder: RunFolder) -> Quarantine:
    budget = config.data.error_budget if config.data.on_error == "quarantine" else None
    return Quarantine(folder.path, topology, budget, resumed=folder.found is not None)


def build(
    config: Config,
    topology: Topology,
    inputs: Inputs,
    folder: RunFolder,
    identity: Identity,
    disk: Disk,
    clock: TimeLedger,
    watchdog: Watchdog,
    given: Fill | None = None,
    frozen: Mapping[str, Strategy] | None = None,
) -> Job:
    """Everything the loop talks to. `given`: weights that a run which has no checkpoint yet starts with; `frozen`:
    models that are only asked."""
    checkpoint = config.checkpoint
    strategy = build_strategy(config, topology, inputs, given, loaded=folder.found is not None)
    if topology.is_main:
        for name, content in getattr(strategy, "files", {}).items():  # what it made of the config, to be looked at
            replace_file(folder.path / name, json.dumps(content, indent=2).encode())
    saver = Saver(
        folder.path / CHECKPOINTS,
        topology,
        folder.retention,
        asynchronous=checkpoint.asynchronous,
        overrun=checkpoint.overrun,
        mirror=folder.mirror,
    )
    watchdog.activities.append(Activity(saver.saving, lambda _: list(saver.took), "checkpoint"))
    return Job(
        config=config,
        topology=topology,
        models=RunModels(strategy, build_trained(config, topology, inputs, folder.found is not None), frozen),
        schedules={name: build_schedule(of_model) for name, of_model in {MAIN: config, **trained(config)}.items()},
        stream=build_stream(inputs.stream, topology),
        validation=inputs.validation,
        saver=saver,
        requests=Requests(folder.path, watch_files=topology.is_main),
        journal=build_journal(config, topology, disk),
        quarantine=build_quarantine(config, topology, folder),
        guard=Guard(config.guard, topology.device),
        replicas=Replicas(topology),
        meter=Meter(
            topology,
            inputs.stream.share.batches,
            model_factory(config, inputs.tokenizer, inputs.stream.share.example),
        ),
        stragglers=Stragglers(topology, disk.appended(RANKS) if topology.is_main else None),
        clock=clock,
        folder=folder,
        identity=identity,
        born=float(os.environ.get("ONECURVE_BORN", clock.born)),
        time_limit=Interval.parse(config.launch.time_limit or 0).amount or math.inf,
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
