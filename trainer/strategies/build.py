"""Builds a strategy and its model from the config; only this module knows which strategies run on one process."""

from __future__ import annotations

from functools import partial

from trainer.config import Config
from trainer.config import transforms as schema
from trainer.config.strategy import Single as SingleSection
from trainer.errors import ConfigError
from trainer.models import Fill
from trainer.models.factory import model_factory
from trainer.optim.build import build_optimizer
from trainer.precision import Precision
from trainer.registry import OPTIONS, load, plugin
from trainer.run_data import RunData
from trainer.strategies.arithmetic import StepArithmetic, StepOptions
from trainer.strategies.leafwise import set_deterministic
from trainer.strategies.single import Single
from trainer.topology import Topology
from trainer.transforms.fp8 import FP8


def build_strategy(
    config: Config, topology: Topology, run_data: RunData, pretrained: Fill | None = None, loaded: bool = False
) -> StepArithmetic:
    """Returns the strategy, set up: with its model on the device, filled with its initial or the `pretrained` weights,
    and its optimizer. `loaded`: a checkpoint will be loaded, so only weights that it does not hold are filled."""
    strategy = strategy_for(config, topology, run_data)
    fp8 = [FP8(schema.FP8(name="fp8"))] if strategy.precision.compute == "fp8" else []
    factory = model_factory(config, run_data.tokenizer, run_data.stream.share.example, pretrained, loaded, fp8)
    strategy.setup(factory, partial(build_optimizer, config))
    return strategy


def strategy_for(config: Config, topology: Topology, run_data: RunData, frozen: bool = False) -> StepArithmetic:
    """Returns the strategy, not yet set up. DeepSpeed shards only models that have an optimizer, so FSDP2 shards a
    `frozen` one."""
    train, kind, section = config.train, plugin(config, "strategy"), config.strategy
    if frozen and (replacement := getattr(kind, "strategy_for_frozen", None)):
        kind, section = replacement()
    keeps_casts = getattr(kind, "keeps_casts", True)
    is_leafwise = train.deterministic == "topology"
    set_deterministic(is_leafwise, topology.device)
    if is_leafwise:
        kind = load((SingleSection if topology.world_size == 1 else type(section)).leafwise)
        keeps_casts = False
    elif topology.world_size == 1 and not getattr(kind, "runs_alone", True):
        if config.strategy.name not in OPTIONS["strategy"]:  # a user's strategy is not replaced silently
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
            deal=run_data.stream.share.deal,
            batch_sizes=frozenset({train.global_batch, *train.batch_ramp.values()}),
            unequal_micro_batches=run_data.stream.share.tolerant,
        ),
    )
    strategy.keeps_casts = keeps_casts  # gradients are rounded on one process as they are on many
    return strategy
