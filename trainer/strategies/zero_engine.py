"""Knowledge of DeepSpeed's internals (0.19): its log, its JSON, its optimizer for offloaded state, and where its engine
keeps the shards of a parameter. Changes of its code are in trainer/patches.py."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer import locks
from trainer.config import strategy as schema
from trainer.errors import ConfigError
from trainer.patches import compute_exact_powers, share_step_hooks, silence_shm
from trainer.precision import Precision

log = logging.getLogger("onecurve")
INSTALL = "pip install torch setuptools, then DS_BUILD_OPS=0 pip install --no-build-isolation 'onecurve[deepspeed]'"


def deepspeed_config(config: schema.Zero, precision: Precision, clip_norm: float, layer: int) -> dict[str, Any]:
    """Returns DeepSpeed's JSON for our config. It counts buckets in elements of 4 bytes; `layer` is the number of
    elements of the model's largest layer."""
    bucket = config.bucket_mb * 2**20 // 4
    zero: dict[str, Any] = {"stage": config.stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if config.stage == 3:
        # Only the current layer and the next one are gathered: the least that overlaps with computing.
        zero |= {"stage3_prefetch_bucket_size": layer, "stage3_max_live_parameters": 2 * layer}
        zero |= {"stage3_max_reuse_distance": 0}
        # `release_saved_parameters` is for every layer, and leaves casts to autocast.
        zero |= {"memory_efficient_linear": False}
    host = {"device": "cpu", "pin_memory": precision.device.type == "cuda"}
    zero |= {"offload_optimizer": host} if config.offload_optimizer else {}
    zero |= {"offload_param": host} if config.offload_parameters else {}
    return {
        "train_micro_batch_size_per_gpu": 1,  # the loop does that: it tells DeepSpeed which micro-batch is the last
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "communication_data_type": precision.reduce,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


class EngineShard(NamedTuple):
    """This rank's shard of a parameter: its elements `offset` to `offset + size` lie at `start` in the flat tensors of
    its group, both of weights and of optimizer state."""

    start: int
    size: int
    offset: int


def flat_tensors(engine: Any, parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Returns the tensor on which the optimizer steps for each parameter: a flat one of this rank's shards of a whole
    group, or in stage 0 the parameter itself."""
    if engine.zero_optimization_stage() == 0:
        return {parameter: parameter for parameter in parameters}
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        groups, flats = zero.fp16_groups, zero.fp32_partitioned_groups_flat
    else:
        groups, flats = zero.bit16_groups, zero.single_partition_of_fp32_groups
    return {parameter: flat for group, flat in zip(groups, flats, strict=True) for parameter in group}


def find_shard(engine: Any, parameter: Any) -> EngineShard:
    """Returns where the engine keeps its shard of a trained parameter."""
    if engine.zero_optimization_stage() == 0:
        return EngineShard(0, parameter.numel(), 0)
    if engine.zero_optimization_stage() == 3:
        _, start, size = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
        offset = dist.get_rank() * size
        return EngineShard(start, max(0, min(size, parameter.ds_numel - offset)), offset)  # the last ones are padded
    if (mapping := parameter._hp_mapping) is None:
        return EngineShard(0, 0, 0)
    address = mapping.hp_fragment_address
    return EngineShard(address.start, address.numel, mapping.lp_fragment_address.start)


def import_deepspeed(device: torch.device) -> Any:
    """Returns DeepSpeed, whose messages go to the rank's log. Raises ConfigError if it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(f"strategy=zero: DeepSpeed cannot be imported ({error}): {INSTALL}") from error
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()
    logger.parent, logger.propagate = log, True
    names = "all_gather_into_tensor|reduce_scatter_tensor"  # torch warns in each step that they have new names
    warnings.filterwarnings("ignore", f"`torch.distributed.({names})` is deprecated", FutureWarning)
    silence_shm(deepspeed)
    return deepspeed


def cpu_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Replaces torch's AdamW by DeepSpeed's for CPUs, which is several times as fast, if that can be built here."""
    if type(optimizer) is not torch.optim.AdamW:
        return optimizer
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        from deepspeed.ops.op_builder import CPUAdamBuilder
        from torch.utils.cpp_extension import _get_build_directory

        folder = Path(_get_build_directory(CPUAdamBuilder.NAME, verbose=False))
        # Our lock ends with the process that holds it; torch's own outlives a killed process, and others wait for it.
        with locks.hold_when_free(folder.with_name(f"{folder.name}.onecurve")):
            (folder / "lock").unlink(missing_ok=True)
            CPUAdamBuilder().load(verbose=False)
        keys = ("params", "lr", "betas", "eps", "weight_decay")
        adam = DeepSpeedCPUAdam([{key: group[key] for key in keys} for group in optimizer.param_groups])
    except Exception as error:  # no compiler, no ninja, another CPU
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        log.info(
            "strategy.offload_optimizer: DeepSpeed's CPUAdam cannot be built here, torch's steps instead: %s", reason
        )
        return optimizer
    compute_exact_powers(adam)
    share_step_hooks(adam, optimizer)
    return adam
