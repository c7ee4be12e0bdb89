"""Every block of README and docs/ has a test: Python runs, YAML is composed, keys are checked, and what the product is
said to print or to write is what it does. tests/test_extend.py also trains with the packages of the pages."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
import yaml
from braceexpand import braceexpand
from PIL import Image
from webdataset import TarWriter

import onecurve
from launch.plan import batch
from launch.sweeps.summary import show
from launch.sweeps.trials import Sweep, Trial
from launch.train import _print_next_commands
from tests.docs.commands import lines
from tests.docs.pages import PAGES, Block, all_blocks, blocks, write_files
from tests.docs.scene import forget_package
from tests.docs.test_commands import is_commands, is_script
from trainer.checkpoint.format import folder_name
from trainer.checkpoint.shardings import sharding_of
from trainer.checkpoint.state import DTYPES
from trainer.config.compose import load, recipe_message
from trainer.plugin_checks import check_plugins
from trainer.resilience.hang_verdict import verdict
from trainer.resilience.watchdog import STATES
from trainer.run_data import open_run_data, open_shards
from trainer.topology import ALONE
from trainer.tracking.base import RunInfo
from trainer.tracking.console import Console

# A model and an objective of the reader's, which what is not text needs.
LOOK = """
import onecurve
import torch

class Look(torch.nn.Module):
    class Config(onecurve.Plugin):
        pass

    def __init__(self, config, facts):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(3))

    def forward(self, batch):
        return batch["image"].mean((2, 3)) @ self.weight

    def initialise(self, name, parameter, generator):
        parameter.normal_(generator=generator)

class Guess(onecurve.Objective):
    class Config(onecurve.Plugin):
        pass

    def loss(self, outputs, batch, totals):
        loss = (outputs - batch["label"]).square().sum()
        return loss / totals["num_targets"], {"loss": loss}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    forget_package()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    forget_package()


def block_of(page: str, first: str) -> Block:
    """The only block of a page whose first line begins like this."""
    (found,) = [block for block in blocks(page) if block.first.startswith(first)]
    return found


def is_keys(block: Block) -> bool:
    return not block.language and all(re.match(r"[\w.]+=", line) for line in lines(block.text))


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    """A new one that no rule covers fails here: write its test, and a line for it in OTHERS."""
    rules = (is_commands, is_script, is_keys, lambda block: block.file)
    left = {(block.page, block.first) for block in all_blocks() if not any(rule(block) for rule in rules)}
    covered = {
        (page, first): [it for it in left if it[0] == page and it[1].startswith(first)] for page, first in OTHERS
    }
    assert {*left} == {it for found in covered.values() for it in found}
    assert all(len(found) == 1 for found in covered.values()), "a block is gone, or two begin alike"


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.file for block in blocks(page))])
def test_the_files_of_a_page_are_a_package_that_the_config_takes(page: str, folder: Path) -> None:
    for block in write_files(page, folder):
        path = Path(block.file)
        if block.language == "python":
            assert importlib.import_module(".".join(path.with_suffix("").parts)).__file__ == str(folder / path)
        else:
            assert path.parts[0] == "my_conf"
            chosen = [f"{path.parts[1]}={path.stem}", "run.plugins=[my_package]"]
            module, _, name = yaml.safe_load(block.text)["name"].partition(":")
            asked = getattr(getattr(importlib.import_module(module), name), "frozen", ())
            frozen = [f"models.frozen.{model}=runs/any" for model in asked]
            check_plugins(load([*chosen, *frozen], config_dir="my_conf"))


def test_the_stream_in_another_trainer(folder: Path) -> None:
    block = block_of("README.md", "from onecurve import OrderedSamples")
    (folder / "shards").mkdir()
    for shard in range(3):
        with TarWriter(str(folder / "shards" / f"train-{shard}.tar")) as tar:
            for i in range(10):
                tar.write({"__key__": f"{shard}-{i}", "txt": f"text {shard}-{i}", "json": {"number": 10 * shard + i}})
    seen = []
    for rank in range(2):
        given = {"rank": rank, "world_size": 2, "webdataset": webdataset}
        exec(compile(block.text, str(block), "exec"), given)
        pairs = iter(given["pipeline"])
        seen += [next(pairs) for _ in range(15)]
    assert sorted(about["number"] for _, about in seen) == [*range(30)]  # an epoch, each once
    assert all(text == f"text {about['number'] // 10}-{about['number'] % 10}" for text, about in seen)


def test_keys_are_taken(folder: Path) -> None:
    for block in filter(is_keys, all_blocks()):
        for line in lines(block.text):
            load(own(folder, shlex.split(line)), config_dir="my_conf")


def own(folder: Path, keys: list[str]) -> list[str]:
    """Model and objective of the reader's beside these keys, where they are not text's."""
    (folder / "my_conf").mkdir(exist_ok=True)
    if "data=samples" not in keys:
        return keys
    (folder / "my_package").mkdir(exist_ok=True)
    (folder / "my_package" / "__init__.py").touch()
    (folder / "my_package" / "look.py").write_text(LOOK)
    for group, name in (("model", "Look"), ("objective", "Guess")):
        (folder / "my_conf" / group).mkdir(parents=True, exist_ok=True)
        (folder / "my_conf" / group / "mine.yaml").write_text(f"name: my_package.look:{name}\n")
    return [*keys, "model=mine", "objective=mine", "run.plugins=[my_package]"]


def test_images_are_read_and_cropped_as_the_page_says(folder: Path) -> None:
    """The keys of one block, the function of the other, on shards of real images."""
    write_files("docs/DATA.md", folder)
    crop = block_of("docs/DATA.md", "# my_package/data.py")
    (asked,) = re.findall(r"; (data\.maps=\S+)", crop.first)
    keys = shlex.split(block_of("docs/DATA.md", "data=samples").first)
    columns = np.tile(np.arange(240, dtype=np.uint8)[None, :, None], (210, 1, 3))  # which column it was
    for number in range(100):
        file, extension = io.BytesIO(), ("jpg", "png")[number % 2]
        Image.fromarray(columns).save(file, {"jpg": "JPEG", "png": "PNG"}[extension])
        with TarWriter(str(folder / f"birds-{number:03}.tar")) as tar:
            tar.write({"__key__": f"{number:03}", extension: file.getvalue(), "cls": str(number % 4)})
    config = load([*own(folder, keys), asked, f"data.cache={folder}/cache", "eval.every=0"], config_dir="my_conf")
    share = open_run_data(config, ALONE, open_shards(config, ALONE)).stream.share
    source = share.parts[0].source
    assert source.n == 100
    rows = [source.read(unit, draw=7) for unit in range(100)]
    assert sorted({int(row["label"]) for row in rows}) == [0, 1, 2, 3]
    assert {row["image"].shape for row in rows} == {(3, 224, 224)}
    again, other, evaluated = (source.read(1, draw)["image"] for draw in (7, 8, 0))  # a PNG: no loss
    assert torch.equal(again, rows[1]["image"])
    assert not torch.equal(other, again)
    assert evaluated.min() < min(again.min(), other.min())  # it begins at the first column, the others further right


def test_what_make_train_prints(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The lines of the README's run, printed by what prints them, from the numbers in them."""
    config = load(["experiment=shakespeare"], 2)
    for title, text in [("recipe", recipe_message()), *batch(config, 2), ("folder", config.run.dir)]:
        print(f"{title:12}{text}")
    console = Console()
    console.start(RunInfo("shakespeare", folder, config.train.steps, 0, {}, {}))
    console.event({"kind": "start", "step": 0, "processes": 2})
    step = {"step": 1, "loss": 6.964, "grad_norm": 2.181, "lr": 4e-5, "tokens_per_s": 6633, "step_s": 278 / 1199}
    console.rows([step | {"data_wait_s": 0.082 * step["step_s"]}])
    evaluated = {"loss": 3.296, "nats_per_char": 1.3884, "bits_per_byte": 2.0028}
    console.rows([step | {"step": 1200, "eval": evaluated, "data_wait_s": 0.0}])
    console.event({"kind": "checkpoint", "step": 1200, "seconds": 0.07, "bytes": 11220882})
    console.event({"kind": "finished", "step": 1200})
    Path("runs/shakespeare").mkdir(parents=True)
    Path("runs/shakespeare/status.json").write_text(json.dumps({"steps": config.train.steps}))
    monkeypatch.setattr(sys, "argv", [str(folder / ".venv/bin/onecurve")])
    _print_next_commands(config, 2, argparse.Namespace(config_dir=None, overrides=["experiment=shakespeare"]))
    printed = capsys.readouterr().out.splitlines()
    before, sampled, after = block_of("README.md", "recipe ").text.partition("sample (more in runs/shakespeare/samples")
    assert sampled
    shown = [*before.splitlines(), *after[after.index("\nreport  ") :].splitlines()]
    assert [line for line in shown if line not in {*printed, "..."}] == []


def test_the_files_of_a_checkpoint_and_its_index(folder: Path) -> None:
    quick = ["train.steps=1", "eval.every=0", "sample.count=0", "track.report=false", "track.wandb.mode=disabled"]
    result = onecurve.run(onecurve.load(["experiment=smoke", "strategy=single", "checkpoint.every=1", *quick]))
    (saved,) = [path for path in (result.folder / "checkpoints").iterdir() if path.name == folder_name(1)]
    first, *files = block_of("docs/CHECKPOINTS.md", "checkpoints/").text.splitlines()
    assert first == f"checkpoints/{folder_name(100)}/"
    assert sorted(line.split()[0] for line in files) == sorted(path.name for path in saved.iterdir())

    index = json.loads((saved / "index.json").read_text())
    shown = re.sub(r"(?<=[\]},]) {2,}\S.*$", "", block_of("docs/CHECKPOINTS.md", '{"shardings"').text, flags=re.M)
    example = json.loads(shown)
    assert example.keys() == index.keys()
    (described,) = example["tensors"].values()
    assert [*map(type, described)] == [*map(type, next(iter(index["tensors"].values())))]
    assert described[0] in DTYPES
    shardings = [sharding_of(told) for told in example["shardings"]]
    sharding = shardings[described[2]].table(tuple(described[1]))
    held = {rank: [sharding.box(row) for row in sharding.rows_held_by(rank)] for rank in range(4)}
    assert held[0] == held[2]  # "ranks 0 and 1 share dimension 0, 2 and 3 hold the same"
    assert held[1] == held[3] != held[0]
    assert [box.offset[0] for (box,) in (held[0], held[1])] == [0, 256]


def test_the_table_of_a_sweep(folder: Path, capsys: pytest.CaptureFixture) -> None:
    head, *rows = block_of("docs/LAUNCH.md", "optimizer.lr ").text.splitlines()
    trials = []
    for number, row in enumerate(rows):
        rate, loss, best, steps, seconds, state = row.split()
        run = folder / "trials" / str(number)
        run.mkdir(parents=True)
        (run / "status.json").write_text(json.dumps({"state": state, "step": int(steps), "steps": int(steps)}))
        each = int(seconds.partition(":")[2]) / int(steps)
        told = {"loss": float(loss), "grad_norm": 1.0, "lr": float(rate), "step_s": each, "data_wait_s": 0.0}
        told |= {"tokens": 1, "samples": 1, "tokens_per_s": 1.0, "skipped": False}
        lines = [told | {"step": step} for step in range(1, int(steps) + 1)]
        lines[-1]["eval"] = {"loss": float(best)}
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        trials.append(Trial(number, str(run), [], {"optimizer.lr": rate}, int(steps)))
    Sweep(folder / "trials", ["optimizer.lr"], 1, None, trials[::-1]).save()
    show(folder / "trials")
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in (head, *rows) if line not in printed] == []


def test_the_sentences_on_hangs() -> None:
    def waits(step: int) -> dict:
        return {"waits": True, "collective": "all_reduce", "backward": False, "step": step, "last": None}

    reader = {"where": "my_data.py crop() line 40", "seconds": 62, "reader": "", "step": 9, "kind": "data_wait"}
    stopped, lost = block_of("docs/SURVIVAL.md", "onecurve: hang").text.splitlines()
    _, sentence = verdict({0: waits(12)}, {1: STATES["T"]})
    assert stopped.startswith(f"onecurve: hang: {sentence}. Stacks: ")
    _, sentence = verdict({0: waits(9), 2: waits(9), 1: reader | {"waits": False}}, {})
    assert lost == f"onecurve: hang: {sentence}."


def test_the_list_of_a_packages_files_is_what_the_page_shows() -> None:
    listed = {file for line in block_of("docs/EXTEND.md", "my_package/{").text.split() for file in braceexpand(line)}
    assert listed == {block.file for block in blocks("docs/EXTEND.md") if block.file} | {"my_package/__init__.py"}


def by(path: str, name: str) -> Callable[[], None]:
    """A test elsewhere that runs the block; it has to be there."""
    return getattr(importlib.import_module(path), name)


# Blocks of no kind that is tested by a rule: page and first words, and the test that is theirs.
OTHERS: dict[tuple[str, str], Callable] = {
    ("README.md", "recipe "): test_what_make_train_prints,
    ("README.md", "from onecurve import OrderedSamples"): test_the_stream_in_another_trainer,
    ("docs/CHECKPOINTS.md", "checkpoints/"): test_the_files_of_a_checkpoint_and_its_index,
    ("docs/CHECKPOINTS.md", '{"shardings"'): test_the_files_of_a_checkpoint_and_its_index,
    ("docs/EXTEND.md", "my_package/{"): test_the_list_of_a_packages_files_is_what_the_page_shows,
    ("docs/EXTEND.md", "import onecurve"): by(
        "tests.test_extend", "test_the_model_of_the_readme_and_the_program_of_the_page_run"
    ),
    ("docs/LAUNCH.md", "apiVersion: kubeflow"): by(
        "tests.docs.test_commands", "test_the_pods_of_kubernetes_start_ranks_that_fit"
    ),
    ("docs/LAUNCH.md", "optimizer.lr "): test_the_table_of_a_sweep,
    ("docs/SURVIVAL.md", "onecurve: hang"): test_the_sentences_on_hangs,
}
