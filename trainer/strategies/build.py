"""From the config to a strategy with its model. The one place that knows what runs on one process."""

from __future__ import annotations

from functools import partial

from trainer.config import Config
from trainer.config import transforms as schema
from trainer.errors import ConfigError
from trainer.models import Fill
from trainer.models.factory import model_factory
from trainer.optim.build import build_optimizer
from trainer.precision import Precision
from trainer.registry import OPTIONS, plugin
from trainer.run_data import RunData
from trainer.strategies.arithmetic import StepArithmetic, StepOptions
from trainer.strategies.single import Single
from trainer.topology import Topology
from trainer.transforms.fp8 import FP8


def build_strategy(
    config: Config, topology: Topology, run_data: RunData, pretrained: Fill | None = None, loaded: bool = False
) -> StepArithmetic:
    """The strategy, set up: model on its device, with its own initial values or those given, optimizer made. `loaded`:
    a checkpoint's values follow, so the model has none but those that are not saved."""
    strategy = strategy_for(config, topology, run_data)
    fp8 = [FP8(schema.FP8(name="fp8"))] if strategy.precision.compute == "fp8" else []
    factory = model_factory(config, run_data.tokenizer, run_data.stream.share.example, pretrained, loaded, fp8)
    strategy.setup(factory, partial(build_optimizer, config))
    return strategy


def strategy_for(config: Config, topology: Topology, run_data: RunData, frozen: bool = False) -> StepArithmetic:
    """The strategy, not yet set up. DeepSpeed shards what has an optimizer: a `frozen` model is FSDP2's there."""
    train, kind, section = config.train, plugin(config, "strategy"), config.strategy
    if frozen and (instead := getattr(kind, "instead_for_frozen", None)):
        kind, section = instead()
    casts_kept = getattr(kind, "casts_kept", True)
    if topology.world_size == 1 and not getattr(kind, "runs_alone", True):
        if config.strategy.name not in OPTIONS["strategy"]:  # what is a user's is not quietly another one
            raise ConfigError(
                f"strategy={config.strategy.name}: runs on 2 processes and more; nearest: strategy=single"
            )
        kind = Single
    strategy = kind(
        section,
        topology,
        Precision.resolve(config.precision, topology.device),
        run_data.objective,
        StepOptions(
            train.clip_norm,
            "none" if frozen else train.activation_checkpointing,
            train.compile,
            train.micro_batch or train.global_batch // topology.dp_size,
            unequal_micro_batches=run_data.stream.share.tolerant,
        ),
    )
    strategy.casts_kept = casts_kept  # gradients are rounded on one process as they are on many
    return strategy
