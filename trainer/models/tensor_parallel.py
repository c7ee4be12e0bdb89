"""A style for plans of tensor parallelism, besides torch's column-wise and row-wise ones: replicated modules."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_module
from torch.distributed.tensor.parallel import ParallelStyle


class Replicated(ParallelStyle):
    """The style of a module whose parameters every rank keeps whole. Its inputs are plain tensors in `input_layout`;
    its output is in `output_layout`, a plain tensor if `use_local_output`, else a DTensor, for products with sharded
    parameters.

    With `Shard(1)` each rank computes its part of the sequence.
    """

    def __init__(
        self,
        input_layout: Placement = Replicate(),  # noqa: B008
        output_layout: Placement = Replicate(),  # noqa: B008
        use_local_output: bool = True,
    ):
        super().__init__()
        self.input_layout, self.output_layout, self.use_local_output = input_layout, output_layout, use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        prepare_inputs: Any = partial(_prepare_inputs, self.input_layout)
        prepare_output: Any = partial(_prepare_output, self.output_layout, self.use_local_output)
        return distribute_module(module, device_mesh, None, prepare_inputs, prepare_output)


def _prepare_inputs(
    layout: Placement, _module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh
) -> tuple[Any, ...]:
    def to_dtensor(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, DTensor):
            return value
        return DTensor.from_local(value, mesh, [layout if torch.is_floating_point(value) else Replicate()])

    return tuple(map(to_dtensor, inputs))


def _prepare_output(
    layout: Placement, use_local_output: bool, _module: nn.Module, output: DTensor, mesh: DeviceMesh
) -> Tensor:
    output = output.redistribute(mesh, [layout])
    return output.to_local() if use_local_output else output
