"""The arithmetic of a step: what all strategies have in common, around the few methods in which they differ.

Losses are divided by totals of the whole step, sums are added up over all ranks, gradients are unscaled, measured,
clipped and applied. The methods here are right for ranks that each have the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from trainer import fault_points
from trainer.checkpoint.state import FlatShard
from trainer.config import strategy as schema
from trainer.data.deal import ROW_BY_ROW, Deal
from trainer.models import ModelFactory, is_saved
from trainer.objectives import NUM_TARGETS, Batch, Normalizers, Objective, Outputs, Rows, Sums
from trainer.optim.conditional import step_unless
from trainer.precision import Precision
from trainer.randomness import seed_torch
from trainer.strategies.base import OptimizerFactory, UpdateResult
from trainer.strategies.buffers import Buffers, preserve_buffers
from trainer.strategies.forward_timer import ForwardTimer
from trainer.strategies.layers import wrap_layers
from trainer.strategies.padding import num_rows, take_rows, trim_rows
from trainer.topology import Topology


@dataclass
class StepOptions:
    """The options of a step that every strategy gets, besides its own keys."""

    clip_norm: float
    activation_checkpointing: str
    compile: bool
    micro_batch: int = 1  # sequences of a forward pass, if none are missing
    deal: Deal = ROW_BY_ROW
    """Which rows of a step each replica computes."""
    batch_sizes: frozenset[int] = frozenset()
    """Of the run's steps, where an update with a part of one is refused."""
    unequal_micro_batches: bool = False
    """Whether ranks may have micro-batches of different sizes: examples that cannot be read are left out of them."""


class StepArithmetic:
    """The base class of all strategies. It communicates with other ranks in `all_reduce`, `norm`, `gather_rows` and
    `local_rows`."""

    runs_alone = False  # on one process, too; otherwise `Single` replaces it there
    config: schema.Plugin
    num_targets: Tensor  # of the step, over all ranks
    is_materialized = False  # whether every trained parameter has its optimizer state
    keeps_casts = True  # whether autocast keeps its copies of weights until the forward pass is over

    def __init__(
        self,
        config: schema.Plugin,
        topology: Topology,
        precision: Precision,
        objective: Objective,
        options: StepOptions,
    ):
        self.topology, self.precision, self.objective, self.options = topology, precision, objective, options
        self.config = config
        self.scaler = precision.scaler()
        self.num_averaged_ranks = topology.dp_size  # how many ranks' gradients are averaged; 1 if they are summed
        self.timer = ForwardTimer(topology.device)
        self.reports_data = topology.is_data_rank  # true on one of those that train on the same sequences

    def setup(self, model_factory: ModelFactory, optimizer_factory: OptimizerFactory | None) -> None:
        self.example = cache(model_factory.example) if model_factory.example else None  # it is read from the data
        self.model = self.build(model_factory)
        layout = self.topology.layout
        self.replicas = self.topology.mesh()["dp"].get_group() if layout.processes > 1 else None
        if optimizer_factory is None:
            self.wrapped = self.model.eval()
            return
        self.optimizer = optimizer_factory(self.model)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.buffers = Buffers(self.model, self.topology.dp_size, self.replicas)
        self.wrapped = self.wrap(self.model)

    def build(self, model_factory: ModelFactory) -> nn.Module:
        """Returns the model with its initial weights, on the device, its layers wrapped."""
        model = model_factory(self.topology.device, self.topology.control)
        wrap_layers(model, self.options.activation_checkpointing, self.options.compile)
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the module that training calls."""
        return model

    def sync(self, last: bool) -> AbstractContextManager[object]:
        """Returns the context of a micro-batch: only the last one's backward pass has to exchange gradients."""
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Runs the backward pass of one micro-batch; `last` says whether it is the step's last."""
        loss.backward()

    def all_reduce(self, sums: Tensor) -> Tensor:
        """Adds up `sums` over all ranks, in place."""
        dist.all_reduce(sums)
        return sums

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Returns the whole of a tensor that may be sharded."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Returns the global norm of the whole model's gradients; this rank has these. For bf16 it is in fp32."""
        if not gradients:
            return torch.zeros((), device=self.topology.device)
        dtype = torch.promote_types(gradients[0].dtype, torch.float32)
        norms = torch._foreach_norm(list(gradients), 2, dtype)
        return self.full_tensor(torch.linalg.vector_norm(torch.stack(norms)))

    def train_step(
        self, micro_batches: Sequence[Batch], objective: Objective | None = None, abandoned: bool = False
    ) -> Sums:
        objective = objective or self.objective
        normalizers, sums = self.reduce_counts(micro_batches, objective, abandoned)
        self.buffers.snapshot()
        for number, batch in enumerate(micro_batches, 1):
            with self.sync(last=number == len(micro_batches)):
                loss, micro_sums = self.forward(batch, objective, normalizers)
                fault_points.point("step.loss", [loss])
                self.backward(loss * self.loss_scale, number == len(micro_batches))
            self.add(sums, micro_sums)
        return sums

    def forward(self, batch: Batch, objective: Objective, normalizers: Normalizers) -> tuple[Tensor, Sums]:
        """Returns a micro-batch's share of the step's loss, with its graph, and what it adds to the sums."""
        self._seed(batch)
        with self.timer.running():
            return objective.loss(*self.run_forward(self.wrapped, batch), normalizers)

    def reduce_counts(
        self, micro_batches: Sequence[Batch], objective: Objective, abandoned: bool = False
    ) -> tuple[Normalizers, Sums]:
        """Returns the counts of the whole step, by which losses are divided, and this rank's part of them. This rule
        gives all strategies one curve: a mean of means would weigh a target by the micro-batch that it is in.

        A rank that abandons the step sends counts that are not numbers: every rank waits for this message anyway, and
        then refuses the update.
        """
        counts = [objective.counts(batch) for batch in micro_batches]
        local_counts = {name: sum(float(batch_counts[name]) for batch_counts in counts) for name in counts[0]}
        local = torch.tensor(list(local_counts.values()), dtype=torch.float64, device=self.topology.device)
        summed = self.all_reduce(local * math.nan if abandoned else local.clone()) / self.topology.layout.processes
        normalizers = dict(zip(local_counts, torch.where(summed == 0, 1.0, summed).unbind(), strict=True))
        self.num_targets = summed[list(local_counts).index(NUM_TARGETS)]
        sums = Sums()
        self.add(sums, dict(zip(local_counts, local.unbind(), strict=True)))
        return normalizers, sums

    @property
    def loss_scale(self) -> float:
        """Returns the factor of a loss in its backward pass: the number of ranks whose gradients are averaged, times
        the scale of fp16."""
        return self.scaler.scale * self.num_averaged_ranks

    def add(self, sums: Sums, addends: Sums) -> None:
        """Adds the sums of a micro-batch; ranks that do not report data add zeros under the same names."""
        for name, value in addends.items():
            value = self.full_tensor(value.detach()).double()
            value = value if self.reports_data else torch.zeros_like(value)
            sums[name] = sums[name] + value if name in sums else value

    def run_forward(self, model: nn.Module, batch: Batch) -> tuple[Outputs, Batch]:
        """Returns the arguments of the objective: the model's outputs and the batch, both on the device.

        A batch without rows is padded to a whole micro-batch (batch norm refuses a single row), and its outputs are
        trimmed to no rows; the model's buffers do not change.
        """
        device, rows = self.topology.device, num_rows(batch)
        if rows == (size := self.num_padded(rows)):
            batch = to_device(batch, device)
            with self.autocast_forward():
                return self.outputs(model(batch)), batch
        padded = to_device(take_rows(batch, 0, size, self.padding_row()), device)
        with self.autocast_forward(), nullcontext() if rows else preserve_buffers(self.model):
            return trim_rows(self.outputs(model(padded)), rows), trim_rows(padded, rows)

    def num_padded(self, rows: int) -> int:
        """Returns the number of rows that a batch of `rows` is padded to."""
        return rows or self.options.micro_batch

    def padding_row(self) -> Batch | None:
        """Returns a row that a batch can be padded with."""
        return self.example() if self.example else None

    def autocast_forward(self) -> AbstractContextManager[object]:
        """Returns the context of a forward pass, which computes matrix products in the data type of `precision`."""
        return self.precision.autocast(cache=self.keeps_casts)

    def outputs(self, outputs: Outputs) -> Outputs:
        """Returns the outputs that the objective gets for the outputs of the model."""
        return tree_map(self.full_tensor, outputs)

    def update(self, lr: float, limit: Tensor | float = math.inf) -> UpdateResult:
        norm = self._unscaled_norm()
        if self.options.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.options.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        overflow = not self.scaler.accepts(norm, self.num_targets)
        bad, empty = self.check_norm(norm, limit)
        skipped = bad | empty | overflow
        step_unless(self.optimizer, skipped)
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers.end_update(skipped)
        return UpdateResult(norm, skipped, bad & (not overflow))

    def discard(self) -> Tensor:
        """Ends a step without its update: drops the gradients and returns their norm."""
        norm = self._unscaled_norm()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _unscaled_norm(self) -> Tensor:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.scaler.unscale(gradients)
        return self.norm(gradients)

    def check_norm(self, norm: Tensor, limit: Tensor | float) -> tuple[Tensor, Tensor]:
        """Returns whether the norm is too large or not a number, and whether the step had no target at all or was
        abandoned (if all ranks abandon it, no gradient shows it)."""
        return (norm < limit).logical_not(), (self.num_targets > 0).logical_not().to(norm.device)

    @torch.no_grad()
    def infer(self, batch: Batch) -> Outputs:
        self._seed(batch)
        with preserve_buffers(self.model):
            return tree_map(self.full_tensor, self.run_forward(self.model, batch)[0])

    def gradient(self, batch: Batch, field: str, loss: Callable[[Outputs, Batch], Tensor]) -> Tensor:
        self._seed(batch)
        value = batch[field].detach().to(self.topology.device).requires_grad_()
        with preserve_buffers(self.model):
            outputs, on_device = self.run_forward(self.model, batch | {field: value})
            (gradient,) = torch.autograd.grad(loss(outputs, on_device), value, allow_unused=True)
        return torch.zeros_like(value) if gradient is None else gradient

    def gather_rows(self, rows: Tensor) -> Tensor:
        if self.topology.dp_size == 1:
            return rows[self.row_order([len(rows)]).to(rows.device)]
        row_counts = self._rows_per_replica(len(rows))
        padded = rows.new_zeros((max(row_counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in row_counts]
        dist.all_gather(gathered, padded, group=self.replicas)
        by_replica = torch.cat([part[:count] for part, count in zip(gathered, row_counts, strict=True)])
        return by_replica[self.row_order(row_counts).to(rows.device)]

    def local_rows(self, rows: Tensor, count: int) -> Tensor:
        row_counts, replica = self._rows_per_replica(count), self.topology.dp_rank
        positions = self.row_order(row_counts).argsort().split(row_counts)[replica]
        return rows[positions.to(rows.device)]

    def row_order(self, row_counts: Sequence[int]) -> Tensor:
        """Returns the order of the run for rows that lie replica by replica, int64 [sum of `row_counts`]: row k of a
        step belongs to replica k mod n."""
        counts = torch.tensor(row_counts)
        rows = torch.cat([torch.arange(count) for count in row_counts])
        return (rows * len(counts) + torch.arange(len(counts)).repeat_interleave(counts)).argsort()

    def _rows_per_replica(self, count: int) -> list[int]:
        """Returns how many rows each replica has: they differ where samples are left out or held-out data end."""
        if self.topology.dp_size == 1:
            return [count]
        counts = [torch.zeros((), dtype=torch.int64, device=self.topology.device) for _ in range(self.topology.dp_size)]
        dist.all_gather(counts, torch.tensor(count, device=self.topology.device), group=self.replicas)
        return [int(count) for count in counts]

    def _seed(self, batch: Batch) -> None:
        """Seeds torch's generator, so that a model draws the same numbers in every attempt of the run."""
        seed_torch(int(batch["draws"][0]) if num_rows(batch) else 0, self.topology.device)

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> tuple[Sums, Rows]:
        self.model.eval()
        outputs, on_device = self.run_forward(self.model, batch)
        self.model.train()
        sums = self.evaluation_sums(outputs, on_device, self.objective.counts(batch))
        return sums, self.objective.rows(tree_map(self.full_tensor, outputs), on_device)

    def evaluation_sums(self, outputs: Outputs, batch: Batch, counts: Mapping[str, float]) -> Sums:
        """Returns this rank's sums of a batch of held-out data: the objective's sums and the counts."""
        sums, device = Sums(), self.topology.device
        self.add(
            sums, {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in counts.items()}
        )
        self.add(sums, self.objective.evaluate(outputs, batch))
        return sums

    def accumulate(self, batch_sums: list[Sums], sums: Sums) -> list[Sums]:
        total = batch_sums[0] if batch_sums else Sums()
        return [{name: total[name] + value if name in total else value for name, value in sums.items()}]

    def reduce_batches(self, batch_sums: Sequence[Sums]) -> dict[str, float]:
        sums = {name: value.reshape(1) for of_batches in batch_sums for name, value in of_batches.items()}
        return {name: values[0] for name, values in self.reduce(sums).items()}

    def reduce(self, sums: Mapping[str, Tensor]) -> dict[str, list[float]]:
        names = sorted(sums)
        stacked = torch.stack([sums[name].to(self.topology.device, torch.float64) for name in names])
        return dict(zip(names, self.all_reduce(stacked).tolist(), strict=True))

    def state(self, everything: bool = False) -> Mapping[str, Tensor | FlatShard]:
        return {name: plain_tensor(tensor) for name, tensor in self._tensors(everything).items()}

    def _tensors(self, everything: bool = False) -> dict[str, Tensor]:
        """Returns the tensors of `state` as this rank holds them."""
        self._materialize()
        tensors, saved = self.model.state_dict(), is_saved(self.model)
        state = {f"model/{name}": tensor.detach() for name, tensor in tensors.items() if everything or saved(name)}
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer/{kind}/{name}"] = value
        return state | self.scaler.state()

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        current = self._tensors()
        for name, tensor in state.items():
            current[name].copy_(tensor.to(current[name].device))
        self.scaler.load_state(state)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            yield name, tensor.detach().cpu()

    def close(self) -> None:
        """Drops the wrapper, which refers to the process group."""
        del self.wrapped

    def _materialize(self) -> None:
        """Creates the optimizer state of every trained parameter, so that a checkpoint can be read into it and it is
        the same in every attempt. torch creates it only with a parameter's first gradient.

        A step with a learning rate of zero creates it in any optimizer; then the state is set to zero, as before a
        first step.
        """
        if self.is_materialized:
            return
        self.is_materialized = True
        stateless = [parameter for parameter in self.parameters if not self.optimizer.state.get(parameter)]
        if not stateless:
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for parameter in stateless:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for parameter in stateless:
            for value in self.optimizer.state[parameter].values():
                value.copy_(torch.zeros_like(plain_tensor(value)))


def plain_tensor(tensor: Tensor) -> Tensor:
    """Returns `tensor` as it is saved: a quantized one (an optimizer's 8-bit state) as a dequantized copy, on the CPU
    unless it is sharded."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if type(local).dequantize is Tensor.dequantize:
        return tensor
    if not isinstance(tensor, DTensor):
        return local.cpu().dequantize()
    return DTensor.from_local(
        local.dequantize(), tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch on the device; it is copied from pinned memory, which does not wait for the device's queue."""
    if device.type == "cpu":
        return batch
    return {
        name: tensor if tensor.device.type == device.type else tensor.pin_memory().to(device, non_blocking=True)
        for name, tensor in batch.items()
    }
