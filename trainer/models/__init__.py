"""Models: they map a batch to outputs, give every parameter its initial value by name, and name their layers
(`blocks`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.patches import without_values
from trainer.randomness import key

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

    from trainer.config import Config
    from trainer.data.tokenizer import Tokenizer
    from trainer.models.family import Family


CPU = torch.device("cpu")
Fill = Callable[[str, Tensor], None]  # fills the value of the parameter of that name
Initialise = Callable[[str, Tensor, torch.Generator], bool]  # fills it if it is one of its own; returns whether it is


class Model(Protocol):
    """What a model has besides being an nn.Module that is made from its `Config` and the run's `Facts`."""

    blocks: nn.ModuleList

    def __call__(self, batch: dict[str, Tensor]) -> Tensor | dict[str, Tensor]: ...

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None: ...


class UpdatesBuffers(Model, Protocol):
    """A model that changes its buffers after each update, by sums over the step and all ranks: loads of experts,
    ranges, running statistics."""

    statistics: Sequence[str]
    """Names of buffers that are not saved, to which forward passes add in training mode; they are zero at the beginning
    of each step. Passes that do not count (recomputation, `infer`) leave no trace in them. In a pipeline each is in one
    stage."""

    def after_update(self, sums: dict[str, Tensor]) -> None:
        """Changes persistent buffers. `sums`: of this process's `statistics`, over all replicas, fp64.
        The changes are undone if the step is refused."""
        ...


class Cuttable(Model, Protocol):
    """A model that a pipeline can split into stages: its forward pass consists of three methods.

    `model(batch)` equals `project(run(blocks, embed(batch), batch), batch)`. A rank lacks the modules of the methods
    that it does not run.
    """

    embedding_parts: Sequence[str]
    """Names of the modules that `embed` uses, `project` too if they are tied; names without a module are ignored."""
    head_parts: Sequence[str]
    """Names of the modules that `project` uses; one in both lists is tied: its gradients are summed."""

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the input of the first block, [B, ...]."""
        ...

    def run(self, blocks: Iterable[nn.Module], x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Returns `x` after these blocks, in the same shape and type."""
        ...

    def project(self, x: Tensor, batch: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Returns the model's outputs, a tensor or a dict of them, from the output of the last block."""
        ...


class TensorParallel(Model, Protocol):
    """A model that says how its matrices are split."""

    def tensor_parallel_plan(self, sequence_parallel: bool) -> dict[str, ParallelStyle]:
        """Returns torch's styles by module name (pattern). Every rank keeps all of a module that is not named."""
        ...


class Exportable(Model, Protocol):
    """A model that transformers also has: it can start with Hugging Face's weights, and be exported to them."""

    @staticmethod
    def family(config: Config, tokenizer: Tokenizer) -> Family:
        """Returns what the model is in transformers. Raises trainer.models.family.UnknownFamily."""
        ...


@torch.no_grad()
def initialise(
    model: nn.Module,
    seed: int,
    pretrained: Fill | None = None,
    holders: dist.ProcessGroup | None = None,
    initializers: Sequence[Initialise] = (),
    should_fill: Callable[[str], bool] = lambda name: True,
) -> None:
    """Fills every parameter by (seed, its name): the same weights in any order, on any rank, under any sharding. Or by
    its `pretrained` value. The other arguments are those of `initial_values`."""
    for parameter, value in initial_values(
        model, seed, pretrained, holders, initializers=initializers, should_fill=should_fill
    ):
        if isinstance(parameter, DTensor):  # every rank received the whole value and takes its shard
            shards = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(shards.to_local())
        else:
            parameter.copy_(value)


@torch.no_grad()
def initial_values(
    model: nn.Module,
    seed: int,
    pretrained: Fill | None = None,
    holders: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    initializers: Sequence[Initialise] = (),
    should_fill: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yields each parameter for which `should_fill` is true, with its whole initial value in fp32, on `device` or the
    parameter's own. The value is that of the first of `initializers` that has one, else `pretrained`, else the model's.

    `holders` are the ranks that hold the parameters, or shards of them. Each value is drawn or read by one of them,
    which broadcasts it to the others; each rank draws one value while the others draw theirs, and has at most one more
    in memory. None: this process draws all.
    """
    rank, size = (dist.get_rank(holders), dist.get_world_size(holders)) if holders else (0, 1)
    parameters = (item for item in model.named_parameters() if should_fill(item[0]))
    while chunk := list(islice(parameters, size)):  # one parameter for each rank to draw
        local_value = _draw(model, *chunk[rank], seed, pretrained, initializers) if rank < len(chunk) else None
        for owner, (_, parameter) in enumerate(chunk):
            target = device or _broadcast_device(parameter)
            if owner == rank and local_value is not None:
                value, local_value = local_value.to(target), None
            else:
                value = torch.empty(parameter.shape, dtype=torch.float32, device=target)
            if holders:
                dist.broadcast(value, group=holders, group_src=owner)
            yield parameter, value


def _broadcast_device(parameter: Tensor) -> torch.device:
    """Returns the device on which the ranks of a mesh compute, even if they hold their shards elsewhere; else the
    parameter's own."""
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device


def _draw(
    model: nn.Module,
    name: str,
    parameter: Tensor,
    seed: int,
    pretrained: Fill | None,
    initializers: Sequence[Initialise],
) -> Tensor:
    value = torch.empty(parameter.shape, dtype=torch.float32)
    generator = torch.Generator().manual_seed(key(seed, "init", name))
    if any(initialise_own(name, value, generator) for initialise_own in initializers):
        pass
    elif pretrained is None:
        model.initialise(name, value, generator)  # type: ignore[operator]
    else:
        pretrained(name, value)
    return value


def is_saved(model: nn.Module) -> Callable[[str], bool]:
    """Returns the predicate of names that tells whether checkpoints hold a parameter or buffer. They leave out the
    parameters in `model.not_saved`: frozen ones, which always have the value of `model.weights`."""
    not_saved: Any = getattr(model, "not_saved", frozenset())
    return lambda name: name not in not_saved


def poison(tensor: Tensor) -> Tensor:
    """Fills a tensor with NaN (integers with 0), so that it shows if a checkpoint lacks its value; returns it."""
    return tensor.fill_(math.nan if tensor.is_floating_point() else 0)


@torch.no_grad()
def materialize(model: nn.Module, storage_device: torch.device, compute_device: torch.device) -> None:
    """Allocates memory for the parameters of a model that was made without values, or for this rank's shards of them,
    on `storage_device`; tied ones stay tied. Buffers keep their values and move to `compute_device`."""
    buffers = [
        (module, name, buffer.to(compute_device))
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    replacements: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta and not isinstance(parameter, DTensor):  # else `to_empty` unties what is tied
                if parameter not in replacements:
                    memory = torch.empty_like(parameter, device=storage_device)
                    replacements[parameter] = nn.Parameter(memory, parameter.requires_grad)
                setattr(module, name, replacements[parameter])
    model.to_empty(device=storage_device)
    for module, name, buffer in buffers:
        setattr(module, name, buffer)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts the parameters of the model in place, tied ones stay tied, and returns it. (`Module.to` does not work on
    fake tensors.)"""
    replacements: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in replacements:
                value = parameter.detach().to(dtype)
                replacements[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            setattr(module, name, replacements[parameter])
    return model


@dataclass(frozen=True)
class ModelFactory:
    """Makes a model in two steps, so that it can be sharded in between: `build` makes it, `fill` gives it its initial
    values. Calling the factory does both and returns the whole model. `example`: a batch [1, ...] of the run, on the
    CPU, of which only shapes and types matter. `pretrained` replaces the model's own initial values, and the values of
    `initializers` come before it. `loaded`: a checkpoint gives all values that it holds (`is_saved`), so only the
    others are drawn or read."""

    build: Callable[[], nn.Module]
    seed: int
    example: Callable[[], dict[str, Tensor]] | None = None
    pretrained: Fill | None = None
    loaded: bool = False
    initializers: Sequence[Initialise] = ()

    def fill(self, model: nn.Module, holders: dist.ProcessGroup | None = None) -> None:
        """Gives the model its initial values. `holders`: the ranks that hold its parameters; all of them call it."""
        should_fill = self._fill_filter(model)
        initialise(model, self.seed, self.pretrained, holders, self.initializers, should_fill)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not should_fill(name):
                    poison(parameter.to_local() if isinstance(parameter, DTensor) else parameter)

    def values(
        self, model: nn.Module, holders: dist.ProcessGroup | None, device: torch.device
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yields each parameter with the whole value that `fill` would give it, for callers that shard it
        themselves."""
        should_fill = self._fill_filter(model)
        yield from initial_values(model, self.seed, self.pretrained, holders, device, self.initializers, should_fill)
        for name, parameter in model.named_parameters():
            if not should_fill(name):
                yield parameter, poison(torch.empty(parameter.shape, dtype=torch.float32, device=device))

    def value(self, model: nn.Module, name: str) -> Tensor:
        """Returns the whole value that `fill` gives the parameter of that name, on the CPU."""
        parameter = model.get_parameter(name)
        first_name = next(n for n, tied in model.named_parameters() if tied is parameter)  # `fill` draws by this name
        return _draw(model, first_name, parameter, self.seed, self.pretrained, self.initializers).to(parameter.dtype)

    def _fill_filter(self, model: nn.Module) -> Callable[[str], bool]:
        """Returns the predicate of the names of parameters that have to be drawn or read."""
        is_in_checkpoint = is_saved(model)
        return (lambda name: not is_in_checkpoint(name)) if self.loaded else lambda name: True

    def __call__(self, device: torch.device = CPU, holders: dist.ProcessGroup | None = None) -> nn.Module:
        try:
            with without_values():
                model = self.build()
            materialize(model, device, device)
        except NotImplementedError:  # it computes with its parameters while it is made
            model = self.build().to(device)
        self.fill(model, holders)
        return model
