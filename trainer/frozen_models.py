"""Frozen models beside the one that is trained: a teacher, a reference, a reward model. Each comes from another run, is
sharded as the trained one is, and is not saved; its fingerprint is part of the run's identity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.load import FoundCheckpoint, find_newest, read_state
from trainer.config import Config
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.models import Fill
from trainer.models.factory import model_factory, not_saved
from trainer.pretrained import base_of
from trainer.run_data import RunData
from trainer.run_directory import CHECKPOINTS
from trainer.sampling import open_run
from trainer.strategies.base import Strategy
from trainer.strategies.buffers import persistent_buffers
from trainer.strategies.build import strategy_for
from trainer.topology import Topology


@dataclass(frozen=True)
class FrozenModel:
    """A model of another run, with the weights of its newest checkpoint."""

    config: Config
    tokenizer: Tokenizer
    checkpoint: FoundCheckpoint
    base: Fill | None
    """Fills the values that the checkpoint leaves out."""

    @property
    def fingerprint(self) -> str:
        """Returns a fingerprint of the checksums of the checkpoint's files; other manifest fields may be amended
        later."""
        files = json.dumps(self.checkpoint.manifest["files"], sort_keys=True)
        return blake2b(files.encode(), digest_size=16).hexdigest()

    @cached_property
    def not_saved(self) -> frozenset[str]:
        return not_saved(self.config, self.tokenizer)

    def initialise(self, name: str, value: Tensor, _generator: torch.Generator) -> bool:
        """Reads the value of a parameter, if it is one that checkpoints hold."""
        if name in self.not_saved:
            return False
        read_state(self.checkpoint, {f"model/{name}": value})
        return True


def open_frozen(config: Config, topology: Topology, tokenizer: Tokenizer) -> dict[str, FrozenModel]:
    """Finds the models that the objective asks for, in the runs that `models.frozen` names. All ranks call it.

    Raises ConfigError on all of them for one that any cannot open, that has no checkpoint or lacks the weights that it
    began with, or whose tokenizer is another one.
    """
    opened, problems = dict[str, tuple[Path, Config, Tokenizer]](), []
    for name, path in sorted(config.models.frozen.items()):
        try:
            opened[name] = _open(name, path, config, tokenizer)
        except ConfigError as error:
            problems += error.problems
    if problems := sorted({problem for of_rank in topology.gather(problems) for problem in of_rank}):
        raise ConfigError(problems)
    models = {}
    for name, (run_dir, run_config, run_tokenizer) in opened.items():
        key = f"models.frozen.{name}={run_dir}"
        checkpoint, _ = find_newest(run_dir / CHECKPOINTS, topology, set_aside=False)
        if checkpoint is None:
            raise ConfigError(f"{key}: has no checkpoint yet")
        try:
            base = base_of(run_config, run_tokenizer, checkpoint, topology, movable=False)
            models[name] = FrozenModel(run_config, run_tokenizer, checkpoint, base)
        except ConfigError as error:
            raise ConfigError([f"{key}: {problem}" for problem in error.problems]) from None
    return models


def _open(name: str, path: str, config: Config, tokenizer: Tokenizer) -> tuple[Path, Config, Tokenizer]:
    run_dir = Path(path).expanduser()
    key = f"models.frozen.{name}={run_dir}"
    if not path:
        raise ConfigError(f"models.frozen.{name}: should be the directory of a run")
    try:
        run_config, run_tokenizer = open_run(run_dir, config.run.plugins)
    except ConfigError as error:
        raise ConfigError([f"{key}: {problem}" for problem in error.problems]) from None
    if run_tokenizer.fingerprint != tokenizer.fingerprint:
        raise ConfigError(f"{key}: has another tokenizer than this run, so its tokens mean something else")
    return run_dir, run_config, run_tokenizer


def build_frozen(
    config: Config, topology: Topology, run_data: RunData, models: Mapping[str, FrozenModel]
) -> dict[str, Strategy]:
    """Returns the models on their devices, in evaluation mode, without gradients."""
    return {name: _build(config, topology, run_data, frozen) for name, frozen in models.items()}


def _build(config: Config, topology: Topology, run_data: RunData, frozen: FrozenModel) -> Strategy:
    strategy = strategy_for(config, topology, run_data, frozen=True)
    frozen_config = frozen.config.model_copy(update={"precision": config.precision})
    factory = model_factory(frozen_config, frozen.tokenizer, run_data.stream.share.example, frozen.base)
    build, initializers = factory.build, [frozen.initialise, *factory.initializers]
    strategy.setup(replace(factory, build=lambda: build().requires_grad_(False), initializers=initializers), None)
    buffers = persistent_buffers(strategy.model)
    read_state(frozen.checkpoint, {f"model/{name}": buffer for name, buffer in buffers.items()})
    return strategy
