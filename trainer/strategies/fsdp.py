"""Fully sharded data parallel (FSDP2): every process holds a part of each parameter, gradient and optimizer state.

A layer's parameters are gathered when it is to be computed, and its gradients summed and dealt out again (Rajbhandari
et al. 2020, "ZeRO"; Zhao et al. 2023, "PyTorch FSDP").
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from trainer.config import strategy as schema
from trainer.models import ModelFactory, without_values
from trainer.strategies.layers import prepare
from trainer.strategies.single import Single, StepOptions


class FSDP(Single):
    """`Single` on parameters that are sharded in dimension 0. Alone, without a process group, it is `Single`.

    No process ever holds the whole model: it is made without values, sharded, and filled parameter by parameter.
    """

    config: schema.Sharded

    def build(self, model_factory: ModelFactory) -> nn.Module:
        if not self.parallel:
            return super().build(model_factory)
        with without_values():
            model = model_factory.build()
        shard(model, self.mesh(), self.options, self.config.reshard_after_forward)
        materialise(model, self.topology.device)
        model_factory.fill(model)
        self.averaged_over = 1  # gradients are summed
        return model

    def mesh(self) -> DeviceMesh:
        """All processes in a row."""
        return init_device_mesh(self.topology.device.type, (self.topology.dp_size,), mesh_dim_names=("shard",))

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            gathered = self.whole(tensor.detach())
            if self.topology.is_main:
                yield name, gathered.cpu()


class HSDP(FSDP):
    """Hybrid: groups of `shard_size` neighbouring processes share one sharded copy; gradients are summed over all."""

    config: schema.HSDP

    def mesh(self) -> DeviceMesh:
        """Copies x shards of one."""
        shape = (self.topology.dp_size // self.config.shard_size, self.config.shard_size)
        return init_device_mesh(self.topology.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh, options: StepOptions, reshard_after_forward: bool) -> None:
    """All that is done to a model, in this order: each layer recomputed in the backward pass, compiled, sharded; then
    what is outside of layers is sharded with the model itself.

    Recomputation is inside of what is compiled, so that the compiler sees it; gathering is outside of both.
    """
    prepare(model, options.activation_checkpointing, options.compile)
    for layer in getattr(model, "blocks", []):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # needed again at once in the backward pass
    for module in model.modules():
        if isinstance(module, FSDPModule):  # a sum: counts differ between ranks, so no mean of means is right
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def materialise(model: nn.Module, device: torch.device) -> None:
    """Memory for this rank's shards, still without values; buffers keep theirs."""
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
