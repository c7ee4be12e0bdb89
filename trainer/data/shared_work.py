"""Work on a data set, shared among the ranks: each does its part, and all get all results and all errors."""

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
"""What is wrong (None: nothing), the exit code, and whether the only problem is that storage does not answer."""


@dataclass(frozen=True)
class WorkSharing:
    """Shares work among ranks; this process is rank `rank` of `size`. `gather`: takes this rank's JSON-able value,
    returns those of all ranks. `broadcast`: returns the first rank's value. `report_progress`: called with (task,
    number done, total) while work takes long. `heartbeat_s`: the longest wait at a time of a rank that has done its
    part."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    broadcast: Callable[[Any], Any] = lambda value: value
    report_progress: Callable[[str, int, int], None] = lambda task, done, total: None
    heartbeat_s: float = 10.0

    def run_on_first(self, make: Callable[[], Any]) -> Any:
        """Calls `make` on the first rank; returns its JSON-able result, or raises its error as a ConfigError, on all
        ranks."""
        value, *problem = self.broadcast(_attempt(make) if self.rank == 0 else None)
        raise_problems([tuple(problem)])
        return value

    def share(self, task: str, items: list[Any], make: Callable[[Any], Any]) -> list[Any]:
        """Returns `make` of every item, JSON-able: each rank calls it for its part, in threads.

        Errors of a rank are raised on all ranks by `raise_problems`, so that none waits for another.
        """
        pool = ThreadPoolExecutor(THREADS)
        try:
            local_futures = [pool.submit(_attempt, make, item) for item in items[self.rank :: self.size]]
            while True:  # so that no collective waits for hours of work, which would be taken for a lost rank
                wait(local_futures, self.heartbeat_s)
                done = sum(self.gather(sum(future.done() for future in local_futures)))
                if done == len(items):
                    break
                self.report_progress(task, done, len(items))
            parts = self.gather([future.result() for future in local_futures])
        finally:  # after a lost peer or a second Ctrl-C: drop what has not started
            pool.shutdown(wait=False, cancel_futures=True)
        results = [parts[i % self.size][i // self.size] for i in range(len(items))]
        raise_problems([tuple(problem) for _, *problem in results])
        return [value for value, *_ in results]


ALONE = WorkSharing()


def team_of(config: Config, topology: Topology) -> WorkSharing:
    """Returns the work sharing among the run's ranks; the main rank prints progress."""

    def print_progress(task: str, done: int, total: int) -> None:
        if topology.is_main:
            print(f"{task:27} {done:,}/{total:,}", file=sys.stderr, flush=True)

    heartbeat_s = min(10.0, config.launch.timeout_s / 3)
    return WorkSharing(
        topology.rank, topology.world_size, topology.gather, topology.broadcast, print_progress, heartbeat_s
    )


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raises one error with every problem, if there are any: an Outage, which is retried, if storage is all that is
    wrong; else a ConfigError, whose exit code is DataError's if damage is all that is wrong."""
    actual_problems = [problem for problem in problems if problem[0] is not None]
    texts = list(dict.fromkeys(line for text, _, _ in actual_problems if text for line in text.split("\n")))
    if actual_problems and all(is_away for _, _, is_away in actual_problems):
        raise Outage("\n".join(texts), min(code for _, code, _ in actual_problems))
    if actual_problems:
        raise ConfigError(texts, min(code for _, code, _ in actual_problems))


def problem_of(error: OnecurveError | OSError) -> Problem:
    """Returns an error as a problem that can be sent to all ranks."""
    if isinstance(error, OnecurveError):
        return str(error), error.exit_code, isinstance(error, Outage)
    advice = advice_for(str(error))  # such as too many open files
    return f"{error}: {advice}" if advice else str(error), OnecurveError.exit_code, is_outage(error)


def _attempt(make: Callable[..., Any], *arguments: Any) -> list[Any]:
    try:
        return [make(*arguments), None, 0, False]
    except (OnecurveError, OSError) as error:
        return [None, *problem_of(error)]
