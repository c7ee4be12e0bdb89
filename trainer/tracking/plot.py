"""Draws line plots as SVG paths. A plot spans 0..1000 both ways, is stretched by the page and labeled in %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Points = Sequence[tuple[float, float | None]]  # x rising; None: not finite
Mark = tuple[float, str, str]  # x, look (restart or checkpoint), text
SIZE = 1000
BUCKETS = 500  # two points each
DOTTED = 60  # points


@dataclass
class Series:
    """A line; `look` is its CSS class: main, faint or second. Few points are dotted too."""

    name: str
    points: Points
    look: str = "main"
    path: str = ""
    dots: str = ""


@dataclass
class Plot:
    """A plot over steps 0..`last`. Its paths are made once, from at most 1000 points a series."""

    title: str
    unit: str
    series: list[Series]
    last: int
    zero: bool = True  # the y axis starts at 0
    marks: list[Mark] = field(default_factory=list)
    x_ticks: list[tuple[float, str]] = field(default_factory=list)  # place in 0..1, text
    y_ticks: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for line in self.series:
            line.points = decimate(line.points)
        low, high = _extent([y for line in self.series for _, y in line.points if y is not None], self.zero)

        def down(y: float) -> float:
            return (high - y) / (high - low)

        self.x_ticks = [(x / self.last, label(x)) for x in ticks(0, self.last, 6) if x == int(x)]
        self.y_ticks = [(down(y), label(y)) for y in ticks(low, high, 5)]
        for line in self.series:
            places: Points = [(x / self.last, None if y is None else down(y)) for x, y in line.points]
            line.path = _path(places)
            if len(places) <= (DOTTED if line.look == "second" else 1):
                line.dots = "".join(_path([place]) for place in places)
        marks = {(round(x / self.last, 3), look, text) for x, look, text in self.marks if x <= self.last}
        self.marks = sorted(marks)

    @property
    def data(self) -> dict[str, object]:
        """Returns the drawn numbers, for the tooltips."""
        return {
            "last": self.last,
            "series": [
                {
                    "name": line.name,
                    "x": [x for x, _ in line.points],
                    "y": [None if y is None else float(f"{y:.5g}") for _, y in line.points],
                }
                for line in self.series
            ],
        }


def decimate(points: Points, buckets: int = BUCKETS) -> Points:
    """Returns at most 2 * `buckets` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= 2 * buckets:
        return points
    extremes: list[tuple[float, float | None]] = []
    for bucket in range(buckets):
        part = points[bucket * len(points) // buckets : (bucket + 1) * len(points) // buckets]
        finite = [(y, x) for x, y in part if y is not None]
        extremes += sorted({(x, y) for y, x in (min(finite), max(finite))}) if finite else part[:1]
    return extremes


def smooth(points: Points, share: float = 0.02) -> Points:
    """Returns the mean of a centered window at each point: `share` of all points wide, narrower at the first ones."""
    values = np.array([math.nan if y is None else y for _, y in points])
    is_finite = ~np.isnan(values)
    sums, counts = (np.append(0, np.cumsum(part)) for part in (np.where(is_finite, values, 0), is_finite))
    at = np.arange(len(points))
    reach = np.minimum(int(share * len(points) / 2), at)
    low, high = at - reach, np.minimum(at + reach + 1, len(points))
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return [(x, None if y is None else mean) for (x, y), mean in zip(points, means.tolist(), strict=True)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Returns about `count` round numbers within low..high, 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def label(value: float) -> str:
    """Formats a number in short: 0.25, 3e-4, 1200, 12k, 1.5M, 2B."""
    for size, unit, suffix in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= size:
            return f"{value / unit:.4g}{suffix}"
    if value and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def _extent(values: list[float], zero: bool) -> tuple[float, float]:
    """Returns the y range: the values and a margin, never empty."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low = min(low, 0.0) if zero else low
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = abs(high) / 2 or 0.5
        low, high = (low, low + 2 * half) if zero else (low - half, high + half)
    margin = (high - low) * 0.05
    return low - (0.0 if zero else margin), high + margin


def _path(places: Points) -> str:
    """Returns a line through places in 0..1. It breaks where there is no number; a single place is a dot."""
    pieces, pen = [], "M"
    for x, y in places:
        if y is None:
            pen = "M"
            continue
        pieces.append(f"{pen}{x * SIZE:.1f} {y * SIZE:.1f}" + "h0" * (pen == "M"))
        pen = "L"
    return "".join(pieces)
