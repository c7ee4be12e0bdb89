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


def compute_deterministically(device: torch.device) -> None:
    """Lets torch choose only kernels whose result depends on their inputs alone. On CPUs with one thread: how a matrix
    product or a sum is split depends on their number."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it only finds bugs
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
