"""Progress bars on stderr, on a terminal only: files and pipes get nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ReportProgress = Callable[[str, int, int], None]


@contextmanager
def progress() -> Iterator[ReportProgress]:
    """Yields a function of a name, how much of it is done and how much there is, which shows a bar for each name."""
    if not sys.stderr.isatty():
        yield lambda name, num_done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    # What is printed meanwhile belongs above the bar, but only if it goes to the same terminal.
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as bars:
        tasks: dict[str, int] = {}

        def report(name: str, num_done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = int(bars.add_task(name))
            bars.update(tasks[name], completed=num_done, total=total)  # type: ignore[arg-type]

        yield report
