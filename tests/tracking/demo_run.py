"""A run's folder as a training run leaves it, written through the real recorder: for tests and to look at."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainer.tracking import JsonlTracker, write_status
from trainer.tracking.base import Row, RunInfo
from trainer.tracking.goodput import FILE
from trainer.tracking.run_files import RunFiles

TOKENS = 16 * 1024  # a step

ENVIRONMENT = {
    "python": "3.12.4",
    "torch": "2.13.0",
    "strategy": "fsdp",
    "topology": {"processes": 4, "data_parallel": 4, "devices": "4 x NVIDIA H100 80GB HBM3"},
    "git": {"commit": "3f9c2e1", "dirty": False},
}

SAMPLE = """\
KING RICHARD II:
Alack the heavy day, that I should stand
And hear my sorrow spoken by the sea;
The night is older than the crown I wear.

DUKE OF YORK:
My lord, the men of Wales are gone abroad,
And what they leave behind them is the wind.
"""


def info(folder: Path, **changes: Any) -> RunInfo:
    born = RunInfo(folder.name, folder, steps=100, step=0, config={}, environment=ENVIRONMENT)
    return replace(born, **changes)


def row(step: int, **changes: Any) -> Row:
    """The row of a step on a made-up, falling curve."""
    dice = random.Random(step)
    rate = 1e-3 * min(step / 100, 1.0) * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * min(step / 2000, 1.0))))
    seconds = 0.118 + abs(dice.gauss(0, 0.004)) + (0.9 if step == 1 else 0)
    waited = abs(dice.gauss(0.0008, 0.0012)) + (0.03 if dice.random() < 0.01 else 0)
    return {
        "step": step,
        "loss": 1.36 + 2.9 * math.exp(-step / 90) + 0.75 * math.exp(-step / 700) + dice.gauss(0, 0.03),
        "grad_norm": 0.35 + 2.5 * math.exp(-step / 60) + abs(dice.gauss(0, 0.09)),
        "lr": rate,
        "tokens": step * TOKENS,
        "samples": step * 64,
        "step_s": seconds,
        "data_wait_s": waited,
        "tokens_per_s": TOKENS / seconds,
        "skipped": False,
        **changes,
    }


def evaluation(step: int) -> Row:
    loss = 1.47 + 2.9 * math.exp(-step / 90) + 0.75 * math.exp(-step / 700)
    return {"loss": loss, "nats_per_char": loss, "bits_per_byte": loss / math.log(2), "sequences": 436}


def demo_run(folder: Path, steps: int = 2000, done: int | None = None, name: str = "shakespeare") -> Path:
    """Writes the folder of a run of `steps`, killed once and resumed, and stopped at `done` if given."""
    start, last = datetime(2026, 3, 14, 9, 26, 53, tzinfo=timezone.utc), steps if done is None else done
    record = JsonlTracker(folder)

    def tell(step: int, kind: str, **fields: Any) -> None:
        time = (start + timedelta(seconds=0.123 * step)).isoformat().replace("+00:00", "Z")
        record.event({"time": time, "kind": kind, "step": step, **fields})

    def train(first: int, end: int) -> None:
        for step in range(first, end + 1):
            evaluated = {"eval": evaluation(step)} if step % max(1, steps // 20) == 0 else {}
            record.rows([row(step, **evaluated)])
            if step % max(1, steps // 10) == 0:
                tell(step, "checkpoint", path=f"checkpoints/step-{step:08}", seconds=0.21)

    killed = last * 11 // 20
    saved = killed - killed % max(1, steps // 10)
    record.start(info(folder, name=name, steps=steps))
    tell(0, "start", strategy="fsdp", processes=4)
    train(1, killed)
    record.start(info(folder, name=name, steps=steps, step=saved))
    tell(saved, "resume", strategy="ddp", processes=2, checkpoint=f"checkpoints/step-{saved:08}")
    train(saved + 1, last)
    state = "finished" if last == steps else "interrupted"
    reason = "" if last == steps else "SIGTERM; run the same command again to go on"
    ended = _spend_time(folder, saved, killed, last)
    status = {"state": state, "step": last, "steps": steps, "reason": reason}
    record.event({"time": ended, "kind": state, "step": last})
    record.close(status)
    write_status(folder, status)
    config = {"run": {"name": name, "seed": 1}, "train": {"steps": steps, "global_batch": 64}}
    OmegaConf.save(config, folder / "config.yaml")
    (folder / "samples.txt").write_text(SAMPLE)
    return folder


def _spend_time(folder: Path, saved: int, killed: int, last: int) -> str:
    """Writes the ledger of time of such a run, with lines of 20 steps. Returns when it ended."""
    at, start, file = 0.0, datetime(2026, 3, 14, 9, 26, 40, tzinfo=timezone.utc), RunFiles(folder).open_appender(FILE)

    def tell(life: str, step: int, seconds: Row, **more: Any) -> None:
        nonlocal at
        at += sum(seconds.values())
        told = (start + timedelta(seconds=at)).isoformat()
        file.append([{"time": told, "life": life, "step": step, **more, "seconds": seconds}])

    for life, first, end in (("3f9c2e1a", 0, killed), ("b07d44f2", saved, last)):
        tell(life, first, {"startup": 13.2}, restored=True)
        for step in range(first + 1, end + 1):
            if step % 20 == 0 or step == end:
                tell(life, step, {"productive": 2.3, "data_wait": 0.11, "checkpoint": 0.03, "evaluation": 0.02})
        at += 41.0
    at -= 41.0
    tell(life, last, {"finishing": 4.6})
    return (start + timedelta(seconds=at)).isoformat()


if __name__ == "__main__":
    from trainer.tracking.report import write_report

    print(write_report(demo_run(Path(sys.argv[1]))))
