"""The user's own model, built without values: its parameters, its optimizer's state, and traces of its parts.

Traces run on torch's fake CPU tensors: a torch without CUDA cannot make fake CUDA tensors. They use the data type of
the target, with attention kernels that save O(sequence) as those of a GPU do; what autocast computes in fp32 differs
a little between CPU and CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from launch.planning.trace import OUTSIDE, REPRESENTATIVES, LiveBytes, Trace, repeat_trace, trace
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.facts import TOO_EARLY, Facts
from trainer.models import cast_parameters, is_saved
from trainer.models.factory import model_factory
from trainer.objectives import Batch, overrides, prepares
from trainer.optim.build import build_optimizer
from trainer.patches import release_saved_parameters, without_values
from trainer.precision import Precision
from trainer.registry import plugin
from trainer.run_data import tokenizer_of
from trainer.strategies.layers import wrap_layers
from trainer.strategies.stages import CUTTABLE, ModelCosts, measure_costs, modules_of, uncuttable_names
from trainer.strategies.tensor_parallel import split

EMBEDS, HEADS = "embeds", "heads"


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: tuple[int, ...]
    """Shape on a process that shares the layer's matrices with others, before any sharding."""
    itemsize: int
    state: int
    """Bytes of the optimizer's state of that shape."""
    is_trained: bool
    block: int
    local_name: str
    """Its name in the block, or in the model if it is outside of blocks."""
    ends: frozenset[str]
    """Which ends of the model use it: EMBEDS, HEADS, both or none."""

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


class PlannedModel:
    """Describes the model of a run on a target GPU, given its compute data type (`precision.compute`)."""

    def __init__(self, config: Config, precision: Precision):
        self.config, self.precision = config, precision
        self.tokenizer = tokenizer_of(config)
        self.factory = model_factory(config, self.tokenizer, lambda: self.example)
        facts = Facts.of(config, self.tokenizer, lambda: self.example)
        self.objective = plugin(config, "objective")(config.objective, facts)
        if overrides(self.objective, "updates"):
            raise ConfigError(
                f"objective.name={config.objective.name}: plan knows no step that computes something before its loss; "
                "nearest: plan the same model with objective=causal_lm"
            )
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.build_model = cache(self._build_model)
        self.whole = self.build_model(1, False, False, None)

    @cached_property
    def example(self) -> Batch:
        """Returns a batch [1, ...] of zeros as the objective makes it of a row of the data. Raises ConfigError."""
        if not hasattr(self, "objective"):
            raise ConfigError(TOO_EARLY)
        batch = example(self.config)
        if not prepares(self.objective):
            return batch
        draws = batch.pop("draws")
        row = self.objective.example({name: value[0] for name, value in batch.items()}, 0)
        return {name: value[None] for name, value in row.items()} | {"draws": draws}

    def splits(self, limit: int) -> list[tuple[str, str]]:
        """Returns overrides that share the matrices of the model's layers among up to `limit` processes, the largest
        number first; none if the model has no plan for that."""
        if not hasattr(self.whole.model, "tensor_parallel_plan"):
            return []
        counts = [n for n in (8, 2) if n <= limit]
        return [(f"strategy.tensor_parallel={n}", "strategy.sequence_parallel=true") for n in counts]

    def split(self, strategy: Any, tensor: int, dtype: torch.dtype | None = None) -> BuiltModel:
        """Returns the model as one of `tensor` processes that share its layers has it, with weights of that type."""
        flags = (strategy.sequence_parallel, strategy.loss_parallel) if tensor > 1 else (False, False)
        return self.build_model(tensor, *flags, dtype)

    def _build_model(
        self, tensor: int, shares_sequences: bool, shares_loss: bool, dtype: torch.dtype | None
    ) -> BuiltModel:
        with self.fake:
            model = self.factory.build()
            model = model if dtype is None else cast_parameters(model, dtype)
        return BuiltModel(self, model, tensor, shares_sequences, shares_loss)

    @cached_property
    def costs(self) -> ModelCosts:
        """Returns the costs by which a pipeline is cut. Of equal blocks only a few are measured."""
        count = len(self.whole.blocks)
        shortened = self.whole.uniform and count > REPRESENTATIVES

        def build() -> nn.Module:
            model = self.factory.build()
            if shortened:
                del cast(Any, model).blocks[REPRESENTATIVES:]
            return model

        autocast, factory = self.precision.autocast(), replace(self.factory, build=build)
        costs = measure_costs(factory, autocast, self.precision.device)
        first, *others = costs.blocks
        return replace(costs, blocks=[first, *others[:1] * (count - 2), others[-1]]) if shortened else costs

    @cached_property
    def state(self) -> tuple[dict[str, int], int]:
        """Returns the bytes of the optimizer's state by parameter, and the peak of temporary bytes of its step."""
        with self.fake:
            model = self.factory.build()
            optimizer = build_optimizer(self.config, model)
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            uncounted = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
            try:
                with LiveBytes(uncounted) as live:
                    optimizer.step()
            except Exception:  # the step looks at values
                return self._state_on_meta(), 0
            nbytes = {name: _state_bytes(optimizer, parameter) for name, parameter in model.named_parameters()}
        return nbytes, max(0, live.peak - sum(nbytes.values()))

    def _state_on_meta(self) -> dict[str, int]:
        from trainer.optim.state_size import optimizer_state_bytes

        with without_values():
            model = self.factory.build()
        optimizer = build_optimizer(self.config, model)
        optimizer_state_bytes(model, optimizer)
        return {name: _state_bytes(optimizer, parameter) for name, parameter in model.named_parameters()}

    @property
    def checkpoint(self) -> int:
        """Returns the bytes of a checkpoint: saved weights and buffers, optimizer state."""
        model, tensors = self.whole.model, self.whole.model.state_dict()
        saved = sum(tensor.nbytes for name, tensor in tensors.items() if is_saved(model)(name))
        return saved + sum(self.state[0].values())


class BuiltModel:
    """A model whose layers are shared by `tensor` processes, as one of them has it."""

    def __init__(self, subject: PlannedModel, model: nn.Module, tensor: int, shares_sequences: bool, shares_loss: bool):
        self.subject, self.model, self.tensor = subject, model, tensor
        self.shares_sequences, self.shares_loss = shares_sequences, shares_loss
        self.blocks: Sequence[nn.Module] = list(getattr(model, "blocks", []))
        self.cuttable = not [name for name in CUTTABLE if not hasattr(model, name)] and not uncuttable_names(
            cast(Any, model)
        )
        self.uniform = self.cuttable and len({_signature(block) for block in self.blocks}) == 1
        if tensor > 1:
            if self.uniform:
                del cast(Any, model).blocks[REPRESENTATIVES:]  # the others would be divided the same way
            with self._mesh() as mesh, subject.fake:
                split(self.model, mesh, self.shares_sequences)
        self.trace_blocks = cache(self._trace_blocks)

    @cached_property
    def parameters(self) -> list[Parameter]:
        if self.tensor > 1:
            return self._divided_parameters()
        state = self.subject.state[0]
        numbers = {id(p): (number, name) for number, b in enumerate(self.blocks) for name, p in b.named_parameters()}
        ends = {
            kind: {
                id(p) for module in modules_of(self.model, getattr(self.model, names, ())) for p in module.parameters()
            }
            for kind, names in ((EMBEDS, "embedding_parts"), (HEADS, "head_parts"))
        }
        return [
            Parameter(
                name,
                tuple(parameter.shape),
                parameter.element_size(),
                state[name],
                parameter.requires_grad,
                *numbers.get(id(parameter), (OUTSIDE, name)),
                frozenset(kind for kind, ids in ends.items() if id(parameter) in ids),
            )
            for name, parameter in self.model.named_parameters()
        ]

    def _divided_parameters(self) -> list[Parameter]:
        """Returns the model's parameters in the shapes that one of the processes has. Of equal blocks one is divided
        for all."""
        parameters = [(OUTSIDE, name, p) for name, p in self.model.named_parameters()]
        parameters += [
            (number, name, p) for number, block in enumerate(self.blocks) for name, p in block.named_parameters()
        ]
        local = {(n, name): (p.to_local() if isinstance(p, DTensor) else p).shape for n, name, p in parameters}
        divided = []
        for parameter in self.subject.whole.parameters:
            block = min(parameter.block, REPRESENTATIVES - 1) if self.uniform else parameter.block
            shape = local[block, parameter.local_name]
            state = parameter.state * shape.numel() // max(1, parameter.numel)
            divided.append(replace(parameter, shape=tuple(shape), state=state))
        return divided

    def trace_model(self, rows: int, checkpointing: str, released: bool = False, casts_kept: bool = True) -> Trace:
        """Traces the whole model and the objective on `rows` sequences."""
        return self.trace_blocks(rows, checkpointing, len(self.blocks), True, True, released, casts_kept)

    def _trace_blocks(
        self,
        rows: int,
        checkpointing: str,
        count: int,
        embeds: bool,
        heads: bool,
        released: bool = False,
        casts_kept: bool = True,
    ) -> Trace:
        """Traces `count` blocks, with the ends of the model if it has them. `released`: saved tensors keep no weight or
        copy of one alive. `casts_kept`: autocast keeps its copies of weights until it is left."""
        num_traced = min(count, REPRESENTATIVES) if self.uniform else count
        blocks = self.blocks[:num_traced]
        precision, objective = self.subject.precision, self.subject.objective
        autocast = precision.autocast(cache=casts_kept)
        release = release_saved_parameters() if released else nullcontext()
        counts = objective.counts(self.subject.example)
        with self._mesh(), self.subject.fake, recomputing(self.model, blocks, checkpointing), release:
            batch = {
                name: torch.zeros((rows, *value.shape[1:]), dtype=value.dtype)
                for name, value in self.subject.example.items()
            }
            totals = dict.fromkeys(counts, torch.ones((), dtype=torch.float64))
            model = cast(Any, self.model)
            x = None if embeds else self._hidden(rows).requires_grad_()
            gradient = None if heads else self._hidden(rows)

            def forward() -> Tensor:
                if not self.uniform and embeds and heads:
                    return model(batch)
                hidden = model.run(blocks, model.embed(batch) if embeds else x, batch)
                return model.project(hidden, batch) if heads else hidden

            def finish(outputs: Tensor) -> Tensor:
                if not heads:
                    return outputs
                if isinstance(outputs, DTensor) and not self.shares_loss:
                    outputs = outputs.full_tensor()
                return objective.loss(outputs, batch, totals)[0]

            inputs = [tensor for tensor in (*batch.values(), x) if tensor is not None]
            with self._loss_parallel(), _marked_for_deepspeed(self.model, released):
                result = trace(self.model, blocks, forward, finish, autocast, inputs, gradient)
        return repeat_trace(result, count) if num_traced < count else result

    def _hidden(self, rows: int) -> Tensor:
        hidden = cast(Tensor, self._example_hidden)
        return torch.empty((rows, *hidden.shape[1:]), dtype=hidden.dtype)

    @cached_property
    def _example_hidden(self) -> Tensor:
        batch = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in self.subject.example.items()}
        with torch.no_grad(), self.subject.precision.autocast():
            return cast(Any, self.model).embed(batch)

    @property
    def hidden_bytes(self) -> int:
        """Returns the bytes that pass between two blocks for one sequence."""
        with self._mesh(), self.subject.fake:
            return self._example_hidden.nbytes

    @contextmanager
    def _mesh(self) -> Iterator[Any]:
        """Yields a mesh of a fake process group of `tensor` processes."""
        if self.tensor == 1 or dist.is_initialized():
            yield getattr(self, "mesh", None)
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=self.tensor, store=FakeStore())
        try:
            self.mesh = init_device_mesh("cpu", (self.tensor,), mesh_dim_names=("tp",))
            yield self.mesh
        finally:
            dist.destroy_process_group()

    def _loss_parallel(self) -> Any:
        from torch.distributed.tensor.parallel import loss_parallel

        return loss_parallel() if self.shares_loss else nullcontext()


@contextmanager
def recomputing(model: nn.Module, blocks: Sequence[nn.Module], kind: str) -> Iterator[None]:
    """Applies `trainer.strategies.layers.wrap_layers` to the model, and undoes it at the end."""
    layers = blocks if hasattr(model, "blocks") else [model]
    wrap_layers(cast(Any, SimpleNamespace(blocks=layers)), kind, compile=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


@contextmanager
def _marked_for_deepspeed(model: nn.Module, released: bool) -> Iterator[None]:
    """Makes parameters look like DeepSpeed's, which `release_saved_parameters` recognizes by their `ds_tensor`."""
    for parameter in model.parameters() if released else ():
        parameter.ds_tensor = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in model.parameters() if released else ():
            del parameter.ds_tensor  # type: ignore[attr-defined]


def _signature(block: nn.Module) -> tuple[Any, ...]:
    """Returns a signature that is the same for equal blocks."""
    parameters = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters()]
    return type(block), tuple(parameters)


def _state_bytes(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    return sum(value.nbytes for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor))


def example(config: Config) -> Batch:
    """Returns a batch [1, ...] of zeros in the shapes of the run's data, without any data."""
    row = config.data.row() | {"draws": ("int64", ())}
    return {name: torch.zeros(1, *shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in row.items()}


def planned_model(config: Config, bf16: bool) -> PlannedModel:
    """Returns the run's model on a GPU. `bf16`: whether it is fast at bf16."""
    compute = config.precision.compute
    if compute == "auto":
        compute = "bf16" if bf16 or config.precision.param == "bf16" else "fp32"
    precision = Precision(torch.device("cpu"), compute, config.precision.param, config.precision.reduce)
    return PlannedModel(config, precision)
