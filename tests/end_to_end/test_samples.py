"""A user's own classifier of images, trained on decoded samples: the same curve on any processes and workers."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter

from tests.end_to_end.test_refusals import onecurve
from tests.runs import TINY, Run, assert_same_bits, assert_same_curve

NET = """
import torch
import torch.nn.functional as F
import trainer.config
import trainer.objectives

class Net(torch.nn.Module):
    class Config(trainer.config.Plugin):
        layers: int
        width: int
        heads: int  # groups of the norms

    def __init__(self, config, facts):
        super().__init__()
        channels = [3] + [config.width] * config.layers
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Conv2d(a, b, 3, stride=2, padding=1), torch.nn.GroupNorm(config.heads, b), torch.nn.GELU()
            )
            for a, b in zip(channels, channels[1:])
        )
        self.head = torch.nn.Linear(config.width, 4)

    def forward(self, batch):
        x = batch["image"]
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(dim=(2, 3)))

    def initialise(self, name, parameter, generator):
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0 if "weight" in name else 0.0)

class Classify(trainer.objectives.Objective):
    class Config(trainer.config.Plugin):
        pass

    def loss(self, outputs, batch, totals):
        loss = F.cross_entropy(outputs.float(), batch["label"], reduction="sum")
        right = (outputs.argmax(dim=1) == batch["label"]).sum()
        return loss / totals["num_targets"], {"loss": loss, "accuracy": right}

def brighten(sample, draw):
    factor = 1 + (draw % 1001 - 500) / 5000 if draw else 1
    sample["image"] = sample["image"].point(lambda value: value * factor)
    return sample
"""


def write_shards(folder: Path, seed: int, counts: list[int], broken: str | None = None) -> None:
    """Images of four kinds: which corner is bright."""
    random = np.random.default_rng(seed)
    for shard, count in enumerate(counts):
        with TarWriter(str(folder / f"{'val' if seed else 'train'}-{shard}.tar")) as tar:
            for i in range(count):
                label, (height, width) = int(random.integers(4)), random.integers(20, 40, 2)
                pixels = random.integers(0, 120, (height, width, 3), np.uint8)
                pixels[(label // 2) * height // 2 :][: height // 2, (label % 2) * width // 2 :][:, : width // 2] += 110
                file, kind = io.BytesIO(), ("jpg", "png")[i % 2]
                Image.fromarray(pixels).save(file, "JPEG" if kind == "jpg" else "PNG")
                key = f"{shard}-{i:02d}"
                content = file.getvalue()[: 200 if key == broken else None]
                tar.write({"__key__": key, kind: content, "cls": str(label)})


@pytest.fixture
def overrides(tmp_path: Path) -> tuple[str, ...]:
    """A user's package, config groups and shards in `tmp_path`, and the command line that trains with them."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "net.py").write_text(NET)
    for group, options in {"model": "Net\nlayers: 3\nwidth: 16\nheads: 4\n", "objective": "Classify\n"}.items():
        (tmp_path / "my_conf" / group).mkdir(parents=True)
        (tmp_path / "my_conf" / group / "mine.yaml").write_text(f"name: my_package.net:{options}")
    write_shards(tmp_path, 0, [31, 20, 26])
    write_shards(tmp_path, 1, [30])
    return (
        "--config-dir=my_conf", "run.plugins=[my_package]", "model=mine", "objective=mine", "data=samples",
        f"data.shards={tmp_path}/train-*.tar", f"data.validation={tmp_path}/val-0.tar",
        "data.fields={image: 'jpg;png', label: cls}",
        "data.maps=[my_package.net:brighten]", "data.image.size=16", "data.image.augment=true", "data.lanes=6",
        f"data.cache={tmp_path}/cache", "train.steps=20", "eval.every=10", "eval.steps=null", "sample.count=2",
    )  # fmt: skip


@pytest.mark.slow
def test_the_same_curve_on_any_processes_and_workers(overrides: tuple[str, ...], tmp_path: Path) -> None:
    one = Run(tmp_path / "one", 1, (*overrides, "track.report=true"))
    one.train()
    entries = [tuple(entry) for row in one.ledger() for entry in row["samples"]]
    first = entries[:77]  # an epoch
    assert len(set(first)) == 77
    assert set(entries[77:154]) == set(first)
    assert all(shard.startswith("train-") for shard, _ in first)
    evaluations = [row["eval"] for row in one.metrics() if "eval" in row]
    assert len(evaluations) == 2
    assert evaluations[1]["loss"] < evaluations[0]["loss"]
    assert not (one.folder / "samples.txt").exists()
    assert (one.folder / "report.html").exists()

    config_dir, *others = overrides
    order = onecurve("data", "order", "--steps", "3:4", config_dir, *TINY, *others)
    told = subprocess.run(order, cwd=tmp_path, capture_output=True, text=True)
    assert [json.loads(line) for line in told.stdout.splitlines()] == one.ledger()[2:4], told.stderr
    sample = onecurve("sample", "one", "--plugins", "my_package")
    refused = subprocess.run(sample, cwd=tmp_path, capture_output=True, text=True)
    assert (refused.returncode, "is not a run that learns text" in refused.stderr) == (2, True)

    two = Run(tmp_path / "two", 2, (*overrides, "data.workers=2"))
    two.train()
    assert_same_curve(two, one, 20)
    for ours, theirs in zip((row["eval"] for row in two.metrics() if "eval" in row), evaluations, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)

    decoding_in_processes = Run(tmp_path / "processes", 1, (*overrides, "data.workers=2", "data.processes=true"))
    decoding_in_processes.kill_at(12)
    decoding_in_processes.train()
    assert_same_bits(decoding_in_processes, one)


@pytest.mark.slow
def test_a_broken_image_is_named_or_left_out(overrides: tuple[str, ...], tmp_path: Path) -> None:
    write_shards(tmp_path, 0, [31, 20, 26], broken="1-07")
    output = Run(tmp_path / "fails", 1, overrides).train(expect=3)
    assert "train-1.tar: byte " in output
    assert "sample '1-07': 'png' cannot be decoded" in output
    run = Run(tmp_path / "run", 2, (*overrides, "data.on_error=quarantine"))
    run.train()
    faults = [row for row in run.rows("events.jsonl") if row["kind"] == "quarantined"]
    assert {fault["key"] for fault in faults} == {"1-07"}
    assert "1-07" not in {key for row in run.ledger() for _, key in row["samples"]}


def test_a_gpt_on_one_text_a_sequence(tmp_path: Path) -> None:
    with TarWriter(str(tmp_path / "a.tar")) as tar:
        for i in range(50):
            tar.write({"__key__": f"{i:02d}", "txt": f"sample number {i}"})
    overrides = ("data=samples", "data.fields={tokens: txt}", f"data.shards={tmp_path}/a.tar", "train.steps=8")
    texts = ("sample.count=1", "sample.tokens=4", f"data.cache={tmp_path}/cache", f"data.validation={tmp_path}/a.tar")
    run = Run(tmp_path / "run", 1, (*overrides, *texts))
    run.train()
    rows = run.metrics()
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["tokens"] == sum(
        len(f"sample number {int(key)}") + 1 for row in run.ledger() for _, key in row["samples"]
    )
    assert "nats_per_char" in rows[-1]["eval"]
    assert (run.folder / "samples.txt").exists()


@pytest.mark.slow
def test_what_is_wrong_is_told_before_the_start(overrides: tuple[str, ...], tmp_path: Path) -> None:
    wrong = ("data.maps=[my_package.net:brihgten]", "data.fields.label=pkl")
    output = Run(tmp_path / "run", 1, (*overrides, *wrong)).train(expect=2)
    assert "data.maps=my_package.net:brihgten: cannot be imported" in output
    assert "data.fields.label=pkl: is a pickle" in output
    assert not (tmp_path / "run").exists()
    output = Run(tmp_path / "run", 1, (*overrides, "data.fields.label=class")).train(expect=2)
    assert "data.fields.label=class: no sample of" in output
    assert not (tmp_path / "run").exists()
