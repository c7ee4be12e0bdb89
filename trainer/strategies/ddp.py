"""Data parallel: every process holds the whole model, gradients are averaged in buckets during the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config import schema
from trainer.objectives import Batch, Objective, Sums
from trainer.precision import Precision
from trainer.strategies.single import Single, StepOptions
from trainer.topology import Topology


class DDP(Single):
    """`Single` under torch's DistributedDataParallel. Alone, without a process group, it is `Single`."""

    def __init__(
        self,
        config: schema.DDP,
        topology: Topology,
        precision: Precision,
        objective: Objective,
        options: StepOptions,
    ):
        super().__init__(config, topology, precision, objective, options)
        self.bucket_mb = config.bucket_mb
        self.parallel = topology.dp_size > 1
        self.settled = not self.parallel

    def wrap(self, model: nn.Module) -> nn.Module:
        if not self.parallel:
            return model
        device_ids = [self.topology.device] if self.topology.device.type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=device_ids, bucket_cap_mb=self.bucket_mb, gradient_as_bucket_view=True
        )

    def sync(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last or not self.parallel else self.wrapped.no_sync()  # type: ignore[operator]

    def total(self, sums: Tensor) -> Tensor:
        if self.parallel:
            dist.all_reduce(sums)
        return sums

    def train_step(self, micro_batches: Sequence[Batch]) -> Sums:
        if not self.settled:
            self._settle_buckets(micro_batches[0])
        return super().train_step(micro_batches)

    def _settle_buckets(self, batch: Batch) -> None:
        """Two throw-away backward passes, in every life of a run.

        DDP rebuilds its buckets after the first backward. From 3 ranks on this changes the order of the sums, so a
        resumed run would differ from the uninterrupted one in the last bits.
        """
        first = {name: tensor[:1] for name, tensor in batch.items()}
        for _ in range(2):
            self.loss_of(self.wrapped, first)["loss"].backward()
            self.optimizer.zero_grad(set_to_none=True)
        self.settled = True
