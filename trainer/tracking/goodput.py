"""Sums up `goodput.jsonl`: where the time of a run went over all its attempts, and which class took the most.

Between two attempts the run was down, which includes time that a killed attempt had not recorded. Time after a run was
finished, until it was made longer, does not count. Work is lost when the run resumes from an earlier step: the lines
after that step then count as lost, and a line that straddles it in proportion.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from trainer.errors import ConfigError
from trainer.tracking.base import Row
from trainer.tracking.console import duration
from trainer.tracking.jsonl import read

FILE, EVENTS = "goodput.jsonl", "events.jsonl"
ATTEMPT_EVENTS = ("start", "resume", "finished", "interrupted", "failed")  # at the start and the end of an attempt
NAMES = {
    "productive": "Productive",
    "data_wait": "Waiting for data",
    "checkpoint": "Waiting for checkpoints",
    "evaluation": "Evaluation",
    "startup": "Start-up",
    "lost": "Lost work",
    "down": "Down",
    "finishing": "Finishing",
}
REMEDIES = {
    "data_wait": "raise data.workers, or set data.processes=true where decoding keeps a core busy",
    "checkpoint": "save less often (checkpoint.every), and with checkpoint.asynchronous=true",
    "evaluation": "evaluate less often (eval.every), or on fewer batches (eval.steps)",
    "startup": "fewer and longer attempts, and data.cache kept where each of them finds it",
    "lost": "save more often (checkpoint.every)",
    "down": "have the run started again at once: `onecurve train` does so by itself, Slurm with --requeue",
    "finishing": "draw fewer samples (sample.count), or leave out the report (track.report=false)",
}
_OF_NO_STEP = {"startup", "finishing"}  # never lost


@dataclass(frozen=True)
class Goodput:
    """Seconds by class. They add up to the time from the first start to the last line, without time after it was
    finished."""

    seconds: dict[str, float]

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Returns the goodput: the productive share of the time."""
        return self.seconds.get("productive", 0.0) / self.wall if self.wall else 0.0

    @property
    def table(self) -> list[tuple[str, str, str, float]]:
        """Returns kind, name, time and share of each class that took time: the productive one, then by size."""
        classes = sorted(self.seconds.items(), key=lambda item: (item[0] != "productive", -item[1]))
        return [
            (kind, NAMES.get(kind, kind), duration(seconds), seconds / self.wall)
            for kind, seconds in classes
            if seconds > 0 or kind == "productive"
        ]

    @property
    def sentence(self) -> str:
        """Returns a sentence: the productive share, the largest overhead, and how to reduce it."""
        text = f"{self.share:.1%} of {duration(self.wall)} was productive."
        overheads = {kind: seconds for kind, seconds in self.seconds.items() if kind != "productive" and seconds > 0}
        if not overheads:
            return text
        largest = max(overheads, key=lambda kind: overheads[kind])
        name = NAMES.get(largest, largest)
        advice = f": {REMEDIES[largest]}" if largest in REMEDIES else ""
        return (
            f"{text} The largest overhead: {name[0].lower()}{name[1:]}, {overheads[largest] / self.wall:.1%}{advice}."
        )


def goodput(folder: Path) -> Goodput | None:
    """Returns the goodput of a run directory, None if none was recorded. Raises ConfigError if the file is damaged."""
    rows = read(folder / FILE)
    try:
        return Goodput(sum_up(rows, _ends(read(folder / EVENTS)))) if rows else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder / FILE}: not a ledger of time ({error}); delete it to go on without it") from None


def _ends(events: Sequence[Row]) -> list[tuple[datetime, bool]]:
    """Returns when the run started, resumed or ended, and whether it was finished from then on; in order."""
    ends = []
    for event in events:
        with suppress(KeyError, TypeError, ValueError, AttributeError):  # an event that was written by hand
            if event["kind"] in ATTEMPT_EVENTS:
                ends.append((_time(event), event["kind"] == "finished"))
    return ends


def _time(row: Row) -> datetime:
    return datetime.fromisoformat(row["time"].replace("Z", "+00:00"))


def sum_up(rows: Sequence[Row], ends: Sequence[tuple[datetime, bool]] = ()) -> dict[str, float]:
    """Returns the seconds by class over all lines. `ends`: when the run started and ended, and if it was finished."""
    totals: dict[str, float] = defaultdict(float)
    done: list[_Stretch] = []  # the stretches that count so far
    attempt, last_recorded_at, at = None, None, 0
    for number, row in enumerate(rows):
        seconds, recorded_at = dict(row["seconds"]), _time(row)
        is_new_attempt = number == 0 or row.get("life") != attempt or ("life" not in row and "startup" in seconds)
        if is_new_attempt and last_recorded_at is not None:
            start = recorded_at - timedelta(seconds=sum(seconds.values()))
            was_finished = next(
                (finished for at, finished in reversed(ends) if at <= max(start, last_recorded_at)), False
            )
            totals["down"] += 0.0 if was_finished else max(0.0, (start - last_recorded_at).total_seconds())
        for kind in _OF_NO_STEP & seconds.keys():
            totals[kind] += seconds.pop(kind)
        attempt, last_recorded_at, step = row.get("life"), recorded_at, int(row["step"])
        restored = bool(row.get("restored"))
        if restored or is_new_attempt:
            at = step if restored else step - 1  # lines without `restored` began after the first step
            totals["lost"] += _lose(done, at)
        if restored:
            totals["lost"] += sum(seconds.values())  # steps that no line records
        else:
            done.append(_Stretch(min(at, step), step, seconds))
        at = step
    for stretch in done:
        for kind, amount in stretch.seconds.items():
            totals[kind] += amount
    return dict(totals)


@dataclass
class _Stretch:
    """The steps after `first` up to `last`, and their time."""

    first: int
    last: int
    seconds: dict[str, float]


def _lose(done: list[_Stretch], step: int) -> float:
    """Removes the stretches after `step`, and returns their seconds."""
    lost_seconds = 0.0
    while done and (top := done[-1]).last > step and top.first >= step:
        lost_seconds += sum(done.pop().seconds.values())
    if not done:
        return lost_seconds
    if top.last > step:
        part = (top.last - step) / (top.last - top.first)
        lost_seconds += part * sum(top.seconds.values())
        top.seconds = {kind: (1 - part) * amount for kind, amount in top.seconds.items()}
        top.last = step
    elif top.first == top.last:  # time that completed no step
        lost_seconds += sum(top.seconds.pop(kind, 0.0) for kind in ("productive", "data_wait"))
    return lost_seconds
