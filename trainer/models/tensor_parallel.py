"""A style for plans of tensor parallelism, beside torch's column-wise and row-wise ones: modules kept whole."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_module
from torch.distributed.tensor.parallel import ParallelStyle


class Replicated(ParallelStyle):
    """Every process keeps all parameters of the module. Its inputs are plain tensors, laid out as `taken`; its output
    is laid out as `given`, a plain tensor if `plain`, else a DTensor, for products with parameters that are shared.

    With `Shard(1)` each process computes its part of the sequence.
    """

    def __init__(self, taken: Placement = Replicate(), given: Placement = Replicate(), plain: bool = True):  # noqa: B008
        super().__init__()
        self.taken, self.given, self.plain = taken, given, plain

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        take: Any = partial(_take, self.taken)
        give: Any = partial(_give, self.given, self.plain)
        return distribute_module(module, device_mesh, None, take, give)


def _take(layout: Placement, _module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    def shared(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, DTensor):
            return value
        return DTensor.from_local(value, mesh, [layout if torch.is_floating_point(value) else Replicate()])

    return tuple(map(shared, inputs))


def _give(layout: Placement, plain: bool, _module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
    output = output.redistribute(mesh, [layout])
    return output.to_local() if plain else output
