"""Trains in the calling process, such as a notebook, a test or a program."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.errors import Interrupted
from trainer.resilience import interruption
from trainer.tracking.jsonl import last, read_status


@dataclass(frozen=True)
class Result:
    """How a run ended: `status` is finished or interrupted, `metrics` the last row of its metrics.jsonl."""

    status: str
    step: int
    metrics: dict[str, Any]
    folder: Path


def run(config: Config) -> Result:
    """Trains as `config` says, in this process alone or as a rank of torchrun's; goes on with the run in its folder.

    Signals make it save and stop; their handlers are restored at the end. Raises OnecurveError: ConfigError where
    nothing was started, DataError, TrainingError.
    """
    from trainer.run import run as train

    with _restore_signals(), suppress(Interrupted):
        train(config, time.monotonic())
    folder = Path(config.run.dir).expanduser()
    status = read_status(folder)
    return Result(str(status.get("state")), int(status.get("step", 0)), last(folder / "metrics.jsonl") or {}, folder)


@contextmanager
def _restore_signals() -> Iterator[None]:
    handlers = interruption.handlers()
    try:
        yield
    finally:
        interruption.stop_listening(handlers)
