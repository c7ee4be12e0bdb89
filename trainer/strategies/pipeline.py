"""Pipeline parallel: every rank holds one or more stages of layers, and micro-batches follow each other through them.

torch.distributed.pipelining decides the order of computing and sending. Losses are summed and divided by the counts of
the whole step before the backward pass, so no schedule scales gradients. Replicas of a stage sum theirs by our own
all-reduce or by FSDP2 with parameters that stay gathered, the two ways that are right with every schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle, get_schedule_class
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten

from trainer import fault_points
from trainer.config import strategy as schema
from trainer.config.pipeline_schedules import SCHEDULES, micro_batches
from trainer.errors import ConfigError
from trainer.models import ModelFactory, materialize
from trainer.objectives import Batch, Normalizers, Objective, Outputs, Rows, Sums, has_rows
from trainer.optim.groups import names
from trainer.patches import without_values
from trainer.strategies.arithmetic import to_device
from trainer.strategies.buckets import all_reduce_buckets
from trainer.strategies.buffers import preserve_buffers
from trainer.strategies.fsdp import shard
from trainer.strategies.layers import wrap_layers
from trainer.strategies.padding import num_rows, take_rows, trim_rows
from trainer.strategies.stages import Stage, balance, cut_model, measure_costs, pp_rank_of_stage
from trainer.strategies.tensor_parallel import (
    TensorParallel,
    all_reduce_partial_gradients,
    global_norm,
    local_tensor,
)
from trainer.strategies.used_parameters import UsedParameters, all_reduce_any


class NumberedStage(PipelineStage):
    """A stage of torch's that tells its module which micro-batch it computes."""

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.submod.number = fwd_chunk_id  # type: ignore[assignment, union-attr]
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)


class Pipeline(TensorParallel):
    """Trains a model whose stages are spread over ranks."""

    config: schema.Pipeline
    used: UsedParameters | None = None
    stage_class = NumberedStage

    def build(self, model_factory: ModelFactory) -> nn.Module:
        topology, layout, device = self.topology, self.topology.layout, self.topology.device
        self.num_averaged_ranks = 1  # gradients are summed
        self.schedule, self.mesh = SCHEDULES[self.config.schedule], topology.mesh()
        self.group, self.replica_mesh = self.mesh["pp"].get_group(), self.mesh["dp"]
        self.pp_rank = self.mesh.get_local_rank("pp")
        self.costs = measure_costs(model_factory, self.precision.autocast(), device)
        self.stage_blocks = balance(self.costs, layout.stages * self.config.stages_per_rank)
        local_stages = [index for index in range(len(self.stage_blocks)) if self.pp_rank_of(index) == self.pp_rank]
        first, last = local_stages[0] == 0, local_stages[-1] == len(self.stage_blocks) - 1
        with without_values():
            model = model_factory.build()
            self.names = [(name, value.shape, value.dtype) for name, value in model.state_dict().items()]
            self.trained = names(model)
            tied = cut_model(
                model, [block for index in local_stages for block in self.stage_blocks[index]], first, last
            )
        has_split_ends = self.pp_rank_of(0) != self.pp_rank_of(len(self.stage_blocks) - 1)
        tied = [name for name in tied if name in self.trained]
        self.all_tied, self.tied = tied, tied if has_split_ends and (first or last) else []
        self.reports_data = last and self.mesh.get_local_rank("tp") == 0
        wrap_layers(model, self.options.activation_checkpointing, self.options.compile)
        self.split(model, self.mesh["tp"])
        self.stages = {
            index: Stage(
                model,
                self.stage_blocks[index],
                index == 0,
                index == len(self.stage_blocks) - 1,
                self.autocast_forward,
            )
            for index in local_stages
        }
        if self.is_sharded:
            if tied and first and last:
                raise ConfigError(
                    f"strategy.data_parallel=fsdp: with strategy.schedule={self.config.schedule} the two ends of the "
                    "model are on one process, and this model ties them; nearest: strategy.data_parallel=ddp, or "
                    "strategy.schedule=interleaved_zero_bubble"
                )
            for stage in self.stages.values():
                shard(
                    stage,
                    stage.blocks,
                    self.replica_mesh,
                    self.precision,
                    reshard_after_forward=False,
                    find_unused=self.config.find_unused_parameters,
                )
        materialize(model, device, device)
        model_factory.fill(model, self._replica_group())
        self.has_tied_ends = bool(tied and has_split_ends)
        self.ends = self._group_of_ends() if self.has_tied_ends else None
        self.local_parameters = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        if self.is_sharded and self.config.find_unused_parameters:
            self.used = UsedParameters(self.trained, model, device)
            for stage in self.stages.values():
                self.used.watch_groups(stage)
        self.sum_names: dict[tuple[str, Objective], list[str]] = {}
        self.schedules: dict[tuple[int, int], PipelineScheduleSingle | PipelineScheduleMulti] = {}
        return model

    @property
    def is_sharded(self) -> bool:
        return self.config.data_parallel == "fsdp" and self.topology.dp_size > 1

    def pp_rank_of(self, stage: int) -> int:
        return pp_rank_of_stage(self.config, self.topology.layout.stages, stage)

    def train_step(
        self, micro_batches: Sequence[Batch], objective: Objective | None = None, abandoned: bool = False
    ) -> Sums:
        objective = objective or self.objective
        normalizers, sums = self.reduce_counts(micro_batches, objective, abandoned)
        self.buffers.snapshot()
        for batch, max_rows in zip(micro_batches, self._max_rows(micro_batches), strict=True):
            self._run_micro_batch(batch, max_rows, objective, normalizers, sums)
        self._add_missing_sums(sums, ("loss", objective))
        self._agree_on_gradients()
        gradients = dict(self._gradients())
        if self.topology.dp_size > 1 and not self.is_sharded:
            self._all_reduce_gradients(list(gradients.values()), self.replica_mesh.get_group())
        if self.ends is not None and self.tied:
            self._all_reduce_gradients([gradients[name] for name in self.tied if name in gradients], self.ends)
        return sums

    def _add_missing_sums(self, sums: Sums, key: tuple[str, Objective]) -> None:
        """Adds zeros under the names that are missing: only the rank with the head knows the names of the objective's
        sums. It broadcasts them once."""
        if key not in self.sum_names:
            names = [list(sums)]
            dist.broadcast_object_list(names, group=self.group, group_src=self.pp_rank_of(len(self.stage_blocks) - 1))
            self.sum_names[key] = names[0]
        for name in self.sum_names[key]:
            sums.setdefault(name, torch.zeros((), dtype=torch.float64, device=self.topology.device))

    def _agree_on_gradients(self) -> None:
        """Gives a parameter a gradient of zeros if only a replica, or the other end of the model, has one for it."""
        if self.used:
            for name in self.used.find_unused() & self.local_parameters.keys():
                self.local_parameters[name].grad = None
        elif not self.is_sharded and (self.topology.dp_size > 1 or self.has_tied_ends):
            flags = [
                name in self.local_parameters and self.local_parameters[name].grad is not None for name in self.trained
            ]
            global_flags = all_reduce_any(flags, self.topology.device)
            if all(flag or name not in self.local_parameters for flag, name in zip(flags, self.trained, strict=True)):
                return  # the common case, in which the host need not wait for the collective
            for name, used in zip(self.trained, global_flags.tolist(), strict=True):
                if used and name in self.local_parameters and self.local_parameters[name].grad is None:
                    self.local_parameters[name].grad = torch.zeros_like(self.local_parameters[name])

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the gradients of this rank's stages, placed as the parameters are: some arrive as partial sums."""
        all_reduce_partial_gradients(self.model, self.mesh["tp"])
        for name, parameter in self.model.named_parameters():
            if isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor):
                parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
            if parameter.grad is not None:
                yield name, parameter.grad

    def _max_rows(self, micro_batches: Sequence[Batch]) -> list[int]:
        """Returns for each micro-batch the largest number of sequences on any replica. Samples that are left out make
        it shorter on one replica, but replicas that gather parameters from each other must follow one order."""
        rows = torch.tensor([num_rows(batch) for batch in micro_batches])
        if self.is_sharded and self.options.unequal_micro_batches:
            dist.all_reduce(rows, dist.ReduceOp.MAX, group=self.replica_mesh.get_group())
        return rows.tolist()

    def _run_micro_batch(
        self, batch: Batch, max_rows: int, objective: Objective, normalizers: Normalizers, sums: Sums
    ) -> None:
        """Runs forward and backward of one of the loop's micro-batches, which is cut into the pipeline's own."""
        rows, max_rows = num_rows(batch), max_rows or self.options.micro_batch
        count = micro_batches(self.config, self.topology.layout.stages, max_rows)
        size = max(1, -(-max_rows // count))
        row_counts = [min(size, max(0, rows - number * size)) for number in range(count)]
        spare = self.padding_row() if rows < count * size else None
        chunks = [
            to_device(take_rows(batch, number * size, size, spare), self.topology.device) for number in range(count)
        ]
        self._seed(batch)
        self.run_chunks(chunks, row_counts, objective, normalizers, lambda _, micro_sums: self.add(sums, micro_sums))

    def run_chunks(
        self,
        chunks: Sequence[Batch],
        row_counts: Sequence[int],
        objective: Objective,
        normalizers: Normalizers,
        add: Callable[[int, Sums], None],
    ) -> None:
        """Runs the pipeline's micro-batches, tensors [B, ...] on the device, of which the first `row_counts` rows are
        not padding. `add` gets the number of each and what it sums."""
        for stage in self.stages.values():
            stage.batches, stage.row_counts = chunks, row_counts

        def loss(outputs: Any, number: Tensor) -> Tensor:
            """Returns the loss of the rows that are present: the last micro-batches may be padded."""
            row_count = row_counts[int(number)]
            rows = trim_rows(self._outputs(outputs), row_count), trim_rows(chunks[int(number)], row_count)
            loss, micro_sums = objective.loss(*rows, normalizers)
            fault_points.point("step.loss", [loss])
            add(int(number), micro_sums)
            return loss * self.loss_scale

        self.loss, count = loss, len(chunks)
        try:
            self._schedule(count, num_rows(chunks[0])).step(target=torch.arange(count), return_outputs=False)
        except RuntimeError as error:  # torch wraps errors of a stage
            if isinstance(error.__cause__, (torch.OutOfMemoryError, MemoryError)):
                raise error.__cause__ from error
            raise

    def _schedule(self, count: int, size: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """Returns the schedule for `count` micro-batches of `size` sequences; torch's stages keep the shapes of
        their first micro-batch."""
        if (count, size) not in self.schedules:
            hidden = self._hidden(size)
            outputs = tuple(_rows(leaf, size) for leaf in tree_leaves(self.costs.outputs))
            stages: Any = [
                self.stage_class(
                    stage,
                    stage_index,
                    len(self.stage_blocks),
                    self.topology.device,
                    input_args=() if stage.embeds else (hidden,),
                    output_args=outputs if stage.heads else (hidden,),
                    group=self.group,
                )
                for stage_index, stage in self.stages.items()
            ]
            schedule_class: Any = get_schedule_class(self.schedule.torch_name)
            takes_stages = issubclass(schedule_class, PipelineScheduleMulti)
            self.schedules[count, size] = schedule_class(
                stages if takes_stages else stages[0],
                count,
                loss_fn=lambda outputs, number: self.loss(outputs, number),
                scale_grads=False,
            )
        return self.schedules[count, size]

    def _outputs(self, leaves: Tensor | tuple[Tensor, ...]) -> Outputs:
        """Returns the outputs that the objective gets for the outputs of the last stage."""
        return self.outputs(self._tree(leaves if isinstance(leaves, tuple) else [leaves]))

    def _tree(self, leaves: Iterable[Tensor]) -> Outputs:
        return tree_unflatten(leaves, tree_structure(self.costs.outputs))

    def _hidden(self, rows: int) -> Tensor:
        """Returns the activations between two stages for that many sequences, on the meta device."""
        hidden = _rows(self.costs.hidden, rows)
        if self.config.sequence_parallel and self.topology.layout.tensor > 1:
            hidden = hidden.chunk(self.topology.layout.tensor, dim=1)[0].contiguous()
        return hidden.requires_grad_()

    def _all_reduce_gradients(self, gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        rounds_gradients = self.precision.reduce != self.precision.param
        all_reduce_buckets(
            list(map(local_tensor, gradients)), group, self.precision.reduce_dtype if rounds_gradients else None
        )

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Returns the gradient norm over all stages; a tied weight is counted on the first one."""
        duplicates = set(self.tied) if 0 not in self.stages else set()
        counted = [gradient for name, gradient in self._gradients() if name not in duplicates]
        return global_norm(counted, self.topology.device, 1 if self.is_sharded else self.topology.dp_size)

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> tuple[Sums, Rows]:
        """Runs a batch of an evaluation; the batches follow each other in the pipeline."""
        counts = self.objective.counts(batch)
        self.model.eval()
        outputs, on_device = self._forward_stages(batch)
        self.model.train()
        sums = Sums()
        if outputs is not None:
            sums = self.evaluation_sums(outputs, on_device, counts)
        self._add_missing_sums(sums, ("evaluate", self.objective))
        if not has_rows(self.objective):
            return sums, {}
        return sums, self.objective.rows(self._broadcast_outputs(outputs, num_rows(batch)), on_device)

    @torch.no_grad()
    def infer(self, batch: Batch) -> Outputs:
        self._seed(batch)
        with preserve_buffers(self.model):
            outputs, _ = self._forward_stages(batch)
        return self._broadcast_outputs(outputs, num_rows(batch))

    def gradient(self, batch: Batch, field: str, loss: Callable[[Outputs, Batch], Tensor]) -> Tensor:
        raise ConfigError(
            "strategy=pipeline: the objective asks for a gradient with respect to a field of the batch, which no "
            "process of a pipeline has; nearest: strategy=fsdp"
        )

    def _broadcast_outputs(self, outputs: Outputs | None, rows: int) -> Outputs:
        """Sends the outputs for that many rows from the rank that has them to the others of its pipeline."""
        if outputs is None:
            empty = [_rows(leaf, rows) for leaf in tree_leaves(self.costs.outputs)]
            outputs = self._tree([torch.empty_like(leaf, device=self.topology.device) for leaf in empty])
        outputs = tree_map(lambda leaf: self.full_tensor(leaf).contiguous(), outputs)
        for leaf in tree_leaves(outputs):
            dist.broadcast(leaf, group=self.group, group_src=self.pp_rank_of(len(self.stage_blocks) - 1))
        return outputs

    def _forward_stages(self, batch: Batch) -> tuple[Outputs | None, Batch]:
        """Runs a batch forward through the stages in their order. Returns the outputs on the rank of the last stage,
        None elsewhere, and the batch on the device."""
        rows, x = num_rows(batch), None
        size = self.num_padded(rows)
        spare = self.padding_row() if rows < size else None
        padded = to_device(take_rows(batch, 0, size, spare), self.topology.device)
        for stage_index in range(len(self.stage_blocks)):
            previous_rank, pp_rank = self.pp_rank_of(max(0, stage_index - 1)), self.pp_rank_of(stage_index)
            if self.pp_rank == previous_rank != pp_rank:
                dist.send(x, group=self.group, group_dst=pp_rank)  # type: ignore[arg-type]
            if self.pp_rank != pp_rank:
                continue
            if self.pp_rank != previous_rank:
                x = torch.empty_like(self._hidden(len(padded["draws"])), device=self.topology.device)
                dist.recv(x, group=self.group, group_src=previous_rank)
            stage = self.stages[stage_index]
            stage.batches, stage.row_counts, stage.number = [padded], [rows], 0
            x = stage(x) if stage_index else stage()
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        outputs = trim_rows(self._outputs(x), rows) if len(self.stage_blocks) - 1 in self.stages else None  # type: ignore[arg-type]
        return outputs, trim_rows(padded, rows)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every weight on the main rank, which gets it from the first rank that has it."""
        local_weights = self.model.state_dict()
        is_local = torch.tensor([name in local_weights for name, _, _ in self.names], device=self.topology.device)
        is_local_by_rank = [torch.empty_like(is_local) for _ in range(self.topology.layout.stages)]
        dist.all_gather(is_local_by_rank, is_local, group=self.group)
        for index, (name, shape, dtype) in enumerate(self.names):
            owner = next(pp_rank for pp_rank, flags in enumerate(is_local_by_rank) if flags[index])
            value = self.full_tensor(local_weights[name].detach()) if self.pp_rank == owner else None
            if owner and self.topology.dp_rank == 0 and self.mesh.get_local_rank("tp") == 0:
                if self.pp_rank == owner:
                    dist.send(value.contiguous(), group=self.group, group_dst=0)  # type: ignore[union-attr]
                elif self.pp_rank == 0:
                    value = torch.empty(shape, dtype=dtype, device=self.topology.device)
                    dist.recv(value, group=self.group, group_src=owner)
            if self.topology.is_main:
                yield name, value.cpu()  # type: ignore[union-attr]

    def _replica_group(self) -> dist.ProcessGroup | None:
        """Returns the group of ranks with the same stages, or with shards of them."""
        dp, tp = self.mesh["dp"], self.mesh["tp"]
        if dp.size() > 1 and tp.size() > 1:
            return self.topology.mesh_of(pp=self.mesh.size(0), dp_tp=dp.size() * tp.size())["dp_tp"].get_group()
        return next((mesh.get_group() for mesh in (dp, tp) if mesh.size() > 1), None)

    def _group_of_ends(self) -> dist.ProcessGroup | None:
        """Returns the group of ranks with the two ends of one replica; every rank creates all of these groups."""
        ranks = self.mesh.mesh  # pp x dp x tp
        first, last = (
            ranks[self.pp_rank_of(0)].flatten().tolist(),
            ranks[self.pp_rank_of(len(self.stage_blocks) - 1)].flatten().tolist(),
        )
        groups = {pair: dist.new_group(list(pair)) for pair in zip(first, last, strict=True)}
        return next((group for pair, group in groups.items() if self.topology.rank in pair), None)


def _rows(example: Tensor, rows: int) -> Tensor:
    """Returns a meta tensor for `rows` sequences, shaped like the example of one."""
    return torch.empty((rows, *example.shape[1:]), dtype=example.dtype, device="meta")
