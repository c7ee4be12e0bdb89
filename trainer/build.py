"""The composition root: a checked config becomes the objects that the training loop uses. Each package
builds its own."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping

from trainer.checkpoint.save import Saver
from trainer.config import Config
from trainer.config.interval import Interval
from trainer.files import replace_file
from trainer.job import Job
from trainer.models import Fill
from trainer.models.factory import model_factory
from trainer.optim.build import build_schedule
from trainer.randomness import key
from trainer.resilience.build import agree_on_faults, build_resilience
from trainer.resilience.time_ledger import TimeLedger
from trainer.resilience.watchdog import Activity, Watchdog
from trainer.run_data import RunData
from trainer.run_directory import CHECKPOINTS, Identity, RunDirectory
from trainer.run_models import RunModels
from trainer.step import MAIN
from trainer.strategies.base import Strategy
from trainer.strategies.build import build_strategy
from trainer.topology import Topology
from trainer.tracking.build import build_logger
from trainer.tracking.run_files import RunFiles
from trainer.utilization import Meter


def build(
    config: Config,
    topology: Topology,
    run_data: RunData,
    folder: RunDirectory,
    identity: Identity,
    run_files: RunFiles,
    clock: TimeLedger,
    watchdog: Watchdog,
    pretrained: Fill | None = None,
    frozen: Mapping[str, Strategy] | None = None,
) -> Job:
    """Returns everything that the training loop uses. `pretrained`: the weights that a run without a checkpoint starts
    with; `frozen`: models that are only evaluated."""
    checkpoint = config.checkpoint
    strategy = build_strategy(config, topology, run_data, pretrained, loaded=folder.checkpoint is not None)
    if topology.is_main:
        for name, content in getattr(strategy, "files", {}).items():  # derived from the config, for people to read
            replace_file(folder.path / name, json.dumps(content, indent=2).encode())
    saver = Saver(
        folder.path / CHECKPOINTS,
        topology,
        folder.retention,
        asynchronous=checkpoint.asynchronous,
        overrun=checkpoint.overrun,
        mirror=folder.mirror,
    )
    watchdog.activities.append(Activity(saver.save_in_flight, lambda _: list(saver.durations), "checkpoint"))
    return Job(
        config=config,
        topology=topology,
        models=RunModels(strategy, build_trained(config, topology, run_data, folder.checkpoint is not None), frozen),
        schedules={
            name: build_schedule(of_model) for name, of_model in {MAIN: config, **trained_configs(config)}.items()
        },
        stream=agree_on_faults(run_data.stream, topology),
        validation=run_data.validation,
        saver=saver,
        logger=build_logger(config, topology, run_files),
        resilience=build_resilience(config, topology, folder, run_files),
        meter=Meter(
            topology,
            run_data.stream.share.batches,
            model_factory(config, run_data.tokenizer, run_data.stream.share.example),
        ),
        clock=clock,
        folder=folder,
        identity=identity,
        started_at=float(os.environ.get("ONECURVE_BORN", clock.started_at)),
        time_limit=Interval.parse(config.launch.time_limit or 0).amount or math.inf,
    )


def build_trained(config: Config, topology: Topology, run_data: RunData, loaded: bool) -> dict[str, Strategy]:
    """Returns the further trained models, each under its own strategy of the same kind as the run's."""
    return {
        name: build_strategy(of_model, topology, run_data, loaded=loaded)
        for name, of_model in trained_configs(config).items()
    }


def trained_configs(config: Config) -> dict[str, Config]:
    """Returns the config of each further trained model, as if it were the run's own."""
    return {
        name: config.model_copy(
            update={
                "model": trained.model, "optimizer": trained.optimizer, "schedule": trained.schedule,
                "run": config.run.model_copy(update={"seed": key(config.run.seed, "model", name)}),
            }
        )
        for name, trained in sorted(config.models.trained.items())
    }  # fmt: skip
