"""`goodput.jsonl` summed up: where the time of a run went, over all its lives, and what took the most of it.

Between two lives the run was down, also for what a killed life had not written down; not where it was finished before,
and was made longer: that time is none of the run's. Work is lost when the run goes on
from a step before it: the lines behind that step then count as lost, and a line that straddles it in proportion.
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
LIFE = ("start", "resume", "finished", "interrupted", "failed")  # events of how an attempt began and ended
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
AGAINST = {
    "data_wait": "raise data.workers, or set data.processes=true where decoding keeps a core busy",
    "checkpoint": "save less often (checkpoint.every), and with checkpoint.asynchronous=true",
    "evaluation": "evaluate less often (eval.every), or on fewer batches (eval.steps)",
    "startup": "fewer and longer lives, and data.cache kept where each of them finds it",
    "lost": "save more often (checkpoint.every)",
    "down": "have the run started again at once: `onecurve train` does so by itself, Slurm with --requeue",
    "finishing": "draw fewer samples (sample.count), or leave out the report (track.report=false)",
}
_OF_NO_STEP = {"startup", "finishing"}  # never lost


@dataclass(frozen=True)
class Goodput:
    """Seconds by class. They sum to the time from the first birth to the last line, that in which it was finished left
    out."""

    seconds: dict[str, float]

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Goodput: what of the time was productive."""
        return self.seconds.get("productive", 0.0) / self.wall if self.wall else 0.0

    @property
    def table(self) -> list[tuple[str, str, str, float]]:
        """Kind, name, time and share of each class that took any, the productive one first, then the largest."""
        rest = sorted(self.seconds.items(), key=lambda item: (item[0] != "productive", -item[1]))
        return [
            (kind, NAMES.get(kind, kind), duration(spent), spent / self.wall)
            for kind, spent in rest
            if spent > 0 or kind == "productive"
        ]

    @property
    def sentence(self) -> str:
        """How much was productive, the largest thief of the rest, and what helps against it."""
        told = f"{self.share:.1%} of {duration(self.wall)} was productive."
        stolen = {kind: spent for kind, spent in self.seconds.items() if kind != "productive" and spent > 0}
        if not stolen:
            return told
        thief = max(stolen, key=lambda kind: stolen[kind])
        name = NAMES.get(thief, thief)
        advice = f": {AGAINST[thief]}" if thief in AGAINST else ""
        return f"{told} The largest thief: {name[0].lower()}{name[1:]}, {stolen[thief] / self.wall:.1%}{advice}."


def goodput(folder: Path) -> Goodput | None:
    """Returns the goodput of a run directory, None if none was recorded. Raises ConfigError if the file is damaged."""
    rows = read(folder / FILE)
    try:
        return Goodput(sum_up(rows, _ends(read(folder / EVENTS)))) if rows else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder / FILE}: not a ledger of time ({error}); delete it to go on without it") from None


def _ends(events: Sequence[Row]) -> list[tuple[datetime, bool]]:
    """When the run began, went on or ended, and whether it was finished from then on; in order."""
    ends = []
    for event in events:
        with suppress(KeyError, TypeError, ValueError, AttributeError):  # one that was written by hand
            if event["kind"] in LIFE:
                ends.append((_time(event), event["kind"] == "finished"))
    return ends


def _time(row: Row) -> datetime:
    return datetime.fromisoformat(row["time"].replace("Z", "+00:00"))


def sum_up(rows: Sequence[Row], ends: Sequence[tuple[datetime, bool]] = ()) -> dict[str, float]:
    """Seconds by class, of all lines together. `ends`: when the run began and ended, and whether it was finished."""
    totals: dict[str, float] = defaultdict(float)
    done: list[_Stretch] = []  # what counts so far
    life, ended, at = None, None, 0
    for number, row in enumerate(rows):
        seconds, told = dict(row["seconds"]), _time(row)
        born = number == 0 or row.get("life") != life or ("life" not in row and "startup" in seconds)
        if born and ended is not None:
            birth = told - timedelta(seconds=sum(seconds.values()))
            was_finished = next((finished for at, finished in reversed(ends) if at <= max(birth, ended)), False)
            totals["down"] += 0.0 if was_finished else max(0.0, (birth - ended).total_seconds())
        for kind in _OF_NO_STEP & seconds.keys():
            totals[kind] += seconds.pop(kind)
        life, ended, step = row.get("life"), told, int(row["step"])
        restored = bool(row.get("restored"))
        if restored or born:
            at = step if restored else step - 1  # lines without `restored` began after the first step
            totals["lost"] += _lose(done, at)
        if restored:
            totals["lost"] += sum(seconds.values())  # steps that no line tells of
        else:
            done.append(_Stretch(min(at, step), step, seconds))
        at = step
    for stretch in done:
        for kind, spent in stretch.seconds.items():
            totals[kind] += spent
    return dict(totals)


@dataclass
class _Stretch:
    """The steps after `first` up to `last`, and what they took."""

    first: int
    last: int
    seconds: dict[str, float]


def _lose(done: list[_Stretch], step: int) -> float:
    """Takes off what lies behind `step`, and gives its seconds."""
    lost = 0.0
    while done and (top := done[-1]).last > step and top.first >= step:
        lost += sum(done.pop().seconds.values())
    if not done:
        return lost
    if top.last > step:
        part = (top.last - step) / (top.last - top.first)
        lost += part * sum(top.seconds.values())
        top.seconds = {kind: (1 - part) * spent for kind, spent in top.seconds.items()}
        top.last = step
    elif top.first == top.last:  # what came to no step's end
        lost += sum(top.seconds.pop(kind, 0.0) for kind in ("productive", "data_wait"))
    return lost
