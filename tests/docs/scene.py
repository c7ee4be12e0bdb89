"""The folder that the pages speak of: texts, images and shards, a package of the reader's, and a run."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet
from PIL import Image

import onecurve
from launch.cli import parse

WORDS = ("the", "king", "speaks", "of", "love", "and", "sorrow", "while", "a", "storm", "rises", "over", "sea")
# The README's own commands, for a run of seconds.
PACK = ["data", "pack", "my_texts/", "--split", "paragraphs", "--out", "shards", "--tokenizer", "bpe:8192"]
TRAIN = [
    "data=webdataset", "run.name=mine", "data.shards='shards/train-*.tar'",
    "data.validation='shards/validation-*.tar'", "data.tokenizer=shards/tokenizer.json",
]  # fmt: skip
QUICK = [
    "experiment=smoke", "strategy=single", "train.steps=4", "train.log_every=1", "eval.every=2", "checkpoint.every=2",
    "sample.tokens=4", "data.ledger=true", "track.wandb.mode=disabled", "checkpoint.asynchronous=false",
]  # fmt: skip


def build(folder: Path) -> None:
    """Makes all of it in the working folder, which is `folder`."""
    random = Random(1)
    paragraphs = [" ".join(random.choices(WORDS, k=30)) for _ in range(200)]
    (folder / "my_texts").mkdir()
    for number in range(50):
        (folder / "my_texts" / f"{number:02}.txt").write_text("\n\n".join(paragraphs[number::50]))
    shutil.copytree(folder / "my_texts", folder / "books")
    with gzip.open(folder / "web-0.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"content": text, "number": i}) + "\n" for i, text in enumerate(paragraphs))
    (folder / "web").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": paragraphs}), folder / "web" / "0.parquet")
    pictures(folder / "birds", random)
    arguments = parse([*PACK, "--workers", "1"])
    assert arguments.func(arguments) == 0
    shutil.copy(folder / "shards" / "tokenizer.json", folder)
    result = onecurve.run(onecurve.load([*QUICK, *TRAIN, f"data.cache={folder}/cache"]))
    assert result.status == "finished"
    for name in ("large", "shakespeare"):
        shutil.copytree(folder / "runs" / "mine", folder / "runs" / name, ignore=shutil.ignore_patterns(".lock*"))


def pictures(folder: Path, random: Random) -> None:
    """Birds of two kinds."""
    for kind in ("robin", "wren"):
        (folder / kind).mkdir(parents=True)
        for number in range(1, 41):
            color = (random.randrange(256), random.randrange(256), random.randrange(256))
            Image.new("RGB", (40, 30), color).save(folder / kind / f"{number:04}.jpg")


def forget_package() -> None:
    """The package of another page has the same name."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]
