"""Who writes what: of all processes that hold a piece, one writes it. Made once a run, the same on every process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.checkpoint.format import Place, Stored, header, tensor_file
from trainer.checkpoint.pieces import DTYPES, NAMES, Box, State, dtype_of, pieces, shape_of
from trainer.errors import TrainingError

SMALL = 1 << 16  # bytes; the bits of smaller tensors are summed up together


class Held(NamedTuple):
    """A piece of a tensor, as a process tells the others of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box

    @property
    def nbytes(self) -> int:
        return self.box.numel * DTYPES[self.dtype].itemsize

    @classmethod
    def read(cls, row: Sequence[Any]) -> Held:
        name, dtype, shape, (offset, size) = row
        return cls(name, dtype, tuple(shape), Box(tuple(offset), tuple(size)))


def held_by(state: State) -> list[tuple[Held, Tensor]]:
    """All that this process holds, as views of its memory. TrainingError for a type that cannot be saved."""
    found = []
    for name, value in state.items():
        dtype, shape = dtype_of(value), shape_of(value)
        if dtype not in NAMES:
            raise TrainingError(f"'{name}' is {dtype}, which no checkpoint holds")
        found += [(Held(name, NAMES[dtype], shape, box), tensor.detach()) for box, tensor in pieces(value)]
    return found


@dataclass(frozen=True)
class Plan:
    """`files[rank]`: the pieces that a process writes, in their order, each with its first byte behind the header."""

    files: list[list[tuple[Held, int]]]
    shared: dict[Held, list[int]]
    """Pieces that several processes hold: by whom. They have to agree."""

    @classmethod
    def of(cls, held: Sequence[Sequence[Held]]) -> Plan:
        """`held[rank]`: what each process holds. Those with the least to write take what several have."""
        holders: defaultdict[Held, list[int]] = defaultdict(list)
        for rank, its in enumerate(held):
            for piece in its:
                holders[piece].append(rank)
        mine: list[list[Held]] = [[] for _ in held]
        load = [0] * len(held)
        for piece in sorted(holders, key=lambda piece: (len(holders[piece]) > 1, -piece.nbytes, piece)):
            writer = min(holders[piece], key=load.__getitem__)
            mine[writer].append(piece)
            load[writer] += piece.nbytes
        return cls([_laid_out(its) for its in mine], {piece: by for piece, by in holders.items() if len(by) > 1})

    def size(self, rank: int) -> int:
        """Of the tensors that this process writes."""
        if not self.files[rank]:
            return 0
        last, at = self.files[rank][-1]
        return at + last.nbytes

    def header(self, rank: int, about: dict[str, str]) -> bytes:
        return header([(_key(piece), piece.dtype, piece.box, at) for piece, at in self.files[rank]], about)

    def tensors(self, about: dict[str, str]) -> dict[str, Stored]:
        """Where everything will lie."""
        found: dict[str, Stored] = {}
        for rank in range(len(self.files)):
            start = len(self.header(rank, about))
            for piece, at in self.files[rank]:
                stored = found.setdefault(piece.name, Stored(piece.dtype, piece.shape, []))
                if (stored.dtype, stored.shape) != (piece.dtype, piece.shape):
                    raise TrainingError(f"'{piece.name}' is {stored.shape} on one process, {piece.shape} on another")
                stored.places.append(Place(tensor_file(rank), start + at, piece.box))
        return found

    def to_agree_on(self, rank: int) -> dict[str, list[Held]]:
        """What this process has to agree on with others, by who they are ("0,2"): weights, which show the rest too."""
        found: defaultdict[str, list[Held]] = defaultdict(list)
        for piece, ranks in self.shared.items():
            if rank in ranks and piece.name.startswith("model/"):
                found[",".join(map(str, ranks))].append(piece)
        return found


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of all their bits, read as integers: an int64 scalar where the tensors lie; only it is ever fetched. The
    sums of two lists add up to that of both."""
    few = [tensor.nbytes < SMALL and tensor.nbytes % 8 == 0 for tensor in tensors]
    small = [tensor.reshape(-1).view(torch.uint8) for tensor, is_few in zip(tensors, few, strict=True) if is_few]
    sums = [_words(tensor) for tensor, is_few in zip(tensors, few, strict=True) if not is_few]
    sums += [_words(torch.cat(small))] if small else []
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64)


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1).view(torch.uint8)
    if flat.data_ptr() % 8:
        flat = flat.clone()  # a view of words begins at one
    end = flat.numel() // 8 * 8
    return flat[:end].view(torch.int64).sum() + flat[end:].sum(dtype=torch.int64)


def fingerprint_of(state: State) -> Tensor:
    """Of the weights that lie here: a whole number below 2^40 as a float64 scalar, of which many can be added up."""
    weights = [tensor for piece, tensor in held_by(state) if piece.name.startswith("model/")]
    return fingerprint(weights).remainder(1 << 40).double()


def _laid_out(its: Sequence[Held]) -> list[tuple[Held, int]]:
    """Wide types first: then each piece begins at a multiple of its own type's size."""
    at, found = 0, []
    for piece in sorted(its, key=lambda piece: (-DTYPES[piece.dtype].itemsize, piece)):
        found.append((piece, at))
        at += piece.nbytes
    return found


def _key(piece: Held) -> str:
    """The name of a piece in its file; of one that is not the whole tensor, with where it begins."""
    return piece.name if piece.box.size == piece.shape else f"{piece.name}@{','.join(map(str, piece.box.offset))}"
