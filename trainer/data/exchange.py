"""Work on a data set, shared out among the ranks: each does its part, all get all, and all hear what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trainer.errors import ConfigError, OnecurveError

THREADS = 8

Gather = Callable[[Any], list[Any]]  # this rank's JSON-able value in, those of all ranks out


def alone(value: Any) -> list[Any]:
    """The `gather` of a single process."""
    return [value]


def exchange(items: list[Any], make: Callable[[Any], Any], part: tuple[int, int], gather: Gather) -> list[Any]:
    """`make` of every item, JSON-able: each rank (`part`: number, of how many) makes its part, in threads.

    What a rank raises is raised on all of them, so that none waits for another: one ConfigError with every problem,
    whose exit code is DataError's if that is all that is wrong.
    """
    rank, size = part

    def attempt(item: Any) -> list[Any]:
        try:
            return [make(item), None, 0]
        except OnecurveError as error:
            return [None, str(error), error.exit_code]

    with ThreadPoolExecutor(THREADS) as pool:
        own = list(pool.map(attempt, items[rank::size]))
    parts = gather(own)
    made = [parts[i % size][i // size] for i in range(len(items))]
    if problems := [(problem, code) for _, problem, code in made if problem is not None]:
        raise ConfigError(list(dict.fromkeys(p for p, _ in problems)), min(code for _, code in problems))
    return [value for value, _, _ in made]
