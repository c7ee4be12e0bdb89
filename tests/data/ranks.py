"""Several ranks as threads of one process, for what needs no process group of torch."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

from trainer.data.shared_work import ALONE, WorkSharing


def on_ranks(
    size: int,
    make: Callable[[WorkSharing], Any],
    told: Callable[[str, int, int], None] | None = None,
    heartbeat_s: float = 10.0,
) -> list[Any]:
    """What `make(team)` gives or raises on each of `size` ranks that run at once."""
    barrier, places, results = threading.Barrier(size), [None] * size, [None] * size

    def rank(number: int) -> None:
        def gather(value: Any) -> list[Any]:
            places[number] = json.loads(json.dumps(value))
            barrier.wait(30)
            everything = list(places)
            barrier.wait(30)
            return everything

        try:
            team = WorkSharing(
                number, size, gather, lambda value: gather(value)[0], told or ALONE.report_progress, heartbeat_s
            )
            results[number] = make(team)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
