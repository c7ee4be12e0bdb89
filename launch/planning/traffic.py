"""What a process sends in a step, at the least that each collective can do with (rings), in bytes."""

from __future__ import annotations

from typing import NamedTuple

from launch.planning.accountant import Accountant
from launch.planning.parts import Share
from trainer.config import schema
from trainer.precision import DTYPES
from trainer.strategies.fsdp import sums_round


class Sent(NamedTuple):
    what: str
    nbytes: int
    processes: int
    """Among how many: neighbours, as all layouts place them."""
    waits: bool
    """Whether computing has to wait for it; else it goes on meanwhile."""


def traffic(of: Accountant, place: int = 0) -> list[Sent]:
    """Of a process at that place of a pipeline, or of any."""
    if of.procs == 1:
        return []
    strategy, precision, sent = of.strategy, of.config.precision, []
    reduced = DTYPES[precision.reduce].itemsize / DTYPES[precision.param].itemsize
    tensor, copies = of.layout.tensor, of.copies
    spread = copies * tensor  # from the first to the last of a copy's peers

    def shared(n: int) -> float:
        return (n - 1) / n

    if isinstance(strategy, schema.Pipeline):
        share, last = of.share_of(place), len(of.parts) - 1
        count, size = of.micro_batches()
        ends = sum((part != 0) + (part != last) for part in of.mine(place))
        hidden = of.built.hidden_bytes * size // (tensor if strategy.sequence_parallel else 1)
        if ends:
            sent.append(Sent("activations to neighbours", hidden * count * ends * of.passes, of.procs, False))
        if copies > 1 and share.shards > 1:
            sent.append(Sent("gathering of parameters", round(shared(copies) * share.padded * of.passes), spread, True))
            scattered = round(shared(copies) * share.padded * reduced * of.passes)
            sent.append(Sent("scattering of gradients", scattered, spread, True))
        elif copies > 1:
            summed = round(2 * shared(copies) * share.trained * reduced)
            sent.append(Sent("all-reduce of gradients", summed, spread, True))
        within = sum(of.part_trace(part).sent for part in of.mine(place)) * count * of.passes
    elif isinstance(strategy, (schema.FSDP, schema.HSDP)):
        share = Share(of.built.parameters, of.shards())
        blocks = sum(share.of_block(number).padded for number in range(len(of.built.blocks)))
        gather = DTYPES[of.compute].itemsize / DTYPES[precision.param].itemsize if strategy.gather == "compute" else 1.0
        often = share.padded + (blocks if strategy.reshard_after_forward else 0)
        n, near = share.shards, share.shards * tensor
        sent.append(Sent("gathering of parameters", round(shared(n) * often * gather * of.passes), near, False))
        often_reduced = of.passes if strategy.reduce == "each" else 1
        scattered = round(shared(n) * share.padded * reduced * often_reduced)
        sent.append(Sent("scattering of gradients", scattered, near, False))
        if isinstance(strategy, schema.HSDP) and (groups := copies // n) > 1:
            rounds = sums_round(of.subject.precision, strategy.gather)
            summed = round(2 * shared(groups) * share.trained * reduced * (often_reduced if rounds else 1))
            sent.append(Sent("all-reduce between groups", summed, of.procs, False))
        within = of.trace().sent * of.passes if tensor > 1 else 0
    else:
        share, n = Share(of.built.parameters), copies
        stage = strategy.stage if isinstance(strategy, schema.Zero) else 0
        often = of.passes if stage >= 2 else 1
        if stage == 3:
            sent.append(Sent("gathering of parameters", round(2 * shared(n) * share.held * of.passes), n, False))
            scattered = round(shared(n) * share.trained * reduced * often)
            sent.append(Sent("scattering of gradients", scattered, n, False))
        else:
            summed = round(2 * shared(n) * share.trained * reduced * often)
            sent.append(Sent("all-reduce of gradients", summed, n, False))
        within = 0
    if within:
        sent.append(Sent("within layers", round(within * shared(tensor)), tensor, True))
    return sent
