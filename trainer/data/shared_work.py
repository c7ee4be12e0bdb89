"""Work on a data set, shared out among the ranks: each does its part, all get all, and all hear what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.diagnosis import advice_for
from trainer.errors import ConfigError, OnecurveError, Outage
from trainer.outage import is_outage

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.topology import Topology

THREADS = 8
Problem = tuple[str | None, int, bool]
"""What is wrong (None: nothing), the exit code, and whether it is only that storage does not answer."""


@dataclass(frozen=True)
class WorkSharing:
    """This process among those that share the work. `gather`: its JSON-able value in, those of all ranks out.
    `broadcast`: the first rank's comes out. `report_progress`: what is called with (what is made, how many are done, of
    how many) while it takes long. `heartbeat_s`: a rank that has done its part waits no longer than this at a time."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    broadcast: Callable[[Any], Any] = lambda value: value
    report_progress: Callable[[str, int, int], None] = lambda what, done, total: None
    heartbeat_s: float = 10.0

    def run_on_first(self, make: Callable[[], Any]) -> Any:
        """What `make` gives the first rank, JSON-able, on all of them; also what it raises, as a ConfigError."""
        value, *problem = self.broadcast(_attempt(make) if self.rank == 0 else None)
        raise_problems([tuple(problem)])
        return value

    def share(self, what: str, items: list[Any], make: Callable[[Any], Any]) -> list[Any]:
        """`make` of every item, JSON-able: each rank makes its part, in threads.

        What a rank raises is raised on all of them, so that none waits for another, as by `raise_problems`.
        """
        pool = ThreadPoolExecutor(THREADS)
        try:
            own = [pool.submit(_attempt, make, item) for item in items[self.rank :: self.size]]
            while True:  # so that no collective waits for hours of work, which would be taken for a lost rank
                wait(own, self.heartbeat_s)
                done = sum(self.gather(sum(future.done() for future in own)))
                if done == len(items):
                    break
                self.report_progress(what, done, len(items))
            parts = self.gather([future.result() for future in own])
        finally:  # a lost peer, a second Ctrl-C: what is not begun by then is nobody's business any more
            pool.shutdown(wait=False, cancel_futures=True)
        made = [parts[i % self.size][i // self.size] for i in range(len(items))]
        raise_problems([tuple(problem) for _, *problem in made])
        return [value for value, *_ in made]


ALONE = WorkSharing()


def team_of(config: Config, topology: Topology) -> WorkSharing:
    """Returns the run's ranks as those who share work; the main one prints how far it is."""

    def tell(what: str, done: int, total: int) -> None:
        if topology.is_main:
            print(f"{what:27} {done:,}/{total:,}", file=sys.stderr, flush=True)

    heartbeat_s = min(10.0, config.launch.timeout_s / 3)
    return WorkSharing(topology.rank, topology.world_size, topology.gather, topology.broadcast, tell, heartbeat_s)


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raises one error with every problem, if there are any: an Outage if nothing else is wrong, so that it is tried
    again; else a ConfigError, whose exit code is DataError's if damage is all that is wrong."""
    found = [problem for problem in problems if problem[0] is not None]
    texts = list(dict.fromkeys(line for text, _, _ in found if text for line in text.split("\n")))
    if found and all(is_away for _, _, is_away in found):
        raise Outage("\n".join(texts), min(code for _, code, _ in found))
    if found:
        raise ConfigError(texts, min(code for _, code, _ in found))


def problem_of(error: OnecurveError | OSError) -> Problem:
    """Returns what went wrong on a rank, as all of them may hear it."""
    if isinstance(error, OnecurveError):
        return str(error), error.exit_code, isinstance(error, Outage)
    known = advice_for(str(error))  # such as too many open files
    return f"{error}: {known}" if known else str(error), OnecurveError.exit_code, is_outage(error)


def _attempt(make: Callable[..., Any], *given: Any) -> list[Any]:
    try:
        return [make(*given), None, 0, False]
    except (OnecurveError, OSError) as error:
        return [None, *problem_of(error)]
