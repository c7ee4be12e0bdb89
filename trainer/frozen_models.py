"""Frozen models beside the one that is trained: a teacher, a reference, a reward model. Each comes from another run, is
sharded as the trained one is, and is not saved; which it is, is part of what the run is."""

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
    """A model of another run, as its newest checkpoint has it."""

    config: Config
    tokenizer: Tokenizer
    found: FoundCheckpoint
    base: Fill | None
    """Gives the values that the checkpoint leaves out."""

    @property
    def fingerprint(self) -> str:
        """Returns a fingerprint of the checksums of the checkpoint's files; other manifest fields may be amended
        later."""
        files = json.dumps(self.found.manifest["files"], sort_keys=True)
        return blake2b(files.encode(), digest_size=16).hexdigest()

    @cached_property
    def not_saved(self) -> frozenset[str]:
        return not_saved(self.config, self.tokenizer)

    def initialise(self, name: str, value: Tensor, _generator: torch.Generator) -> bool:
        """Reads the value of a parameter, if it is one that checkpoints hold."""
        if name in self.not_saved:
            return False
        read_state(self.found, {f"model/{name}": value})
        return True


def open_frozen(config: Config, topology: Topology, tokenizer: Tokenizer) -> dict[str, FrozenModel]:
    """Finds the models that the objective asks for, in the runs that `models.frozen` names. All ranks call it.

    Raises ConfigError on all of them for one that any cannot open, that has no checkpoint or lacks the weights that it
    began with, or whose tokens are others.
    """
    opened, problems = dict[str, tuple[Path, Config, Tokenizer]](), []
    for name, given in sorted(config.models.frozen.items()):
        try:
            opened[name] = _open(name, given, config, tokenizer)
        except ConfigError as error:
            problems += error.problems
    if problems := sorted({problem for of_rank in topology.gather(problems) for problem in of_rank}):
        raise ConfigError(problems)
    models = {}
    for name, (run_dir, of_run, theirs) in opened.items():
        key = f"models.frozen.{name}={run_dir}"
        found, _ = find_newest(run_dir / CHECKPOINTS, topology, set_aside=False)
        if found is None:
            raise ConfigError(f"{key}: has no checkpoint yet")
        try:
            models[name] = FrozenModel(of_run, theirs, found, base_of(of_run, theirs, found, topology, movable=False))
        except ConfigError as error:
            raise ConfigError([f"{key}: {problem}" for problem in error.problems]) from None
    return models


def _open(name: str, given: str, config: Config, tokenizer: Tokenizer) -> tuple[Path, Config, Tokenizer]:
    run_dir = Path(given).expanduser()
    key = f"models.frozen.{name}={run_dir}"
    if not given:
        raise ConfigError(f"models.frozen.{name}: should be the directory of a run")
    try:
        of_run, theirs = open_run(run_dir, config.run.plugins)
    except ConfigError as error:
        raise ConfigError([f"{key}: {problem}" for problem in error.problems]) from None
    if theirs.fingerprint != tokenizer.fingerprint:
        raise ConfigError(f"{key}: has another tokenizer than this run, so its tokens mean something else")
    return run_dir, of_run, theirs


def build_frozen(
    config: Config, topology: Topology, run_data: RunData, models: Mapping[str, FrozenModel]
) -> dict[str, Strategy]:
    """Returns the models on their devices, in evaluation mode, without gradients."""
    return {name: _build(config, topology, run_data, frozen) for name, frozen in models.items()}


def _build(config: Config, topology: Topology, run_data: RunData, frozen: FrozenModel) -> Strategy:
    strategy = strategy_for(config, topology, run_data, frozen=True)
    theirs = frozen.config.model_copy(update={"precision": config.precision})
    factory = model_factory(theirs, frozen.tokenizer, run_data.stream.share.example, frozen.base)
    build, first = factory.build, [frozen.initialise, *factory.first]
    strategy.setup(replace(factory, build=lambda: build().requires_grad_(False), first=first), None)
    buffers = persistent_buffers(strategy.model)
    read_state(frozen.found, {f"model/{name}": buffer for name, buffer in buffers.items()})
    return strategy
