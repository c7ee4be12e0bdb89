"""Shows the run on the terminal: one live line with a bar, or a plain line at every flush if output is piped."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from trainer.tracking.base import Row, RunInfo
from trainer.tracking.jsonl import display_text

COLORS = {
    "failed": "red",
    "interrupted": "yellow",
    "resume": "cyan",
    "finished": "green",
}
WIDTH = 200  # characters of a value
RECENT = 50  # steps that the remaining time is estimated from


class _Output(RichConsole):
    """rich's console, but it does not end the process when the reader of a pipe is gone."""

    def on_broken_pipe(self) -> None:
        """Raises the BrokenPipeError; drops unwritten output, otherwise Python would exit with code 120."""
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())
        raise


class Console:
    """Shows the steps; events and evaluations stay on screen above the live line."""

    def __init__(self, file: TextIO | None = None):
        self.console = _Output(file=file or sys.stdout, markup=False, highlight=False, emoji=False)
        self.seconds: deque[float] = deque(maxlen=RECENT)
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def start(self, info: RunInfo) -> None:
        self.steps = info.steps
        if self.console.is_terminal:
            self.bar = Progress(
                BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6)),
                TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=True)),
                console=self.console,
                auto_refresh=False,  # no extra thread during training
                expand=True,
            )
            self.task = self.bar.add_task("", total=info.steps, completed=info.step, line="")
            self.bar.start()

    def rows(self, rows: list[Row]) -> None:
        if not rows:
            return
        for row in rows:
            self.seconds.append(row["step_s"])
            if row.get("eval"):
                self._evaluation(row["step"], row["eval"])
        last = rows[-1]
        remaining = (self.steps - last["step"]) * sum(self.seconds) / len(self.seconds)
        if self.bar:  # what matters most comes first: a narrow terminal cuts the end off
            parts = [f"{last['step']}/{self.steps}", f"eta {duration(remaining)}", *_parts(rows)]
            line = "  ".join(" ".join(part.split()) for part in parts)
            self.bar.update(self.task, completed=last["step"], line=line, refresh=True)
        else:
            step = f"step {last['step']:{len(str(self.steps))}}/{self.steps}"
            self._print(Text("  ".join([step, *_parts(rows), f"eta {duration(remaining)}"])))

    def event(self, event: Row) -> None:
        # The code that ends the process prints the reason in a block of its own.
        hidden = {"time", "kind", "step", *(["reason"] if event["kind"] in ("failed", "interrupted") else [])}
        fields = {name: value for name, value in event.items() if name not in hidden}
        parts = [f"{name} {_short(value)}" for name, value in fields.items()]
        self._print_event(event["kind"], event.get("step"), parts)

    def close(self, status: Row) -> None:
        if self.bar:
            self.bar.stop()

    def _evaluation(self, step: int, values: Row) -> None:
        texts = {
            "loss": "loss {:.4f}",
            "nats_per_char": "{:.4f} nats/char",
            "bits_per_byte": "{:.4f} bits/byte",
            "sequences": "{} sequences",
        }
        parts = [text.format(values[name]) for name, text in texts.items() if values.get(name) is not None]
        self._print_event("evaluation", step, parts)

    def _print_event(self, kind: str, step: int | None, parts: list[str]) -> None:
        text = Text(f"{kind:<11}", style=COLORS.get(kind, "magenta"))
        text.append("  ".join(["" if step is None else f" step {step}", *parts]), style="default")
        self._print(text)

    def _print(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)


def duration(seconds: float) -> str:
    """Formats seconds as `1:02:03` or `02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute:02}:{second:02}"


def _parts(rows: list[Row]) -> Iterator[str]:
    """Yields loss, norm and rate of the newest row, speed and waiting over all rows; each in a fixed width."""
    last, seconds = rows[-1], sum(row["step_s"] for row in rows)
    tokens = sum(row["tokens_per_s"] * row["step_s"] for row in rows)
    yield f"loss {last['loss']:7.4f}"
    yield f"norm {last['grad_norm']:7.3f}"
    yield f"lr {last['lr']:.2e}"
    yield f"{tokens / max(seconds, 1e-9):9,.0f} tok/s"
    yield f"data {sum(row['data_wait_s'] for row in rows) / max(seconds, 1e-9):6.1%}"
    if last.get("mfu") is not None:
        yield f"mfu {last['mfu']:6.1%}"
    if last.get("mem_gib") is not None:
        yield f"mem {last['mem_gib']:6.2f} GiB"
    if skipped := sum(bool(row.get("skipped")) for row in rows):
        yield f"skipped {skipped}"


def _short(value: Any) -> str:
    text = f"{value:.4g}" if type(value) is float else display_text(value)
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
