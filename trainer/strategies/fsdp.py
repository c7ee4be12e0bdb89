"""Fully sharded data parallel (FSDP2): every rank holds a shard of each parameter, gradient and optimizer state.

A layer's parameters are all-gathered before it is computed, and its gradients reduce-scattered after its backward pass
(Rajbhandari et al. 2020, "ZeRO"; Zhao et al. 2023, "PyTorch FSDP").
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
from trainer.patches import find_pending_reduction, without_values
from trainer.precision import DTYPES, Precision
from trainer.strategies.base import UpdateResult
from trainer.strategies.layers import raise_if_scalars, wrap_layers
from trainer.strategies.tensor_parallel import TensorParallel
from trainer.strategies.used_parameters import UsedParameters


class FSDP(TensorParallel):
    """Shards parameters in dimension 0.

    No rank ever holds the whole model: it is built without values, sharded, and filled parameter by parameter.
    """

    config: schema.Sharded
    used: UsedParameters | None = None
    keeps_casts = False  # a layer's weights are released after it, and so are autocast's copies of them

    @property
    def finds_unused(self) -> bool:
        """Returns whether gradients of zeros are summed for parameters that a rank does not use."""
        return self.config.find_unused_parameters

    def build(self, model_factory: ModelFactory) -> nn.Module:
        mesh = self.topology.mesh()
        with without_values():
            model = model_factory.build()
        wrap_layers(model, self.options.activation_checkpointing, self.options.compile)
        self.split(model, mesh["tp"])
        shard(
            model,
            getattr(model, "blocks", []),
            self.fsdp_mesh(mesh),
            self.precision,
            reshard_after_forward=self.config.reshard_after_forward,
            gather=self.config.gather,
            cpu_offload=self.config.cpu_offload,
            find_unused=self.finds_unused,
        )
        device = self.topology.device
        materialize(model, torch.device("cpu") if self.config.cpu_offload else device, device)
        model_factory.fill(model, dist.group.WORLD)
        self.num_averaged_ranks = 1  # gradients are summed
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        if self.finds_unused:
            self.used = UsedParameters(names(model), model, self.topology.device)
            self.used.watch_groups(model)
        return super().wrap(model)

    def update(self, lr: float, limit: Tensor | float = math.inf) -> UpdateResult:
        if self.used:  # the gradient of a parameter that no rank used was filled with zeros
            for name in self.used.find_unused():
                self.model.get_parameter(name).grad = None
        return super().update(lr, limit)

    def fsdp_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """Returns the mesh that the model is sharded over: one dimension of all data-parallel ranks."""
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
    """Hybrid: groups of `shard_size` neighboring ranks share one sharded replica; gradients are summed over all."""

    config: schema.HSDP

    def fsdp_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """Returns a mesh of two dimensions: replicas of the model, and the shards of each."""
        size = self.config.shard_size or self.topology.local_size
        return self.topology.mesh_of(dp_replicate=self.topology.dp_size // size, dp_shard=size)

    def sync(self, last: bool) -> AbstractContextManager[object]:
        """Lets replicas communicate only once a step: until then each adds up the gradients of its micro-batches."""
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
    """Shards each layer, then the module itself with the parameters that are in no layer.

    This is the last wrapper of a model. Recomputation is inside of the compiled layers, so that the compiler sees it
    (`wrap_layers`); tensor parallelism and gathering are outside of both.
    """
    raise_if_scalars(module, "FSDP2 cannot shard")
    options: dict[str, Any] = {"mesh": mesh}
    rounds_gradients = precision.reduce != precision.param
    options["mp_policy"] = MixedPrecisionPolicy(
        param_dtype=precision.compute_dtype if gather == "compute" else None,
        reduce_dtype=precision.reduce_dtype if rounds_gradients else None,  # None: that of the gradients
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
    """Returns whether gradients are sent in a shorter data type than they are held in. Until FSDP2 all-reduces the sums
    of micro-batches, it keeps them in the type that it sends, where a sum of many would lose its last terms."""
    held_dtype = DTYPES[precision.param]
    sent_dtype = precision.compute_dtype if gather == "compute" else held_dtype
    if precision.reduce != precision.param:
        sent_dtype = precision.reduce_dtype
    return sent_dtype.itemsize < held_dtype.itemsize


@contextmanager
def require_released_gradients(model: nn.Module) -> Iterator[None]:
    """Raises TrainingError if the step's last backward pass, which runs within, leaves sums of gradients behind. FSDP2
    (torch 2.13) all-reduces only the layers that this pass reaches, and would add other sums to the next step's."""
    yield
    name = find_pending_reduction(model)
    if name is not None:
        raise TrainingError(
            f"{name or 'the model'}: has gradients from an earlier micro-batch of the step, but none from the last "
            "one, so strategy=hsdp cannot sum them; use strategy.reduce=last"
        )
