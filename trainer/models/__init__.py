"""Models: map a batch to outputs, give every parameter its initial value by name, name their layers (`blocks`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.randomness import key

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


Fill = Callable[[str, Tensor], None]  # fills the value of the parameter of that name


class Model(Protocol):
    """What a model brings besides being an nn.Module."""

    blocks: nn.ModuleList

    def __call__(self, batch: dict[str, Tensor]) -> Tensor: ...

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None: ...


class Cuttable(Model, Protocol):
    """A model whose layers a pipeline can put on several processes: what it does, in three parts.

    `model(batch)` equals `project(run(blocks, embed(batch), batch), batch)`. Where a process has no part in one of the
    three, the modules for it are not there.
    """

    embedding_parts: Sequence[str]
    """Names of the modules that only `embed` uses, or `project` too; those that are not there do not matter."""
    head_parts: Sequence[str]
    """Those of `project`; one that is in both lists is tied: its gradients are added up."""

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """What goes into the first block, [B, ...]."""
        ...

    def run(self, blocks: Iterable[nn.Module], x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """`x` behind these of the blocks; of the same shape and type."""
        ...

    def project(self, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Outputs of what comes out of the last block."""
        ...


class TensorParallel(Model, Protocol):
    """A model that says how its matrices are split."""

    def tensor_parallel_plan(self, sequence_parallel: bool) -> dict[str, ParallelStyle]:
        """Module names (patterns) -> torch's styles. What it does not name is kept whole by every process."""
        ...


@torch.no_grad()
def initialise(model: nn.Module, seed: int, given: Fill | None = None) -> None:
    """Every parameter by (seed, its name): the same weights in any order, on any rank, under any sharding. Or by what
    is `given`."""
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, dtype=torch.float32)
        if given is None:
            generator = torch.Generator().manual_seed(key(seed, "init", name))
            model.initialise(name, value, generator)  # type: ignore[operator]
        else:
            given(name, value)
        if isinstance(parameter, DTensor):  # every rank takes its part of what all of them have made
            parts = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(parts.to_local())
        else:
            parameter.copy_(value)


def of_type(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with parameters of that type, tied ones still tied; `Module.to` does not work on fake tensors."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
            setattr(module, name, made[parameter])
    return model


@dataclass(frozen=True)
class ModelFactory:
    """A model in two steps, for those who shard it in between: `build` makes it, `fill` gives it its initial values.
    Called, it does both: the whole model, on the CPU. `example`: a batch [1, ...] of the run, on the CPU, of which only
    shapes and types matter. `given` takes the place of the model's own initial values."""

    build: Callable[[], nn.Module]
    seed: int
    example: Callable[[], dict[str, Tensor]] | None = None
    given: Fill | None = None

    def fill(self, model: nn.Module) -> None:
        initialise(model, self.seed, self.given)

    def __call__(self) -> nn.Module:
        model = self.build()
        self.fill(model)
        return model


@contextmanager
def without_values() -> Iterator[None]:
    """Parameters of modules that are made meanwhile take no memory (they are on the meta device); buffers are real."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is, is tied to another
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
