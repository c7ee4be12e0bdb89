"""Measures how well the devices are used: `mfu` and `mem_gib` of a step's row."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from trainer import hardware
from trainer.data.batch_sizes import Batches
from trainer.models import ModelFactory
from trainer.topology import Topology

log = logging.getLogger("onecurve")
_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


def flop_counter() -> FlopCounterMode:
    """Returns torch's counter of floating-point operations, which also knows attention on a CPU."""
    return FlopCounterMode(display=False, custom_mapping=_ATTENTION)


class Meter:
    """Measures utilization against the devices' data sheets; nothing on CPUs."""

    def __init__(self, topology: Topology, batches: Batches, factory: ModelFactory):
        """Counts on the main rank, which writes the rows, what a sequence costs `factory`'s model."""
        self.topology, self.batches = topology, batches
        peak = hardware.peak_flops(topology.device) if topology.is_main else None
        flops = sequence_flops(factory) if peak else None
        self.sequences_per_s = peak * topology.world_size / flops if peak and flops else None  # at the most

    def mfu(self, step: int, seconds: float) -> dict[str, float]:
        """Returns the model FLOPs utilization (Chowdhery et al. 2022, appendix B) of a step: what its sequences cost
        the model, without recomputation, over the peak of all devices in bf16 in that time."""
        if self.sequences_per_s is None:
            return {}
        return {"mfu": round(self.batches.size(step - 1) / seconds / self.sequences_per_s, 4)}

    def memory(self) -> dict[str, float]:
        """Returns the peak memory of the fullest device since the last call, GiB. Every rank calls it: it does one
        collective, where devices have their own memory."""
        peak = hardware.peak_bytes(self.topology.device)
        if peak is None:
            return {}
        most = torch.tensor(peak, dtype=torch.int64, device=self.topology.device)
        if self.topology.world_size > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return {"mem_gib": round(int(most) / 2**30, 3)}


def sequence_flops(factory: ModelFactory) -> int | None:
    """Returns the floating-point operations of one sequence's forward and backward pass: those of matrix products and
    attention (all of it: half of a causal one is masked), as torch counts them; the backward pass takes twice as many.

    Nothing is computed. Returns None where the model cannot be traced.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # imported late: it is slow, and CPUs do not need it

    assert factory.example is not None
    example, counter = factory.example(), flop_counter()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad(), counter:
            model = factory.build().eval()
            model({name: fake.from_tensor(tensor) for name, tensor in example.items()})
    except Exception as error:  # whatever a model does with tensors that have no values
        log.info("no mfu: the model cannot be traced: %s: %s", type(error).__name__, error)
        return None
    return 3 * counter.get_total_flops()
