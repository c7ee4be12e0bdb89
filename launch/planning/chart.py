"""A curve drawn in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

_LEVELS = " ▁▂▃▄▅▆▇█"


def rows(curve: Callable[[int], float], last: int, width: int = 60, height: int = 4) -> Iterator[str]:
    """Yields the rows of a chart of `curve` from 1 to `last`, the top row first."""
    points = [1 + round(column * (last - 1) / max(1, width - 1)) for column in range(width)]
    values = [curve(point) for point in points]
    top = max(values) or 1.0
    levels = [round(value / top * height * 8) for value in values]
    for row in reversed(range(height)):
        yield "".join(_LEVELS[min(8, max(0, level - 8 * row))] for level in levels).rstrip()
