"""Shows the results of a sweep: a table on the terminal and one self-contained page, `sweep.html`, with the curves."""

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

MOST_CURVES = 8  # of the best trials; more cannot be told apart


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
    def sort_key(self) -> tuple[float, float]:
        """The better trial has the lower key."""
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
    last_row = run.rows[-1]
    seconds = sum(row["step_s"] for row in run.rows)
    best = min(evaluations, default=None)
    return Outcome(trial, state, last_row["step"], last_row["loss"], best, seconds, run)


def show(folder: Path) -> int:
    """Prints the table and writes the page. Raises ConfigError if it is not a sweep's folder."""
    from trainer.tracking.console import duration

    sweep = read(folder)
    outcomes = sorted(map(outcome, sweep.trials), key=lambda result: (result.sort_key, result.trial.number))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for key in sweep.swept:
        table.add_column(key, style="bold")
    for name in ("loss", "best eval", "steps", "time"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for result in outcomes:
        numbers = [_number(result.loss), _number(result.best), f"{result.step:,}", duration(result.seconds)]
        table.add_row(*(result.trial.values.get(key, "") for key in sweep.swept), *numbers, result.state)
    console = Console(markup=False, highlight=False, emoji=False)
    num_finished = sum(result.state == "finished" for result in outcomes)
    console.print(f"{num_finished} of {len(outcomes)} trials are finished", style="bold")
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
    """Yields plots with the curves of the best trials, the best first."""
    from trainer.tracking.plot import Plot, Series

    best = [(result, result.run) for result in outcomes if result.run and result.run.rows][:MOST_CURVES]
    last_step = max((run.rows[-1]["step"] for _, run in best), default=0)
    if not last_step:
        return
    evaluated, trained = [], []
    for number, (result, run) in enumerate(best):
        points: Points = [(step, values.get("loss")) for step, values in run.evaluations.items()]
        if points:
            evaluated.append(Series(result.trial.name, points, f"c{number}"))
        trained.append(Series(result.trial.name, [(row["step"], row["loss"]) for row in run.rows], f"c{number}"))
    if evaluated:
        yield Plot("Validation loss", "nats a target", evaluated, last_step, zero=False)
    yield Plot("Training loss", "nats a target", trained, last_step, zero=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
