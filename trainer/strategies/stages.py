"""How a model is cut into the stages of a pipeline: what its parts cost, who gets which, what a stage computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from trainer.config.pipeline_schedules import SCHEDULES
from trainer.config.strategy import Pipeline
from trainer.errors import ConfigError
from trainer.models import Cuttable, ModelFactory
from trainer.objectives import Batch, Outputs
from trainer.strategies.buffers import preserve_buffers
from trainer.utilization import flop_counter

T = TypeVar("T")
CUTTABLE = ("blocks", "embed", "run", "project", "embedding_parts", "head_parts")


@dataclass(frozen=True)
class Cost:
    """What a part of the model costs for one sequence."""

    parameters: int
    flops: int
    """FLOPs of the forward pass: matrix products, which grow with the parameters, and attention, with the
    activations."""
    activations: int
    """Bytes that are kept for the backward pass."""


@dataclass(frozen=True)
class ModelCosts:
    """What is known of a model before it is made."""

    embedding: Cost
    blocks: list[Cost]
    head: Cost
    hidden: Tensor
    """What passes between the blocks for one sequence, on the meta device."""
    outputs: Outputs
    """What the model returns for one sequence, on the meta device."""


def measure_costs(factory: ModelFactory, autocast: AbstractContextManager[object], device: torch.device) -> ModelCosts:
    """Runs one sequence through tensors without values: no memory, no time. Raises ConfigError if it cannot be cut."""
    if factory.example is None:
        raise ValueError("a pipeline needs the factory's example of a batch")
    example = factory.example()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.device(device), autocast:
        model = cast(Cuttable, factory.build())
        if missing := [name for name in CUTTABLE if not hasattr(model, name)]:
            raise ConfigError(
                f"strategy=pipeline: the model {type(model).__name__} cannot be cut, it has no "
                f"{', '.join(missing)} (see trainer.models.Cuttable); nearest: strategy=fsdp"
            )
        if lost := uncuttable_names(model):
            raise ConfigError(
                f"strategy=pipeline: the model {type(model).__name__} cannot be cut: {', '.join(lost)} should be "
                "in one of its blocks, or in its embedding_parts or head_parts (see trainer.models.Cuttable); nearest: "
                "strategy=fsdp"
            )
        batch = {name: fake.from_tensor(tensor).to(device) for name, tensor in example.items()}
        x, embedding = _costed(lambda: model.embed(batch), modules_of(model, model.embedding_parts))
        hidden = _empty(x)
        blocks = []
        for block in model.blocks:
            x, cost = _costed(lambda x=x, block=block: model.run([block], x, batch), [block])  # type: ignore[misc]
            blocks.append(cost)
        outputs, head = _costed(lambda: model.project(x, batch), modules_of(model, model.head_parts))
        return ModelCosts(embedding, blocks, head, hidden, tree_map(_empty, outputs))


def uncuttable_names(model: Cuttable) -> list[str]:
    """Parameters and statistics that a cut would leave on processes that do not know of each other: of no part, or
    parameters of several that are not the two ends."""
    ends = modules_of(model, [*model.embedding_parts, *model.head_parts])
    uses = Counter({id(parameter) for module in ends for parameter in module.parameters()})
    for block in model.blocks:
        uses.update({id(parameter) for parameter in block.parameters()})
    parted = {id(inner) for module in [*ends, *model.blocks] for inner in module.modules()}
    whole = cast(nn.Module, model)
    counted = [
        name
        for name in getattr(model, "statistics", ())
        if id(whole.get_submodule(name.rpartition(".")[0])) not in parted
    ]
    return [name for name, parameter in whole.named_parameters() if uses[id(parameter)] != 1] + counted


def _costed(compute: Callable[[], T], modules: Iterable[nn.Module]) -> tuple[T, Cost]:
    kept: dict[int, int] = {}
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in parameters:
            kept[id(tensor)] = tensor.numel() * tensor.element_size()
        return tensor

    counter = flop_counter()
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = compute()
    size = sum(parameter.numel() for parameter in parameters.values())
    return result, Cost(size, counter.get_total_flops(), sum(kept.values()))


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def balance(measured: ModelCosts, parts: int) -> list[range]:
    """The blocks of each part, in a row, none without: the slowest part, by its arithmetic, is as fast as it can be."""
    count = len(measured.blocks)
    if count < parts:
        raise ConfigError(
            f"strategy=pipeline: {count} layers cannot be cut into {parts} parts (processes x parts on each); fewer "
            "strategy.stages or strategy.virtual_stages, or more layers"
        )
    costs = [float(block.flops) for block in measured.blocks]
    costs[0] += measured.embedding.flops
    costs[-1] += measured.head.flops
    upto = [0.0]
    for cost in costs:
        upto.append(upto[-1] + cost)
    # best[j]: the least cost of the slowest part if the first j blocks make k parts, and where the last of them begins.
    best = [(upto[j], 0) for j in range(count + 1)]
    begins = []
    for k in range(1, parts):
        row = [(float("inf"), 0)] * (count + 1)
        for j in range(k + 1, count + 1):
            row[j] = min((max(best[i][0], upto[j] - upto[i]), i) for i in range(k, j))
        best = row
        begins.append([begin for _, begin in row])
    ends = [count]
    for row_of_begins in reversed(begins):
        ends.append(row_of_begins[ends[-1]])
    edges = [0, *reversed(ends)]
    return [range(first, last) for first, last in pairwise(edges)]


def stage_of(config: Pipeline, processes: int, part: int) -> int:
    """The place in the pipeline of the process that has this part."""
    return min(part, 2 * processes - 1 - part) if SCHEDULES[config.schedule].v_shaped else part % processes


class OnOtherRank(nn.Module):
    """In the place of a module that another process has."""


def cut_model(model: nn.Module, blocks: Iterable[int], embeds: bool, heads: bool) -> list[str]:
    """Leaves only these blocks in the model, and of its two ends what is asked for. Names stay as they are.

    Gives the names of the parameters that both ends use.
    """
    whole = cast(Cuttable, model)
    first, last = modules_of(model, whole.embedding_parts), modules_of(model, whole.head_parts)
    ends = {id(parameter) for module in first for parameter in module.parameters()}
    ends &= {id(parameter) for module in last for parameter in module.parameters()}
    tied = [name for name, parameter in model.named_parameters() if id(parameter) in ends]
    needed = (first if embeds else []) + (last if heads else [])
    # A module of the other end is kept, too, where it has a parameter of a needed one: under its own name.
    shared = {id(parameter) for module in needed for parameter in module.parameters()}
    for name in dict.fromkeys([*whole.embedding_parts, *whole.head_parts]):
        for module in modules_of(model, [name]):
            if module not in needed and not any(id(parameter) in shared for parameter in module.parameters()):
                path, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(path), leaf, OnOtherRank())
    mine = set(blocks)
    for index in range(len(whole.blocks)):
        if index not in mine:
            whole.blocks[index] = OnOtherRank()
    return tied


def modules_of(model: object, names: Sequence[str]) -> list[nn.Module]:
    """Returns those of the named modules that exist here."""
    known = dict(cast(nn.Module, model).named_modules(remove_duplicate=False))
    return [known[name] for name in names if name in known]


class Stage(nn.Module):
    """A part of a model: its blocks of that range, and the ends if it has them.

    Called with what the part before it gave, it computes micro-batch `number` of `batches`, which every process of the
    pipeline has. `present`: how many rows of each are not only there to fill it up. Its modules are those of the model,
    whose names are the ones that count.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: range,
        embeds: bool,
        heads: bool,
        autocast: Callable[[], AbstractContextManager[object]],
    ):
        super().__init__()
        self.model = [model]  # in a list: it is not a module of this one
        self.embeds, self.heads, self.autocast = embeds, heads, autocast
        whole = cast(Cuttable, model)
        self.blocks = nn.ModuleList(whole.blocks[index] for index in blocks)
        ends = modules_of(model, whole.embedding_parts) if embeds else []
        ends += modules_of(model, whole.head_parts) if heads else []
        self.ends = nn.ModuleList(dict.fromkeys(ends))
        self.batches: Sequence[Batch] = []
        self.present: Sequence[int] = []
        self.number = 0

    def forward(self, x: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """The first part is given no `x`; a tree of outputs is returned as its leaves."""
        model, batch = cast(Cuttable, self.model[0]), self.batches[self.number]
        with self.autocast(), nullcontext() if self.present[self.number] else preserve_buffers(self.model[0]):
            if self.embeds:
                x = model.embed(batch)
            assert x is not None
            x = model.run(self.blocks, x, batch)
            leaves = tree_leaves(model.project(x, batch) if self.heads else x)
            return tuple(leaves) if len(leaves) > 1 else leaves[0]
