"""`train.deterministic=topology`: the same bits on any number of ranks, under any of several strategies.

What differs between topologies is the order in which numbers are added, so here it is fixed. A leaf is a micro-batch
of fixed size, whose forward and backward have the same shapes wherever they run. Sums over leaves follow one binary
tree (sum_tree.py), whoever computes which leaf (leaves.py); the gradient norm is a sum that is exact in any order
(exact_sums.py); the optimizer steps element by element. arithmetic.py has what all strategies share, the other files
what differs. EasyScale (Li et al. 2023) does it for DDP, by virtual workers that are summed up in a ring of fixed size.
"""

from __future__ import annotations

import os

import torch


def set_deterministic(enabled: bool, device: torch.device) -> None:
    """Lets torch choose only kernels whose result depends on their inputs alone, or any again. On CPUs with one thread:
    how a matrix product or a sum is split depends on their number."""
    if enabled == (_before is not None):
        return
    num_threads, fills, benchmark = _before or (1, False, False)
    _keep(enabled)
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]  # it only finds bugs
    torch.backends.cudnn.benchmark = benchmark
    if device.type == "cpu":
        torch.set_num_threads(num_threads)
    elif enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


_before: tuple[int, bool, bool] | None = None  # the settings of the process, where this one has changed them


def _keep(enabled: bool) -> None:
    global _before
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    _before = (torch.get_num_threads(), fills, torch.backends.cudnn.benchmark) if enabled else None
