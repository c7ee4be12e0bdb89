"""Weights & Biases without a server that works: the run does not wait, and everything is on this disk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.tracking import wandb_server
from tests.tracking.demo_run import row
from tests.tracking.test_wandb import inspect, nobody, of_kind
from trainer.tracking.jsonl import read
from trainer.tracking.wandb import wandb_names

__all__ = ["nobody"]  # a fixture that holds for every test here

STEPS = 200
SCRIPT = f"""
import json, sys, time
from pathlib import Path
from tests.tracking.demo_run import info, row
from trainer.tracking import JsonlTracker, Trackers
from trainer.tracking import wandb
from trainer.tracking.background_writer import BackgroundWriter

wandb.FINISH_S = 5.0
folder, step_s = Path(sys.argv[1]), float(sys.argv[2])
trackers = Trackers(JsonlTracker(folder), [BackgroundWriter(wandb.WandB("auto"))])
begun = time.perf_counter()
trackers.start(info(folder, steps={STEPS}))
started, spent = time.perf_counter() - begun, []
for step in range(1, {STEPS} + 1):
    time.sleep(step_s)
    begun = time.perf_counter()
    trackers.rows([row(step)])
    spent.append(time.perf_counter() - begun)
begun = time.perf_counter()
trackers.close({{"state": "finished"}})
closed = time.perf_counter() - begun
print(json.dumps({{"start": started, "rows": sum(spent), "longest": max(spent), "close": closed}}))
"""


def track(
    folder: Path, environment: Callable[[str, str], None], url: str, step_s: float
) -> tuple[dict[str, float], str]:
    """Seconds of each call, and what was told on stderr; of a process of its own."""
    environment("WANDB_API_KEY", "0" * 40)
    environment("WANDB_BASE_URL", url)
    environment("WANDB_INIT_TIMEOUT", "3")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SCRIPT, str(folder), str(step_s)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=100, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("server", "step_s"),
    [
        (wandb_server.silent, 0.0),
        (wandb_server.silent, 0.05),
        (wandb_server.failing, 0.0),
        (wandb_server.unknown, 0.0),
    ],
)
def test_a_server_that_does_not_work_costs_the_run_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: Callable[[], AbstractContextManager[str]],
    step_s: float,
) -> None:
    """With steps that are over before the server was given up, and with steps that go on behind that."""
    with server() as url:
        took, told = track(tmp_path / "run", monkeypatch.setenv, url, step_s)
    print(server.__name__, {name: round(seconds, 4) for name, seconds in took.items()})  # -s: figures
    assert took["rows"] < 0.5
    assert took["longest"] < 0.2
    assert told.count("cannot go online, logging offline") == 1
    assert told.count("wandb sync") == 1
    assert [found["step"] for found in read(tmp_path / "run" / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert read(tmp_path / "run" / "events.jsonl") == []
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert_complete(path)


@pytest.mark.slow
def test_a_server_that_goes_silent_later_costs_the_run_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with wandb_server.dark_after_the_start() as url:
        took, told = track(tmp_path / "run", monkeypatch.setenv, url, 0.0)
    print({name: round(seconds, 4) for name, seconds in took.items()})  # -s: figures
    assert took["rows"] < 0.5
    assert took["close"] < 20
    (path,) = (tmp_path / "run" / "wandb").glob("run-*/*.wandb")
    assert "W&B did not take everything within 5 s" in told
    assert f"wandb sync {path.parent}" in told
    assert_complete(path)


def assert_complete(path: Path) -> None:
    items = [history["item"] for history in of_kind(inspect(path), "history")]
    assert [item["progress/step"] for item in items] == list(range(1, STEPS + 1))
    expected = wandb_names(row(STEPS))
    assert {name: items[-1][name] for name in expected} == pytest.approx(expected)
