"""Builds the run's logger from the config: the main rank's trackers, and the facts they get at the start."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from trainer import __version__
from trainer.config import Config
from trainer.topology import Topology
from trainer.tracking import JsonlTracker, RunInfo, Tracker, Trackers
from trainer.tracking.background_writer import BackgroundWriter
from trainer.tracking.console import Console
from trainer.tracking.run_files import RunFiles
from trainer.tracking.run_logger import RunLogger
from trainer.tracking.wandb import WandB


def build_logger(config: Config, topology: Topology, disk: RunFiles) -> RunLogger:
    info = RunInfo(
        name=config.run.name,
        folder=disk.folder,
        steps=config.train.steps,
        step=0,
        config=config.resolved(),
        environment=environment(topology),
    )
    if not topology.is_main:
        return RunLogger(topology, info, None, config.data.ledger)
    wandb_config = info.config["track"]["wandb"]
    wandb = BackgroundWriter(
        WandB(wandb_config["mode"], wandb_config["project"], group=wandb_config["group"], name=wandb_config["name"])
    )
    trackers: list[Tracker] = [Console(), wandb] if config.track.console else [wandb]
    return RunLogger(topology, info, Trackers(JsonlTracker(disk.folder, disk), trackers), config.data.ledger)


def environment(topology: Topology) -> dict[str, Any]:
    """Returns versions and hardware, for the record."""
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
