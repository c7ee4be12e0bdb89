"""Fully sharded data parallel (FSDP2): every process holds a part of each parameter, gradient and optimizer state.

A layer's parameters are gathered when it is to be computed, and its gradients summed and dealt out again (Rajbhandari
et al. 2020, "ZeRO"; Zhao et al. 2023, "PyTorch FSDP").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from trainer.config import strategy as schema
from trainer.errors import TrainingError
from trainer.models import ModelFactory, materialize
from trainer.optim.groups import names
from trainer.patches import with_sums_left, without_values
from trainer.precision import DTYPES, Precision
from trainer.strategies.base import UpdateResult
from trainer.strategies.layers import raise_if_scalars, wrap_layers
from trainer.strategies.tensor_parallel import TensorParallel
from trainer.strategies.used_parameters import UsedParameters


class FSDP(TensorParallel):
    """Parameters are sharded in dimension 0.

    No process ever holds the whole model: it is made without values, sharded, and filled parameter by parameter.
    """

    config: schema.Sharded
    used: UsedParameters | None = None
    casts_kept = False  # a layer's weights are released after it: so are copies of them

    def build(self, model_factory: ModelFactory) -> nn.Module:
        mesh = self.topology.mesh()
        with without_values():
            model = model_factory.build()
        wrap_layers(model, self.options.activation_checkpointing, self.options.compile)
        self.split(model, mesh["tp"])
        shard(
            model,
            getattr(model, "blocks", []),
            self.copies(mesh),
            self.precision,
            reshard_after_forward=self.config.reshard_after_forward,
            gather=self.config.gather,
            cpu_offload=self.config.cpu_offload,
            find_unused=self.config.find_unused_parameters,
        )
        device = self.topology.device
        materialize(model, torch.device("cpu") if self.config.cpu_offload else device, device)
        model_factory.fill(model, dist.group.WORLD)
        self.num_averaged_ranks = 1  # gradients are summed
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        if self.config.find_unused_parameters:
            self.used = UsedParameters(names(model), model, self.topology.device)
            self.used.watch_groups(model)
        return super().wrap(model)

    def update(self, lr: float, limit: Tensor | float = math.inf) -> UpdateResult:
        if self.used:  # what no process has used was filled up with zeros, too
            for name in self.used.find_unused():
                self.model.get_parameter(name).grad = None
        return super().update(lr, limit)

    def copies(self, mesh: DeviceMesh) -> DeviceMesh:
        """The processes that the model is sharded over: all in a row."""
        return mesh["dp"]

    def sync(self, last: bool) -> AbstractContextManager[object]:
        if self.config.reduce == "last":
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            gathered = self.full_tensor(tensor.detach())
            if self.topology.is_main:
                yield name, gathered.cpu()


class HSDP(FSDP):
    """Hybrid: groups of `shard_size` neighboring processes share one sharded copy; gradients are summed over all."""

    config: schema.HSDP

    def copies(self, mesh: DeviceMesh) -> DeviceMesh:
        """Copies x shards of one."""
        size = self.config.shard_size or self.topology.local_size
        return self.topology.mesh_of(dp_replicate=self.topology.dp_size // size, dp_shard=size)

    def sync(self, last: bool) -> AbstractContextManager[object]:
        """Groups of processes send to each other once a step: until then each adds up its own micro-batches."""
        if self.config.reduce == "last" or rounds_sums(self.precision, self.config.gather):
            return super().sync(last)
        self.model.set_requires_all_reduce(last)  # type: ignore[operator]
        return require_released_gradients(self.model) if last else nullcontext()


def shard(
    module: nn.Module,
    layers: Iterable[nn.Module],
    mesh: DeviceMesh,
    precision: Precision,
    *,
    reshard_after_forward: bool,
    gather: str = "param",
    cpu_offload: bool = False,
    find_unused: bool = False,
) -> None:
    """Shards each layer, then what is outside of layers with the module itself.

    It is the last of what is done to a model: recomputation is inside of what is compiled, so that the compiler sees it
    (`wrap_layers`); splitting of matrices and gathering are outside of both.
    """
    raise_if_scalars(module, "FSDP2 cannot shard")
    options: dict[str, Any] = {"mesh": mesh}
    rounded = precision.reduce != precision.param
    options["mp_policy"] = MixedPrecisionPolicy(
        param_dtype=precision.compute_dtype if gather == "compute" else None,
        reduce_dtype=precision.reduce_dtype if rounded else None,  # None: that of the gradients
        cast_forward_inputs=False,  # autocast does it
    )
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for layer in layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(module, reshard_after_forward=False, **options)  # needed again at once in the backward pass
    for part in module.modules():
        if isinstance(part, FSDPModule):  # a sum: counts differ between ranks, so no mean of means is right
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            part.set_reduce_scatter_unused_params(find_unused)


def rounds_sums(precision: Precision, gather: str) -> bool:
    """Whether gradients are sent in a shorter type than they are held in. FSDP2 keeps sums over micro-batches that are
    not all-reduced yet in the type that it sends, where a sum of many would lose its last terms."""
    held = DTYPES[precision.param]
    sent = precision.compute_dtype if gather == "compute" else held
    if precision.reduce != precision.param:
        sent = precision.reduce_dtype
    return sent.itemsize < held.itemsize


@contextmanager
def require_released_gradients(model: nn.Module) -> Iterator[None]:
    """Around the last backward pass of a step. FSDP2 (torch 2.13) all-reduces the sums of a layer that this pass
    reaches; those of another layer would be lost, and be added to the next step's."""
    yield
    name = with_sums_left(model)
    if name is not None:
        raise TrainingError(
            f"{name or 'the model'}: has gradients from an earlier micro-batch of the step, but none from the last "
            "one, so strategy=hsdp cannot sum them; use strategy.reduce=last"
        )
