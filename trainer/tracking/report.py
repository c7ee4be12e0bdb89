"""Writes report.html: a run directory as one self-contained page; no network, JavaScript for tooltips only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from trainer.files import replace_file
from trainer.tracking.base import Row
from trainer.tracking.jsonl import display_text
from trainer.tracking.plot import Mark, Plot, Points, Series, smooth
from trainer.tracking.summary import Run, headline, load

EVENTS_SHOWN = 200
SMOOTHED_FROM = 100  # steps


def write_report(folder: Path, run: Run | None = None) -> Path:
    """Writes `report.html` into a run directory from its files, and returns the path.

    `run` is the result of `load`, if the caller has it.

    Raises:
        ConfigError: it is not a run's folder, or one of its files is damaged.
    """
    run = run or load(folder)
    pages = Environment(
        loader=PackageLoader("trainer.tracking", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = pages.get_template("report.html").render(
        run=run,
        figures=headline(run),
        plots=list(plots(run)),
        environment=list(_flat(run.environment)),
        events=[(event, _details(event)) for event in run.events[-EVENTS_SHOWN:]],
    )
    replace_file(folder / "report.html", text.encode(errors="replace"))
    return folder / "report.html"


def plots(run: Run) -> Iterator[Plot]:
    """Yields the plots of the page; none before the first step."""
    rows = run.rows
    if not rows:
        return
    last = rows[-1]["step"]

    def trained(name: str, value: Callable[[Row], float | None]) -> list[Series]:
        points: Points = [(row["step"], value(row)) for row in rows]
        if len(points) < SMOOTHED_FROM:
            return [Series(name, points)]
        return [Series(name, points, "faint"), Series("smoothed", smooth(points))]

    def evaluated(key: str) -> list[Series]:
        points: Points = [(step, values[key]) for step, values in run.evaluations.items() if key in values]
        return [Series("validation", points, "second")] if points else []

    validation, by_character = evaluated("loss"), evaluated("nats_per_char")
    differs = by_character != validation  # they are the same when a token is a character
    loss = trained("training", lambda row: row["loss"]) + validation
    yield Plot("Loss", "nats a target", loss, last, zero=False, marks=_marks(run.events))
    if by_character and differs:
        yield Plot("Validation", "nats a character", by_character, last, zero=False)
    rate: Points = [(row["step"], row["lr"]) for row in rows]
    yield Plot("Learning rate", "", [Series("learning rate", rate)], last)
    yield Plot("Gradient norm", "before clipping", trained("norm", lambda row: row["grad_norm"]), last)
    yield Plot("Throughput", "tokens/s", trained("tokens/s", lambda row: row["tokens_per_s"]), last)
    yield Plot("Waiting for data", "% of the step", trained("share", _waiting), last)


def _marks(events: list[Row]) -> list[Mark]:
    """Returns the marks of where the run was resumed and saved."""
    looks = {"checkpoint": "checkpoint", "resume": "restart"}
    return [(e["step"], looks[e["kind"]], f"{e['kind']}, step {e['step']}") for e in events if e["kind"] in looks]


def _waiting(row: Row) -> float | None:
    return 100 * row["data_wait_s"] / row["step_s"] if row["step_s"] else None


def _details(event: Row) -> str:
    fields = {name: value for name, value in event.items() if name not in ("time", "kind", "step")}
    return " · ".join(f"{name} {display_text(value)}" for name, value in fields.items())


def _flat(tree: Row, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", display_text(value)
