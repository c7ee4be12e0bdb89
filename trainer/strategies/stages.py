"""Cuts a model into the stages of a pipeline: measures the cost of layers, balances stages, computes a stage."""

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
    """The cost of a part of the model for one sequence."""

    parameters: int
    flops: int
    """FLOPs of the forward pass: matrix products, which grow with the parameters, and attention, with the
    activations."""
    activations: int
    """Bytes that are kept for the backward pass."""


@dataclass(frozen=True)
class ModelCosts:
    """The costs of a model's parts and the shapes of its outputs, measured before it is built."""

    embedding: Cost
    blocks: list[Cost]
    head: Cost
    hidden: Tensor
    """The activations between two blocks for one sequence, on the meta device."""
    outputs: Outputs
    """The outputs of the model for one sequence, on the meta device."""


def measure_costs(factory: ModelFactory, autocast: AbstractContextManager[object], device: torch.device) -> ModelCosts:
    """Runs one sequence through a model without values, which needs no memory. Raises ConfigError if uncuttable."""
    if factory.example is None:
        raise ValueError("a pipeline needs the factory's example of a batch")
    example = factory.example()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.device(device), autocast:
        model = cast(Cuttable, factory.build())
        if missing_names := [name for name in CUTTABLE if not hasattr(model, name)]:
            raise ConfigError(
                f"strategy=pipeline: the model {type(model).__name__} cannot be cut, it has no "
                f"{', '.join(missing_names)} (see trainer.models.Cuttable); nearest: strategy=fsdp"
            )
        if uncuttable := uncuttable_names(model):
            raise ConfigError(
                f"strategy=pipeline: the model {type(model).__name__} cannot be cut: {', '.join(uncuttable)} should be "
                "in one of its blocks, or in its embedding_parts or head_parts (see trainer.models.Cuttable); nearest: "
                "strategy=fsdp"
            )
        batch = {name: fake.from_tensor(tensor).to(device) for name, tensor in example.items()}
        x, embedding = _measure_part(lambda: model.embed(batch), modules_of(model, model.embedding_parts))
        hidden = _empty(x)
        blocks = []
        for block in model.blocks:
            x, cost = _measure_part(lambda x=x, block=block: model.run([block], x, batch), [block])  # type: ignore[misc]
            blocks.append(cost)
        outputs, head = _measure_part(lambda: model.project(x, batch), modules_of(model, model.head_parts))
        return ModelCosts(embedding, blocks, head, hidden, tree_map(_empty, outputs))


def uncuttable_names(model: Cuttable) -> list[str]:
    """Returns the names of parameters and statistics that a cut would leave on ranks that do not know of each other:
    those in no block or end, and parameters shared by several parts other than the two ends."""
    ends = modules_of(model, [*model.embedding_parts, *model.head_parts])
    uses = Counter({id(parameter) for module in ends for parameter in module.parameters()})
    for block in model.blocks:
        uses.update({id(parameter) for parameter in block.parameters()})
    module_ids = {id(inner) for module in [*ends, *model.blocks] for inner in module.modules()}
    whole = cast(nn.Module, model)
    statistics = [
        name
        for name in getattr(model, "statistics", ())
        if id(whole.get_submodule(name.rpartition(".")[0])) not in module_ids
    ]
    return [name for name, parameter in whole.named_parameters() if uses[id(parameter)] != 1] + statistics


def _measure_part(compute: Callable[[], T], modules: Iterable[nn.Module]) -> tuple[T, Cost]:
    activation_bytes: dict[int, int] = {}
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}

    def record_size(tensor: Tensor) -> Tensor:
        if id(tensor) not in parameters:
            activation_bytes[id(tensor)] = tensor.numel() * tensor.element_size()
        return tensor

    counter = flop_counter()
    with counter, torch.autograd.graph.saved_tensors_hooks(record_size, lambda tensor: tensor):
        result = compute()
    size = sum(parameter.numel() for parameter in parameters.values())
    return result, Cost(size, counter.get_total_flops(), sum(activation_bytes.values()))


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def balance(model_costs: ModelCosts, stages: int) -> list[range]:
    """Returns each stage's blocks, in a row and at least one: the slowest stage has as few FLOPs as possible."""
    count = len(model_costs.blocks)
    if count < stages:
        raise ConfigError(
            f"strategy=pipeline: {count} layers cannot be cut into {stages} parts (processes x parts on each); fewer "
            "strategy.stages or strategy.virtual_stages, or more layers"
        )
    costs = [float(block.flops) for block in model_costs.blocks]
    costs[0] += model_costs.embedding.flops
    costs[-1] += model_costs.head.flops
    cumulative = [0.0]
    for cost in costs:
        cumulative.append(cumulative[-1] + cost)
    # best[j]: the least cost of the slowest stage if the first j blocks make k stages, and where the last one begins.
    best = [(cumulative[j], 0) for j in range(count + 1)]
    begins = []
    for k in range(1, stages):
        row = [(float("inf"), 0)] * (count + 1)
        for j in range(k + 1, count + 1):
            row[j] = min((max(best[i][0], cumulative[j] - cumulative[i]), i) for i in range(k, j))
        best = row
        begins.append([begin for _, begin in row])
    ends = [count]
    for row_of_begins in reversed(begins):
        ends.append(row_of_begins[ends[-1]])
    edges = [0, *reversed(ends)]
    return [range(first, last) for first, last in pairwise(edges)]


def pp_rank_of_stage(config: Pipeline, pp_size: int, stage: int) -> int:
    """Returns the rank in the mesh dimension `pp` that has this stage."""
    return min(stage, 2 * pp_size - 1 - stage) if SCHEDULES[config.schedule].v_shaped else stage % pp_size


class OnOtherRank(nn.Module):
    """Replaces a module that another rank has."""


def cut_model(model: nn.Module, blocks: Iterable[int], embeds: bool, heads: bool) -> list[str]:
    """Leaves only these blocks in the model, the embedding if it `embeds` and the head if it `heads`. No name changes.

    Returns the names of the parameters that both ends use.
    """
    whole = cast(Cuttable, model)
    first, last = modules_of(model, whole.embedding_parts), modules_of(model, whole.head_parts)
    ends = {id(parameter) for module in first for parameter in module.parameters()}
    ends &= {id(parameter) for module in last for parameter in module.parameters()}
    tied = [name for name, parameter in model.named_parameters() if id(parameter) in ends]
    needed = (first if embeds else []) + (last if heads else [])
    # A module of the other end stays, too, if it has a parameter of a needed one, so that both names exist.
    shared = {id(parameter) for module in needed for parameter in module.parameters()}
    for name in dict.fromkeys([*whole.embedding_parts, *whole.head_parts]):
        for module in modules_of(model, [name]):
            if module not in needed and not any(id(parameter) in shared for parameter in module.parameters()):
                path, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(path), leaf, OnOtherRank())
    local_blocks = set(blocks)
    for index in range(len(whole.blocks)):
        if index not in local_blocks:
            whole.blocks[index] = OnOtherRank()
    return tied


def modules_of(model: object, names: Sequence[str]) -> list[nn.Module]:
    """Returns the named modules that the model has."""
    modules = dict(cast(nn.Module, model).named_modules(remove_duplicate=False))
    return [modules[name] for name in names if name in modules]


class Stage(nn.Module):
    """A stage of a model: a range of its blocks, and the embedding or the head if it has them.

    Called with the activations of the stage before it, it computes micro-batch `number` of `batches`, which every rank
    of the pipeline has. `row_counts` are the rows of each batch without padding. Its modules are the model's own, whose
    names count in checkpoints.
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
        self.model = [model]  # in a list, so that it is not a submodule of this one
        self.embeds, self.heads, self.autocast = embeds, heads, autocast
        whole = cast(Cuttable, model)
        self.blocks = nn.ModuleList(whole.blocks[index] for index in blocks)
        ends = modules_of(model, whole.embedding_parts) if embeds else []
        ends += modules_of(model, whole.head_parts) if heads else []
        self.ends = nn.ModuleList(dict.fromkeys(ends))
        self.batches: Sequence[Batch] = []
        self.row_counts: Sequence[int] = []
        self.number = 0

    def forward(self, x: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Computes the stage; the first one gets no `x`. Returns a tree of outputs as its leaves."""
        model, batch = cast(Cuttable, self.model[0]), self.batches[self.number]
        with self.autocast(), nullcontext() if self.row_counts[self.number] else preserve_buffers(self.model[0]):
            if self.embeds:
                x = model.embed(batch)
            assert x is not None
            x = model.run(self.blocks, x, batch)
            leaves = tree_leaves(model.project(x, batch) if self.heads else x)
            return tuple(leaves) if len(leaves) > 1 else leaves[0]
