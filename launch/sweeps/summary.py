"""What came of a sweep: a table on the terminal and one self-contained page, `sweep.html`, with the curves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from launch.liveness import dead_since
from launch.sweeps.trials import Sweep, Trial, read
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.tracking.plot import Plot, Points
    from trainer.tracking.summary import Run

DRAWN = 8  # curves, of the best trials; more cannot be told apart


@dataclass(frozen=True)
class Outcome:
    """The outcome of one trial; None is not known (yet). `loss` is the last step's, `best` its lowest evaluation
    (nats)."""

    trial: Trial
    state: str
    step: int = 0
    loss: float | None = None
    best: float | None = None
    seconds: float = 0.0
    run: Run | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """The better, the lower."""
        return tuple(math.inf if value is None else value for value in (self.best, self.loss))  # type: ignore[return-value]


def outcome(trial: Trial) -> Outcome:
    """Returns a trial's outcome from the files in its run directory."""
    from trainer.tracking.summary import load

    folder = Path(trial.folder)
    if not any((folder / name).is_file() for name in ("status.json", "metrics.jsonl")):
        return Outcome(trial, "not started")
    try:
        run = load(folder)
    except ConfigError:
        return Outcome(trial, "damaged")
    state = "dead" if dead_since(folder) is not None else str(run.status["state"])
    evaluations = [values["loss"] for values in run.evaluations.values() if values.get("loss") is not None]
    if not run.rows:
        return Outcome(trial, state, run=run)
    last = run.rows[-1]
    seconds = sum(row["step_s"] for row in run.rows)
    best = min(evaluations, default=None)
    return Outcome(trial, state, last["step"], last["loss"], best, seconds, run)


def show(folder: Path) -> int:
    """Prints the table, writes the page. Raises ConfigError: it is not a sweep's folder."""
    from trainer.tracking.console import duration

    sweep = read(folder)
    outcomes = sorted(map(outcome, sweep.trials), key=lambda one: (one.rank, one.trial.number))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for key in sweep.swept:
        table.add_column(key, style="bold")
    for name in ("loss", "best eval", "steps", "time"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for one in outcomes:
        numbers = [_number(one.loss), _number(one.best), f"{one.step:,}", duration(one.seconds)]
        table.add_row(*(one.trial.values.get(key, "") for key in sweep.swept), *numbers, one.state)
    console = Console(markup=False, highlight=False, emoji=False)
    finished = sum(one.state == "finished" for one in outcomes)
    console.print(f"{finished} of {len(outcomes)} trials are finished", style="bold")
    console.print(table)
    console.print(str(write_page(sweep, outcomes)), soft_wrap=True)
    return 0


def write_page(sweep: Sweep, outcomes: list[Outcome]) -> Path:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    from trainer.files import replace_file
    from trainer.tracking.console import duration

    loader = ChoiceLoader([PackageLoader("launch.sweeps", "."), PackageLoader("trainer.tracking", ".")])
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = pages.get_template("sweep.html").render(
        sweep=sweep,
        outcomes=outcomes,
        plots=list(plots(outcomes)),
        number=_number,
        duration=duration,
        name=sweep.folder.resolve().name,
    )
    replace_file(sweep.folder / "sweep.html", text.encode(errors="replace"))
    return sweep.folder / "sweep.html"


def plots(outcomes: list[Outcome]) -> Iterator[Plot]:
    """The curves of the best trials, first the best."""
    from trainer.tracking.plot import Plot, Series

    drawn = [(one, one.run) for one in outcomes if one.run and one.run.rows][:DRAWN]
    last = max((run.rows[-1]["step"] for _, run in drawn), default=0)
    if not last:
        return
    evaluated, trained = [], []
    for number, (one, run) in enumerate(drawn):
        points: Points = [(step, values.get("loss")) for step, values in run.evaluations.items()]
        if points:
            evaluated.append(Series(one.trial.name, points, f"c{number}"))
        trained.append(Series(one.trial.name, [(row["step"], row["loss"]) for row in run.rows], f"c{number}"))
    if evaluated:
        yield Plot("Validation loss", "nats a target", evaluated, last, zero=False)
    yield Plot("Training loss", "nats a target", trained, last, zero=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
