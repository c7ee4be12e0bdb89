"""Weights & Biases, offline: read back from its own file through its own command."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.tracking.demo_run import evaluation, info, row
from trainer.config.compose import load
from trainer.tracking import JsonlTracker, Trackers
from trainer.tracking.jsonl import read
from trainer.tracking.wandb import WandB, identity, wandb_names


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no settings and no mode of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def inspect(path: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    return [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines() if line]


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


@pytest.mark.slow
def test_two_lives_of_a_run_are_one_wandb_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, said = tmp_path / "my run", list[str]()
    for first, state in ((1, "interrupted"), (4, "finished")):
        trackers = Trackers(JsonlTracker(folder), [WandB("auto", say=said.append)])
        trackers.start(info(folder, step=first - 1, config={"train": {"steps": 100}}))
        trackers.rows([row(first, skipped=True), row(first + 1, loss=math.nan)])
        trackers.rows([row(first + 2, mfu=0.4, mem_gib=1.5, eval=evaluation(first + 2))])
        trackers.close({"state": state})
    assert capfd.readouterr() == ("", "")
    assert [event["kind"] for event in read(folder / "events.jsonl")] == []

    lives = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    identity = json.loads((folder / "wandb.json").read_text())["id"]
    assert [path.name for path in lives] == [f"run-{identity}.wandb"] * 2
    assert said[-1].endswith(f"wandb sync '{lives[0].parent}' '{lives[1].parent}'")
    assert said[-1].count("wandb sync") == 1

    for path, first, code in zip(lives, (1, 4), (75, 0), strict=True):
        records = inspect(path)
        items = [history["item"] for history in of_kind(records, "history")]
        assert [item["progress/step"] for item in items] == [first, first + 1, first + 2]
        expected = wandb_names(row(first + 2, mfu=0.4, mem_gib=1.5, eval=evaluation(first + 2)))
        assert {name: items[2][name] for name in expected} == pytest.approx(expected)
        assert items[0]["train/skipped"] == 1
        assert items[1]["train/loss"] == "NaN"
        config = of_kind(records, "run")[0]["config"]["update"]
        assert config["train"] == {"steps": 100}
        assert config["env/topology"]["processes"] == 4
        metrics = {metric.get("name") or metric["glob_name"]: metric for metric in of_kind(records, "metric")}
        assert metrics["*"]["step_metric"] == "progress/step"
        assert metrics["val/loss"]["summary"] == {"min": True}
        assert [end["exit_code"] for end in of_kind(records, "exit")] == [code]


def test_names() -> None:
    assert wandb_names(row(2, loss=1.5, step_s=2.0, data_wait_s=0.5, mfu=None, accuracy=0.25)) == {
        "progress/step": 2,
        "progress/tokens": 32768,
        "progress/samples": 128,
        "train/loss": 1.5,
        "train/grad_norm": row(2)["grad_norm"],
        "train/lr": row(2)["lr"],
        "train/skipped": 0,
        "train/accuracy": 0.25,
        "perf/step_s": 2.0,
        "perf/data_wait_s": 0.5,
        "perf/data_wait_frac": 0.25,
        "perf/tokens_per_s": row(2)["tokens_per_s"],
    }


def test_online_without_a_key_goes_offline_and_never_asks(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = WandB("online", say=said.append)
    tracker.start(info(tmp_path / "run"))
    tracker.close({"state": "finished"})
    assert "no API key" in said[0]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_a_server_that_is_not_there_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: W&B keeps the server's address for good."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    script = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from demo_run import info, row
from trainer.tracking.wandb import WandB
tracker = WandB("auto")
tracker.start(info(Path(sys.argv[1])))
tracker.rows([row(1)])
tracker.close({"state": "finished"})
"""
    command = [sys.executable, "-c", script, str(tmp_path / "run"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "cannot go online" in done.stderr
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert len(of_kind(inspect(path), "history")) == 1


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_disabled_does_nothing_and_imports_nothing(tmp_path: Path, how: str) -> None:
    script = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from demo_run import info, row
from trainer.tracking.wandb import WandB
tracker = WandB(sys.argv[3])
tracker.start(info(Path(sys.argv[1])))
tracker.rows([row(1)])
tracker.close({"state": "finished"})
assert "wandb" not in sys.modules
"""
    mode, variables = ("disabled", {}) if how == "argument" else ("auto", {"WANDB_MODE": "disabled"})
    command = [sys.executable, "-c", script, str(tmp_path / "run"), str(Path(__file__).parent), mode]
    subprocess.run(command, check=True, env={**os.environ, **variables})
    assert not (tmp_path / "run").exists()


def steps_in(folder: Path) -> list[list[int]]:
    """The steps that each attempt's file has rows of."""
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    return [[item["item"]["progress/step"] for item in of_kind(inspect(path), "history")] for path in files]


def attempt(folder: Path, first: int, last: int, tracker: WandB | None = None) -> None:
    tracker = tracker or WandB("offline", say=lambda _: None)
    trackers = Trackers(JsonlTracker(folder), [tracker])
    trackers.start(info(folder, step=first - 1))
    trackers.rows([row(step) for step in range(first, last + 1)])
    trackers.close({"state": "interrupted"})


@pytest.mark.slow
def test_rows_that_a_killed_attempt_lost_are_logged_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    attempt(folder, 1, 60)
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    os.truncate(file, file.stat().st_size * 2 // 3)  # as it is when W&B's process was killed, too
    kept = json.loads((folder / "wandb.json").read_text())
    del kept["logged"]  # which comes with the end of an attempt
    (folder / "wandb.json").write_text(json.dumps(kept))
    attempt(folder, 61, 62)
    first, second = steps_in(folder)
    assert 1 <= len(first) < 60
    assert first + second == list(range(1, 63))


@pytest.mark.slow
def test_a_run_directory_that_is_copied_while_its_run_goes_on(tmp_path: Path) -> None:
    attempt(tmp_path / "run", 1, 3)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=True)
    said: list[str] = []
    attempt(tmp_path / "copy", 4, 5, WandB("offline", say=said.append))
    other = identity(tmp_path / "copy")["id"]
    (own,) = (tmp_path / "copy/wandb").glob(f"offline-run-*/run-{other}.wandb")
    assert [item["item"]["progress/step"] for item in of_kind(inspect(own), "history")] == [1, 2, 3, 4, 5]
    assert said[-1].endswith(f"wandb sync {own.parent}")


def test_which_rows_are_logged_again(tmp_path: Path) -> None:
    """Those behind what W&B has, up to the step that the run goes on from; none after an end in order."""
    record = JsonlTracker(tmp_path)
    record.start(info(tmp_path))
    record.rows([row(step) for step in range(1, 11)])
    logged: list[int] = []
    for since, step in ((6, 9), (9, 9), (12, 10)):
        tracker = WandB("offline")
        tracker.folder = tmp_path
        tracker.run = SimpleNamespace(log=lambda told: logged.append(told["progress/step"]))
        tracker._fill(since, step)
    assert logged == [7, 8, 9]


def test_a_copied_run_directory_is_another_run_there(tmp_path: Path) -> None:
    run, copy, moved, link = (tmp_path / name for name in ("run", "copy", "moved", "link"))
    run.mkdir()
    kept = identity(run)
    assert identity(run) == kept
    (run / "wandb.json").write_text(json.dumps({"id": kept["id"], "logged": 3}))  # an earlier version names no path
    assert identity(run) == {**kept, "logged": 3}
    link.symlink_to(run)
    assert identity(link)["id"] == kept["id"]
    shutil.copytree(run, copy)
    other = identity(copy)
    assert other["id"] != kept["id"]
    assert "logged" not in other
    assert identity(copy) == other
    assert identity(run)["id"] == kept["id"]
    run.rename(moved)
    assert identity(moved)["id"] == kept["id"]
    (moved / "wandb.json").write_text("{")  # cut short
    assert identity(moved)["id"] != kept["id"]


def test_keys_beat_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    section = load([]).track.wandb
    assert (section.project, section.group, section.name) == (None, None, None)
    assert WandB(section.mode, section.project).project == "onecurve"
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "me")
    tracker = WandB(section.mode, section.project, group=section.group, name=section.name)
    assert (tracker.project, tracker.name) == ("mine", "me")
    tracker = WandB("auto", "theirs", name="they")
    assert (tracker.project, tracker.name) == ("theirs", "they")


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"project": "p", "group": "g", "name": "n"}])
def test_variables_of_wandb_hold(keys: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    for name in ("PROJECT", "RUN_GROUP", "NAME", "ENTITY"):
        monkeypatch.setenv(f"WANDB_{name}", f"my-{name.lower()}")
    wandb.teardown()  # it has read them for all runs of this process
    attempt(tmp_path / "run", 1, 1, WandB("offline", say=lambda _: None, **keys))
    wandb.teardown()
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    told = of_kind(inspect(file), "run")[0]
    expected = list(keys.values()) or ["my-project", "my-run_group", "my-name"]
    assert [told[name] for name in ("project", "run_group", "display_name")] == expected
    assert told["entity"] == "my-entity"
