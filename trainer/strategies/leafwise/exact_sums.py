"""Sums of squares that do not depend on the order of adding: of gradients that are whole, sharded or on other ranks.

Each square is cut into two parts on fixed grids, so coarse that the sum of all parts is exact in fp64 and therefore the
same in any order (Demmel and Nguyen 2013, "Fast reproducible floating-point summation", section 4, with two folds).
What a square loses is below size**2 * 2**-104 of the largest one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHUNKS = {"cpu": 2**15}  # elements that are worked on together: on CPUs what a core's cache holds
CHUNK = 2**20
Reduce = Callable[[Tensor], Tensor]


@torch.no_grad()
def sums_of_squares(
    tensors: Sequence[Tensor], sizes: Sequence[int], device: torch.device, all_reduce_max: Reduce, all_reduce: Reduce
) -> Tensor:
    """Returns the sum of squares of each tensor, fp64 [len(sizes)], the same bits on every process.

    `tensors`: what this process has of each, maybe nothing (numel 0), and no element that another process brings, too.
    `sizes`: elements of the whole tensors. The callables reduce over the processes that have parts.
    """
    largest = all_reduce_max(torch.stack([_largest(tensor, device) for tensor in tensors]))
    exponents = (
        torch.frexp(largest).exponent.double() * 2
    )  # scaled by 2**-exponent, which is exact, no square is above 1
    bits = [53 - max(size, 2).bit_length() for size in sizes]  # of a part: size of them are below 2**53
    sums = torch.zeros((2, len(sizes)), dtype=torch.float64, device=device)
    for number, tensor in enumerate(tensors):
        for chunk in tensor.detach().reshape(-1).split(CHUNKS.get(device.type, CHUNK)):
            squares = chunk.to(device).double().square_().mul_(torch.exp2(bits[number] - exponents[number]))
            coarse = squares.round()
            sums[0, number] += coarse.sum()
            sums[1, number] += squares.sub_(coarse).mul_(2.0 ** bits[number]).round_().sum()
    coarse, fine = all_reduce(sums)
    unit = torch.exp2(-torch.tensor(bits, dtype=torch.float64, device=device))
    return (coarse + fine * unit) * torch.exp2(exponents) * unit


def _largest(tensor: Tensor, device: torch.device) -> Tensor:
    if not tensor.numel():
        return torch.zeros((), dtype=torch.float64, device=device)
    return tensor.detach().abs().max().to(device).double()
