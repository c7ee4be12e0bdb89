"""What a process sends, counted where it is sent: collectives by kind, also those that DTensors make."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {  # of torch.distributed's own calls, and of its functional ones, by which DTensors send
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "receive",
}


class Collectives(TorchDispatchMode):
    """Counts the collectives of this process while it is active. One of a kind that it does not know is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does by plain tensors is seen
        packet = func._overloadpacket
        namespace, _, name = packet._qualified_op_name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait_tensor", "_wrap_tensor")):
            self.counts[KINDS[name]] += 1
        return func(*args, **(kwargs or {}))


def counted(work: Any) -> dict[str, int]:
    """The collectives of this process while `work()` runs."""
    with Collectives() as collectives, torch.enable_grad():
        work()
    return dict(collectives.counts)
