"""Summarizes a run directory: its files as they are, and the run in a few numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import yaml

from trainer.errors import ConfigError
from trainer.secrets import masked, prose
from trainer.tracking.base import Row
from trainer.tracking.console import duration
from trainer.tracking.goodput import ATTEMPT_EVENTS, Goodput, goodput
from trainer.tracking.jsonl import read
from trainer.tracking.plot import label

SAMPLE_SHOWN = 20_000  # characters


class Figure(NamedTuple):
    """A headline figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Run:
    """The files of a run directory. Each of them may be missing."""

    name: str
    status: Row
    rows: list[Row]
    events: list[Row]
    config: str
    environment: Row
    sample: str
    time: Goodput | None

    @property
    def evaluations(self) -> dict[int, Row]:
        """Returns the evaluations by step."""
        return {row["step"]: row["eval"] for row in self.rows if row.get("eval")}

    @property
    def restarts(self) -> int:
        """Returns how often it resumed after it was killed or stopped; not how often a finished run was made longer."""
        kinds = [event["kind"] for event in self.events if event["kind"] in ATTEMPT_EVENTS]
        return sum(kind == "resume" and before != "finished" for before, kind in pairwise(["start", *kinds]))

    def count(self, kind: str) -> int:
        return sum(event["kind"] == kind for event in self.events)


def load(folder: Path) -> Run:
    """Reads a run directory.

    Raises:
        ConfigError: it is not a run directory, or one of its files is damaged.
    """
    if not any((folder / name).is_file() for name in ("status.json", "metrics.jsonl")):
        raise ConfigError(f"{folder}: not a run's folder (neither status.json nor metrics.jsonl is in it)")
    config = prose(_text(folder / "config.yaml"))  # earlier versions wrote secrets there and into events
    return Run(
        name=_name(folder / "config.yaml", config) or folder.resolve().name,
        status={"state": "unknown", **_json(folder / "status.json")},
        rows=read(folder / "metrics.jsonl"),
        events=masked(read(folder / "events.jsonl"), prose),
        config=config,
        environment=_json(folder / "environment.json"),
        sample=_text(folder / "samples.txt")[-SAMPLE_SHOWN:],
        time=goodput(folder),
    )


def headline(run: Run) -> list[Figure]:
    """Returns the run in a few numbers. Times and rates cover the steps that count, without lost work."""
    steps = run.status.get("steps")
    restarts, checkpoints = run.restarts, run.count("checkpoint")
    return [
        Figure("Steps", f"{run.rows[-1]['step'] if run.rows else 0:,}", f"of {steps:,}" if steps else ""),
        *(_trained(run) if run.rows else []),
        Figure("Restarts", f"{restarts}", f"{checkpoints} checkpoint" + "s" * (checkpoints != 1)),
    ]


def _trained(run: Run) -> list[Figure]:
    first, last = run.rows[0], run.rows[-1]
    seconds = max(sum(row["step_s"] for row in run.rows), 1e-9)
    data_wait_s = sum(row["data_wait_s"] for row in run.rows)
    return [
        Figure("Training loss", _number(last["loss"]), f"from {_number(first['loss'])}"),
        *_best(run.evaluations),
        Figure("Tokens", label(last["tokens"]), f"{label(last['samples'])} samples"),
        Figure(
            "Training time",
            duration(seconds),
            f"{_seconds(median(row['step_s'] for row in run.rows))} a step",
        ),
        Figure("Throughput", label(last["tokens"] / seconds), "tokens/s"),
        Figure("Waiting for data", f"{data_wait_s / seconds:.1%}", "of the training time"),
    ]


def _best(evaluations: dict[int, Row]) -> list[Figure]:
    """Returns the best validation loss, in nats a character if that was measured."""
    for key, unit in (("nats_per_char", "nats/char"), ("loss", "nats a target")):
        candidates = [values for values in evaluations.values() if values.get(key) is not None]
        if candidates:
            best = min(candidates, key=lambda values: values[key])
            bits = best.get("bits_per_byte")
            note = unit if bits is None else f"{unit}, {_number(bits)} bits/byte"
            return [Figure("Best validation", _number(best[key]), note)]
    return []


def _number(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.4f}"


def _seconds(value: float) -> str:
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def _name(path: Path, config: str) -> str | None:
    """Returns the run's name in its config, unresolved: interpolations of a foreign file are text."""
    try:
        tree = yaml.safe_load(config)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not YAML ({reason}); delete it to go on without it") from None
    match tree:
        case {"run": {"name": str(name)}}:
            return name
    return None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> Row:
    try:
        return json.loads(_text(path) or "{}")
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); delete it to go on without it") from None
