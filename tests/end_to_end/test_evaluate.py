"""`onecurve evaluate` measures what the run itself measured, or other data; `onecurve recipes` lists what there is."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import onecurve
from launch.cli import main
from launch.recipes import renew_table
from trainer.config.compose import options

ROOT = Path(__file__).parents[2]
SMALL = [
    "experiment=smoke", "train.steps=4", "eval.every=2", "eval.steps=2", "checkpoint.every=2", "sample.count=0",
    "track.report=false", "track.console=false", "track.wandb.mode=disabled", "strategy=single", "model.dropout=0.1",
]  # fmt: skip


def command(monkeypatch: pytest.MonkeyPatch, *words: str, code: int = 0) -> None:
    monkeypatch.setattr(sys, "argv", ["onecurve", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return onecurve.run(onecurve.load([*SMALL, f"run.dir={folder}"])).folder


def test_it_measures_what_the_run_measured(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {row["step"]: row for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())}
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}

    def measured(*words: str) -> dict[str, Any]:
        command(monkeypatch, "evaluate", str(run_dir), "--json", *words)
        return json.loads(capsys.readouterr().out)

    assert measured() == {"step": 4, **rows[4]["eval"]}
    assert measured("--step", "2") == {"step": 2, **rows[2]["eval"]}
    whole = measured("eval.steps=null", "train.micro_batch=6")
    assert whole["loss"] != rows[4]["eval"]["loss"]
    assert whole == pytest.approx(measured("eval.steps=null"), rel=1e-5)
    command(monkeypatch, "evaluate", str(run_dir))
    assert capsys.readouterr().out.startswith("step 4: loss ")
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.validation=null"], "the run has no held-out data; add data.validation=..."),
        (["evil.steps=3"], "evil: no such key"),
        (["--step", "3"], "--step 3: .* has no checkpoint of it; there are: 0, 2, 4"),
    ],
)
def test_what_cannot_be_measured_is_told(
    run_dir: Path, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "evaluate", str(run_dir), *words, code=2)
    assert re.search(told, capsys.readouterr().err)


def test_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command(monkeypatch, "recipes", "--json")
    found = {recipe["name"]: recipe for recipe in json.loads(capsys.readouterr().out)}
    assert sorted(found) == sorted(options("experiment"))
    assert all(recipe["what"] for recipe in found.values())
    assert (found["shakespeare"]["metric"], found["shakespeare"]["target"]) == ("nats_per_char", 1.4)
    (tmp_path / "experiment").mkdir()
    own = tmp_path / "experiment" / "mine.yaml"
    own.write_text(yaml.safe_dump({"about": {"what": "mine", "minutes": 3}, "train": {"steps": 1}}))
    command(monkeypatch, "recipes", "--config-dir", str(tmp_path))
    text = capsys.readouterr().out
    assert "experiment=mine: mine\n    minutes   3\n" in text
    assert "    target    nats_per_char 1.4\n    run       onecurve train -n 2 experiment=shakespeare\n" in text
    own.write_text("about: {why: not}")
    command(monkeypatch, "recipes", "--config-dir", str(tmp_path), code=2)
    assert "experiment/mine.yaml: `about` should have some of what, hardware, minutes" in capsys.readouterr().err


def test_readme_lists_them() -> None:
    text = (ROOT / "README.md").read_text()
    assert text == renew_table(text), "run `make docs`"
