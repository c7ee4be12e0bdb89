"""Work on a data set, shared out among the ranks: each does its part, all get all, and all hear what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from trainer.causes import advice
from trainer.errors import ConfigError, OnecurveError

THREADS = 8


@dataclass(frozen=True)
class Team:
    """This process among those that share the work. `gather`: its JSON-able value in, those of all ranks out.
    `broadcast`: the first rank's comes out. `told`: what is called with (what is made, how many are done, of how many)
    while it takes long. `heartbeat_s`: a rank that has done its part waits no longer than this at a time."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    broadcast: Callable[[Any], Any] = lambda value: value
    told: Callable[[str, int, int], None] = lambda what, done, total: None
    heartbeat_s: float = 10.0

    def agreed(self, make: Callable[[], Any]) -> Any:
        """What `make` gives the first rank, JSON-able, on all of them; also what it raises, as a ConfigError."""
        value, problem, code = self.broadcast(_attempt(make) if self.rank == 0 else None)
        if problem is not None:
            raise ConfigError(problem.split("\n"), code)
        return value

    def share(self, what: str, items: list[Any], make: Callable[[Any], Any]) -> list[Any]:
        """`make` of every item, JSON-able: each rank makes its part, in threads.

        What a rank raises is raised on all of them, so that none waits for another: one ConfigError with every problem,
        whose exit code is DataError's if that is all that is wrong.
        """
        pool = ThreadPoolExecutor(THREADS)
        try:
            own = [pool.submit(_attempt, make, item) for item in items[self.rank :: self.size]]
            while True:  # so that no collective waits for hours of work, which would be taken for a lost rank
                wait(own, self.heartbeat_s)
                done = sum(self.gather(sum(future.done() for future in own)))
                if done == len(items):
                    break
                self.told(what, done, len(items))
            parts = self.gather([future.result() for future in own])
        finally:  # a lost peer, a second Ctrl-C: what is not begun by then is nobody's business any more
            pool.shutdown(wait=False, cancel_futures=True)
        made = [parts[i % self.size][i // self.size] for i in range(len(items))]
        if problems := [(problem, code) for _, problem, code in made if problem is not None]:
            raise ConfigError(list(dict.fromkeys(p for p, _ in problems)), min(code for _, code in problems))
        return [value for value, _, _ in made]


ALONE = Team()


def _attempt(make: Callable[..., Any], *given: Any) -> list[Any]:
    try:
        return [make(*given), None, 0]
    except OnecurveError as error:
        return [None, str(error), error.exit_code]
    except OSError as error:  # such as too many open files
        known = advice(str(error))
        return [None, f"{error}: {known}" if known else str(error), OnecurveError.exit_code]
