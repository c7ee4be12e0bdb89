"""Data parallel: every rank holds the whole model, gradients are averaged in buckets during the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config import strategy as schema
from trainer.objectives import Batch, Objective, Sums
from trainer.strategies.arithmetic import StepArithmetic
from trainer.strategies.buffers import preserve_buffers


class DDP(StepArithmetic):
    """Trains a whole model on every rank with torch's DistributedDataParallel."""

    config: schema.DDP
    has_settled_buckets = False

    def wrap(self, model: nn.Module) -> nn.Module:
        device_ids = [self.topology.device] if self.topology.device.type == "cuda" else None
        wrapped = DistributedDataParallel(
            model,
            device_ids=device_ids,
            bucket_cap_mb=self.config.bucket_mb,
            gradient_as_bucket_view=self.config.bucket_view,
            static_graph=self.config.static_graph,
            find_unused_parameters=self.config.find_unused_parameters,
            broadcast_buffers=False,  # they are averaged after each update
        )
        if self.precision.reduce != self.precision.param:
            # A lambda, because DDP refuses functions whose annotations are strings.
            wrapped.register_comm_hook(self.precision.reduce_dtype, lambda dtype, bucket: average_in(dtype, bucket))
        return wrapped

    def sync(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self.wrapped.no_sync()  # type: ignore[operator]

    def train_step(
        self, micro_batches: Sequence[Batch], objective: Objective | None = None, abandoned: bool = False
    ) -> Sums:
        if not self.has_settled_buckets:
            self._settle_buckets(micro_batches[0], objective or self.objective)
        return super().train_step(micro_batches, objective, abandoned)

    def _settle_buckets(self, batch: Batch, objective: Objective) -> None:
        """Runs two throw-away backward passes, in every attempt of a run.

        DDP rebuilds its buckets after the first backward pass. With 3 or more ranks this changes the order of the sums,
        so a resumed run would differ from the uninterrupted one in the last bits. They take a whole micro-batch,
        because the compiler reads a second size as a sign that all sizes vary. Buffers and generators do not change.
        """
        devices = [self.topology.device] if self.topology.device.type == "cuda" else []
        normalizers = dict.fromkeys(
            objective.counts(batch), torch.ones((), dtype=torch.float64, device=self.topology.device)
        )
        with torch.random.fork_rng(devices):
            for _ in range(2):
                with preserve_buffers(self.model):
                    objective.loss(*self.run_forward(self.wrapped, batch), normalizers)[0].backward()
                self.optimizer.zero_grad(set_to_none=True)
        self.has_settled_buckets = True


def average_in(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Averages a bucket of gradients over all ranks in another data type than their own. They are divided first, so
    that the sum does not overflow, as in torch's `bf16_compress_hook`, which refuses CPUs."""
    gradients = bucket.buffer()
    scaled = (gradients.float() / dist.get_world_size()).to(dtype)

    def copy_back(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        return gradients.copy_(future.value()[0])

    return dist.all_reduce(scaled, async_op=True).get_future().then(copy_back)
