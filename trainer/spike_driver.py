"""Which sample of a step drives its gradient, and which document in it.

The norm of each sample's own part is measured, one pass each: not more work than two halves of the batch, four quarters
and so on, where the many ordinary samples of a half, whose gradients add up, would hide the one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median
from typing import NamedTuple

from trainer.data.packing import Span
from trainer.objectives import Batch, prepares
from trainer.objectives.causal_lm import IGNORE
from trainer.replay import ReportProgress
from trainer.replayed_step import Replay, Sample, SampleMetrics, StepMetrics


class Document(NamedTuple):
    """One of those that a sequence is packed of, with the targets in it alone. It may see what stands before it."""

    piece: Span
    part: SampleMetrics


@dataclass(frozen=True)
class SpikeDriver:
    sample: Sample
    part: SampleMetrics
    median: float
    """Median of the samples' gradient norms."""
    documents: list[Document]
    """Its documents, the largest gradient first; empty for a decoded sample or a single document."""
    without: StepMetrics | None
    """The step as it would have been without the sample; None if there is no other."""


def measure_samples(replay: Replay, told: ReportProgress, *, gradients: bool) -> list[SampleMetrics]:
    """Measures each sample's part of the step, its gradient only if asked for."""
    what, count, found = "samples, one by one", len(replay.samples), []
    for done, sample in enumerate(replay.samples):
        told(what, done, count)
        found.append(replay.part(sample.row, gradient=gradients))
    told(what, count, count)
    return found


def find_driver(replay: Replay, parts: list[SampleMetrics]) -> SpikeDriver:
    """The sample with the largest gradient. `measure_samples`: with gradients, of each sample."""
    number = max(range(len(parts)), key=lambda i: size(parts[i]))
    sample = replay.samples[number]
    others = [other.row for other in replay.samples if other is not sample]
    documents: list[Document] = []
    if len(sample.pieces) > 1 and not prepares(replay.objective) and "targets" in sample.row:
        ends = accumulate((piece.end_token - piece.first_token for piece in sample.pieces), initial=0)
        rows = [_only(sample.row, first, end) for first, end in pairwise(ends)]
        pairs = zip(sample.pieces, rows, strict=True)
        documents = [Document(piece, replay.part(row, gradient=True)) for piece, row in pairs]
        documents.sort(key=lambda document: -size(document.part))
    return SpikeDriver(
        sample, parts[number], median(map(size, parts)), documents, replay.of(others) if others else None
    )


def size(part: SampleMetrics) -> float:
    """Returns the key by which parts are compared: the gradient norm, where a non-finite one comes first."""
    norm = part.grad_norm
    return 0.0 if norm is None else norm if math.isfinite(norm) else math.inf


def _only(row: Batch, first: int, end: int) -> Batch:
    """The row with the targets of these tokens alone; the model sees all of it."""
    targets = row["targets"].clone().fill_(IGNORE)
    targets[:, first:end] = row["targets"][:, first:end]
    return {**row, "targets": targets}
