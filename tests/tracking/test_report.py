"""report.html: whole, self-contained and safe, for runs of every kind of shape."""

from __future__ import annotations

import argparse
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from launch.report import add_commands
from tests.tracking.demo_run import SAMPLE, demo_run, info, row
from trainer.errors import ConfigError
from trainer.tracking import JsonlTracker
from trainer.tracking.jsonl import write_json, write_status
from trainer.tracking.plot import Plot, Points, Series, decimate, label, smooth, ticks
from trainer.tracking.report import write_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"{{ 7 * 7 }}"


class Page(HTMLParser):
    """Every tag with its attributes, every text with the tag around it; an unclosed element fails."""

    VOID = ("meta", "path", "img", "br", "link", "input")

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[str]:
        return [text for around, text in self.texts if around == tag and text.strip()]

    @property
    def figures(self) -> dict[str, str]:
        return dict(zip(self.of("dt"), [text for text in self.of("b") if text not in self.titles], strict=True))

    @property
    def titles(self) -> list[str]:
        return re.findall(r"<figcaption><b>(.*?)</b>", self.source)

    @property
    def data(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.of("script") if text.startswith("{")]

    def paths(self, look: str) -> list[str]:
        return [str(attrs["d"]) for tag, attrs in self.tags if tag == "path" and attrs.get("class") == look]


def test_a_whole_run(tmp_path: Path) -> None:
    page = Page(write_report(demo_run(tmp_path / "run")))
    assert page.titles == ["Loss", "Learning rate", "Gradient norm", "Throughput", "Waiting for data"]
    assert page.figures["Steps"] == "2,000"
    assert page.figures["Training loss"] == f"{row(2000)['loss']:.4f}"
    assert page.figures["Best validation"] == "1.5131"
    assert page.figures["Tokens"] == "32.77M"
    assert page.figures["Restarts"] == "1"
    assert SAMPLE in page.of("pre")
    assert page.of("h1") == ["shakespeare"]
    assert len(page.paths("restart")) == 1
    assert len(page.paths("checkpoint")) == 10
    loss = page.data[0]
    assert [line["name"] for line in loss["series"]] == ["training", "smoothed", "validation"]
    assert loss["series"][2]["x"] == list(range(100, 2001, 100))
    assert "nats/char, 2.1829 bits/byte" in page.of("span")
    assert page.of("h2")[0] == "Where the time went"
    assert page.of("td")[:3] == ["Productive", "03:50", "69.6 %"]
    assert "The largest overhead: down, 12.4%: have the run started again" in page.source


def test_nothing_comes_from_outside(tmp_path: Path) -> None:
    page = Page(write_report(demo_run(tmp_path / "run", steps=20)))
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.source)
    assert not [attrs for _, attrs in page.tags if {"src", "href"} & set(attrs)]
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = demo_run(tmp_path / "run", steps=20, name=HOSTILE)
    (folder / "samples.txt").write_text(HOSTILE)
    write_json(folder / "environment.json", {HOSTILE: {"deep": HOSTILE}})
    write_status(folder, {"state": HOSTILE, "reason": HOSTILE})
    record = JsonlTracker(folder)
    record.start(info(folder, step=20, environment={HOSTILE: {"deep": HOSTILE}}))
    record.event({"time": HOSTILE, "kind": HOSTILE, "step": HOSTILE, HOSTILE: [HOSTILE]})
    page = Page(write_report(folder))
    assert page.of("h1") == [HOSTILE]
    assert HOSTILE in page.of("pre")
    assert "img" not in [tag for tag, _ in page.tags]
    assert "alert" not in "".join(page.of("script"))
    assert len(page.of("script")) == 6  # five plots and the page's own


def one_step(folder: Path) -> list[str]:
    demo_run(folder, steps=1)
    return ["Loss", "Learning rate", "Gradient norm", "Throughput", "Waiting for data"]


def interrupted(folder: Path) -> list[str]:
    demo_run(folder, steps=2000, done=731)
    with (folder / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 732, "lo')
    return ["Loss", "Learning rate", "Gradient norm", "Throughput", "Waiting for data"]


def not_finite(folder: Path) -> list[str]:
    record = JsonlTracker(folder)
    record.start(info(folder))
    record.rows([row(1), row(2, loss=float("nan"), grad_norm=float("inf"), tokens_per_s=float("inf"))])
    record.rows([row(3), row(4, loss=float("nan"), eval={"loss": float("nan"), "nats_per_char": 1.0})])
    return ["Loss", "Validation", "Learning rate", "Gradient norm", "Throughput", "Waiting for data"]


def never_finite(folder: Path) -> list[str]:
    record = JsonlTracker(folder)
    record.start(info(folder))
    nan = float("nan")
    record.rows([row(step, loss=nan, grad_norm=nan, lr=0.0, step_s=0.0, data_wait_s=0.0) for step in (1, 2)])
    return ["Loss", "Learning rate", "Gradient norm", "Throughput", "Waiting for data"]


def before_the_first_step(folder: Path) -> list[str]:
    record = JsonlTracker(folder)
    record.start(info(folder))
    record.event({"kind": "interrupted"})
    return []


SHAPES = [
    one_step,
    interrupted,
    not_finite,
    never_finite,
    before_the_first_step,
]


@pytest.mark.parametrize("shape", SHAPES)
def test_runs_of_every_shape(tmp_path: Path, shape: Any) -> None:
    titles = shape(tmp_path)
    page = Page(write_report(tmp_path))
    assert page.titles == titles
    assert "nan" not in page.source.replace("NaN", "")
    assert "inf" not in re.sub(r"[a-z]*inf[a-z]+", "", page.source)
    for svg in re.findall(r"<svg.*?</svg>", page.source, re.DOTALL):
        ElementTree.fromstring(svg)
    for look in ("main", "faint", "second"):
        for path in page.paths(look):
            numbers = [float(number) for number in re.findall(r"[ML](\S+) ([^MLh]+)", path) for number in number]
            assert all(0 <= number <= 1000 for number in numbers)


@pytest.mark.slow
def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    rows = [row(step) for step in range(100)]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 200_001):
            some = {**rows[step % 100], "step": step, "loss": 77.0 if step == 123_457 else 1.0 + step % 8}
            file.write(json.dumps(some) + "\n")
    page = Page(write_report(tmp_path))
    assert len(page.source) < 500_000
    for plot in page.data:
        for line in plot["series"]:
            assert len(line["x"]) <= 1000
            assert line["x"] == sorted(line["x"])
    spike = page.data[0]["series"][0]
    assert spike["y"][spike["x"].index(123_457)] == 77.0


def test_decimation_keeps_the_extremes_of_every_stretch() -> None:
    points: Points = [(x, None if x % 7 == 0 else (x * 7919) % 1009) for x in range(10_000)]
    kept = decimate(points, buckets=100)
    for at in range(100):
        part = [y for _, y in points[at * 100 : at * 100 + 100] if y is not None]
        left = [y for x, y in kept if at * 100 <= x < at * 100 + 100]
        assert sorted(y for y in left if y is not None) == [min(part), max(part)]
    assert set(kept) <= set(points)
    assert decimate([(x, None) for x in range(10_000)], buckets=100)[3] == (300, None)


def test_smoothing_does_not_lag() -> None:
    line: Points = [(x, 2.0 * x if x != 60 else None) for x in range(200)]
    for x, y in smooth(line, share=0.1)[:40]:
        assert y == pytest.approx(2.0 * x)
    assert smooth(line)[60] == (60, None)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1e-4), (-3.2, 9.7), (1.4, 1.41), (0, 2e11), (0, 7)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in found)
    texts = [label(tick) for tick in found]
    assert len(set(texts)) == len(texts)
    assert max(map(len, texts)) <= 7


def test_a_line_breaks_where_there_is_no_number() -> None:
    plot = Plot("", "", [Series("", [(0, 0.0), (1, 1.0), (2, None), (3, 1.0), (4, None)])], last=4)
    assert re.findall("[MLh]", plot.series[0].path) == ["M", "h", "L", "M", "h"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    arguments = parser.parse_args(["report", str(demo_run(tmp_path / "run", steps=20))])
    assert arguments.func(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("shakespeare: finished\n")
    assert str(tmp_path / "run" / "report.html") in shown.splitlines()
    assert re.search(r"Restarts +1 +10 checkpoints", shown)
    assert re.search(r"Down +00:41 +\d\d\.\d%", shown)
    assert "The largest overhead: down" in shown


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_what_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="not a run's folder"):
        write_report(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("status.json", "{", r"status\.json: not JSON"),
        ("config.yaml", "run: {name: [", r"config\.yaml: not YAML"),
        ("config.yaml", "run: 2026-13-45", r"config\.yaml: not YAML"),  # a date that is none
        ("config.yaml", "!!python/object/apply:os.getcwd []", r"config\.yaml: not YAML"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=problem):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("run: {name: '${oc.env:SECRET}'}", "${oc.env:SECRET}"),
        ("run: {name: mine, dir: '${no.such.key}'}", "mine"),
        ("", "the-folder"),
        ("[run]", "the-folder"),
        ("run: {name: null}", "the-folder"),
    ],
)
def test_the_name_is_what_the_config_says_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, name: str
) -> None:
    monkeypatch.setenv("SECRET", "told")
    folder = tmp_path / "the-folder"
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    (folder / "config.yaml").write_text(config)
    page = Page(write_report(folder))
    assert page.of("h1") == [name]
    assert "told" not in page.source
