"""Finds the sample of a step that drives its gradient, and the document in it.

The norm of each sample's part is measured, one pass each: not more work than two halves of the batch, four quarters
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
    """A document in a packed sequence, measured with its targets alone. It may see the documents before it."""

    span: Span
    part: SampleMetrics


@dataclass(frozen=True)
class SpikeDriver:
    sample: Sample
    part: SampleMetrics
    median: float
    """The median of the samples' gradient norms."""
    documents: list[Document]
    """Its documents, the largest gradient first; empty for a decoded sample or a single document."""
    without: StepMetrics | None
    """The step as it would have been without the sample; None if there is no other."""


def measure_samples(replay: Replay, report: ReportProgress, *, gradients: bool) -> list[SampleMetrics]:
    """Measures each sample's part of the step; its gradient only with `gradients`."""
    title, count, parts = "samples, one by one", len(replay.samples), []
    for done, sample in enumerate(replay.samples):
        report(title, done, count)
        parts.append(replay.measure_part(sample.row, gradient=gradients))
    report(title, count, count)
    return parts


def find_driver(replay: Replay, parts: list[SampleMetrics]) -> SpikeDriver:
    """Returns the sample with the largest gradient. `parts`: from `measure_samples` with gradients."""
    number = max(range(len(parts)), key=lambda i: size(parts[i]))
    sample = replay.samples[number]
    other_rows = [other.row for other in replay.samples if other is not sample]
    documents: list[Document] = []
    if len(sample.spans) > 1 and not prepares(replay.objective) and "targets" in sample.row:
        ends = accumulate((span.end_token - span.first_token for span in sample.spans), initial=0)
        rows = [_with_targets_of(sample.row, first, end) for first, end in pairwise(ends)]
        pairs = zip(sample.spans, rows, strict=True)
        documents = [Document(span, replay.measure_part(row, gradient=True)) for span, row in pairs]
        documents.sort(key=lambda document: -size(document.part))
    return SpikeDriver(
        sample,
        parts[number],
        median(map(size, parts)),
        documents,
        replay.measure_step(other_rows) if other_rows else None,
    )


def size(part: SampleMetrics) -> float:
    """Returns the key by which parts are compared: the gradient norm, where a non-finite one comes first."""
    norm = part.grad_norm
    return 0.0 if norm is None else norm if math.isfinite(norm) else math.inf


def _with_targets_of(row: Batch, first: int, end: int) -> Batch:
    """Returns the row with the targets of these tokens alone; the model sees all of it."""
    targets = row["targets"].clone().fill_(IGNORE)
    targets[:, first:end] = row["targets"][:, first:end]
    return {**row, "targets": targets}
