"""Models: map a batch to outputs, give every parameter its initial value by name, name their layers (`blocks`)."""

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
Initialise = Callable[[str, Tensor, torch.Generator], bool]  # likewise, if it is one of its own, which it returns


class Model(Protocol):
    """What a model brings besides being an nn.Module made of its `Config` and the run's `Facts`."""

    blocks: nn.ModuleList

    def __call__(self, batch: dict[str, Tensor]) -> Tensor | dict[str, Tensor]: ...

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None: ...


class UpdatesBuffers(Model, Protocol):
    """A model that changes its buffers after each update, by sums over the step and all processes: loads of experts,
    ranges, running statistics."""

    statistics: Sequence[str]
    """Names of buffers that are not saved, to which forward passes add in training mode; they are zero at the beginning
    of each step. Passes that do not count (recomputation, `infer`) leave no trace in them. In a pipeline they
    are in one of the parts that it is cut into."""

    def after_update(self, sums: dict[str, Tensor]) -> None:
        """Changes persistent buffers. `sums`: of those of `statistics` that this process has, fp64, over all processes
        with a replica. What it changes is undone where the step is refused."""
        ...


class Cuttable(Model, Protocol):
    """A model whose layers a pipeline can put on several processes: what it does, in three parts.

    `model(batch)` equals `project(run(blocks, embed(batch), batch), batch)`. Where a process has no part in one of the
    three, the modules for it are not there.
    """

    embedding_parts: Sequence[str]
    """Names of the modules that only `embed` uses, or `project` too; those that are not there do not matter."""
    head_parts: Sequence[str]
    """Names of the modules that `project` uses; one in both lists is tied: its gradients are added up."""

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """What goes into the first block, [B, ...]."""
        ...

    def run(self, blocks: Iterable[nn.Module], x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """`x` behind these of the blocks; of the same shape and type."""
        ...

    def project(self, x: Tensor, batch: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Outputs, a tensor or a dict of them, of what comes out of the last block."""
        ...


class TensorParallel(Model, Protocol):
    """A model that says how its matrices are split."""

    def tensor_parallel_plan(self, sequence_parallel: bool) -> dict[str, ParallelStyle]:
        """Module names (patterns) -> torch's styles. What it does not name is kept whole by every process."""
        ...


class Exportable(Model, Protocol):
    """A model that transformers knows, too: it can start with weights of Hugging Face's, and be exported to them."""

    @staticmethod
    def family(config: Config, tokenizer: Tokenizer) -> Family:
        """What it is there. Raises trainer.models.family.UnknownFamily."""
        ...


@torch.no_grad()
def initialise(
    model: nn.Module,
    seed: int,
    pretrained: Fill | None = None,
    holders: dist.ProcessGroup | None = None,
    first: Sequence[Initialise] = (),
    wanted: Callable[[str], bool] = lambda name: True,
) -> None:
    """Every parameter by (seed, its name): the same weights in any order, on any rank, under any sharding. Or by what
    is `pretrained`. The other arguments are those of `initial_values`."""
    for parameter, value in initial_values(model, seed, pretrained, holders, first=first, wanted=wanted):
        if isinstance(parameter, DTensor):  # every rank takes its shard of what it was sent
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
    first: Sequence[Initialise] = (),
    wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter with its whole initial value in fp32, on `device` or where the parameter is. Those of `first` are
    asked for a value before `pretrained`, or the model. A parameter that is not `wanted` is left out.

    `holders` are the processes that hold the parameters, or shards of them. The parameters are dealt out to them, so
    that each value is drawn or read by one process, which sends it to the others; as many as there are processes are
    drawn at the same time, and one is in memory besides. None: this process draws all.
    """
    rank, size = (dist.get_rank(holders), dist.get_world_size(holders)) if holders else (0, 1)
    named = (item for item in model.named_parameters() if wanted(item[0]))
    while dealt := list(islice(named, size)):
        drawn = _draw(model, *dealt[rank], seed, pretrained, first) if rank < len(dealt) else None
        for owner, (_, parameter) in enumerate(dealt):
            where = device or _broadcast_source(parameter)
            if owner == rank and drawn is not None:
                value, drawn = drawn.to(where), None
            else:
                value = torch.empty(parameter.shape, dtype=torch.float32, device=where)
            if holders:
                dist.broadcast(value, group=holders, group_src=owner)
            yield parameter, value


def _broadcast_source(parameter: Tensor) -> torch.device:
    """Where the processes of a mesh compute, also if they hold their shards elsewhere; else where the parameter is."""
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device


def _draw(
    model: nn.Module, name: str, parameter: Tensor, seed: int, pretrained: Fill | None, first: Sequence[Initialise]
) -> Tensor:
    value = torch.empty(parameter.shape, dtype=torch.float32)
    generator = torch.Generator().manual_seed(key(seed, "init", name))
    if any(fills(name, value, generator) for fills in first):
        pass
    elif pretrained is None:
        model.initialise(name, value, generator)  # type: ignore[operator]
    else:
        pretrained(name, value)
    return value


def is_saved(model: nn.Module) -> Callable[[str], bool]:
    """Whether checkpoints hold the parameter or buffer of a name. They leave out the parameters in `model.not_saved`:
    frozen ones, which always have the value of `model.weights`."""
    left_out: Any = getattr(model, "not_saved", frozenset())
    return lambda name: name not in left_out


def has_no_value(tensor: Tensor) -> Tensor:
    """Fills it with what shows at once where a checkpoint should have had a value."""
    return tensor.fill_(math.nan if tensor.is_floating_point() else 0)


@torch.no_grad()
def materialize(model: nn.Module, held_on: torch.device, computed_on: torch.device) -> None:
    """Memory for the parameters of a model that was made without values, or this rank's shards of them; tied ones stay
    tied. Buffers keep their values, and are where the model is computed."""
    buffers = [
        (module, name, buffer.to(computed_on))
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta and not isinstance(parameter, DTensor):  # of which `to_empty` unties what is tied
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty_like(parameter, device=held_on), parameter.requires_grad)
                setattr(module, name, made[parameter])
    model.to_empty(device=held_on)
    for module, name, buffer in buffers:
        setattr(module, name, buffer)


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
    Called, it does both: the whole model. `example`: a batch [1, ...] of the run, on the CPU, of which only shapes and
    types matter. `pretrained` takes the place of the model's own initial values, and those of `first` are asked before
    it. `loaded`: a checkpoint gives all values that it holds (`is_saved`), so only the others are drawn or read."""

    build: Callable[[], nn.Module]
    seed: int
    example: Callable[[], dict[str, Tensor]] | None = None
    pretrained: Fill | None = None
    loaded: bool = False
    first: Sequence[Initialise] = ()

    def fill(self, model: nn.Module, holders: dist.ProcessGroup | None = None) -> None:
        """`holders`: the processes that hold this model's parameters, and all fill it at the same time."""
        wanted = self._wanted(model)
        initialise(model, self.seed, self.pretrained, holders, self.first, wanted)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not wanted(name):
                    has_no_value(parameter.to_local() if isinstance(parameter, DTensor) else parameter)

    def values(
        self, model: nn.Module, holders: dist.ProcessGroup | None, device: torch.device
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What `fill` gives each parameter, whole, for who places it himself."""
        wanted = self._wanted(model)
        yield from initial_values(model, self.seed, self.pretrained, holders, device, self.first, wanted)
        for name, parameter in model.named_parameters():
            if not wanted(name):
                yield parameter, has_no_value(torch.empty(parameter.shape, dtype=torch.float32, device=device))

    def value(self, model: nn.Module, name: str) -> Tensor:
        """What `fill` gives the parameter of that name, or of another one that it is tied to, whole, on the CPU."""
        parameter = model.get_parameter(name)
        first = next(other for other, tied in model.named_parameters() if tied is parameter)  # which `fill` goes by
        return _draw(model, first, parameter, self.seed, self.pretrained, self.first).to(parameter.dtype)

    def _wanted(self, model: nn.Module) -> Callable[[str], bool]:
        saved = is_saved(model)
        return (lambda name: not saved(name)) if self.loaded else lambda name: True

    def __call__(self, device: torch.device = CPU, holders: dist.ProcessGroup | None = None) -> nn.Module:
        try:
            with without_values():
                model = self.build()
            materialize(model, device, device)
        except NotImplementedError:  # it computes with its parameters as it is made
            model = self.build().to(device)
        self.fill(model, holders)
        return model
