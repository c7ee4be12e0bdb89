"""From the commands that the pages show to the words that a shell passes on, placeholders replaced."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path

# What the pages leave to the reader, and what stands for it in the tests' folder; in this order.
PLACEHOLDERS = {
    "[key=value ...]": "",  # may be left out, so the command has to do without
    "[key=1,2 ...]": "optimizer.lr=0.001,0.01",
    "[overrides]": "",
    " key=value ...": "",
    "... objective=gan": "--config-dir my_conf run.plugins=[tests] objective=gan",
    "submit ... optimizer": "submit optimizer",
    "torchrun ... ": "torchrun --nproc-per-node 2 ",
    "[-n PROCS]": "-n 2",
    "-n PROCS": "-n 2",
    "[--gpu NAME | --memory GiB]": "--memory 80",
    "[--dir FOLDER]": "--dir runs",
    "[STEP]": "2",
    "--step K": "--step 3",
    "RUN_DIR": "runs/mine",
    "runs/a": "runs/mine",
    " A B": " runs/mine runs/large",
    "data.shards=...": "data.shards='shards/train-*.tar'",
}
# What `...` at the end of a command stands for, by the command; elsewhere it may be left out.
REST = {
    "onecurve checkpoint ls": "runs/mine",
    "onecurve checkpoint verify": "runs/mine",
    "onecurve checkpoint diff": "runs/mine runs/large",
    "onecurve checkpoint prune": "runs/mine",
    "onecurve checkpoint restore": "runs/mine",
    "onecurve data pack": "my_texts/ --out packed",
    "onecurve data index": "'shards/train-*.tar'",
    "onecurve data check": "'shards/train-*.tar'",
    "onecurve data order": "--steps 1:2",
    "onecurve data stats": "'shards/train-*.tar'",
}
# Within sentences a command may be named without what it needs.
NAMED = REST | {
    "onecurve checkpoint restore": "runs/mine",
    "onecurve evaluate": "runs/mine",
    "onecurve export": "runs/mine",
    "onecurve replay": "runs/mine --step 3",
    "onecurve report": "runs/mine",
    "onecurve sample": "runs/mine",
    "onecurve status": "runs/mine",
    "onecurve submit": "launch.gpus_per_node=4",
    "onecurve cancel": "runs/mine",
}


def lines(text: str) -> Iterator[str]:
    """Yields the command lines of a block: continued lines joined; what two spaces set apart is a description."""
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        if command := re.split(r"\s{2,}", line.strip())[0]:
            yield command


def variants(line: str, rest: dict[str, str] = REST) -> Iterator[str]:
    """Yields each command that a line shows, as it could be typed: `ls|verify` are two."""
    for told, meant in PLACEHOLDERS.items():
        line = line.replace(told, meant)
    choices = [part.split("|") for part in re.findall(r"(?<=\s)\w+(?:\|\w+)+(?=\s)", line)]
    for chosen in product(*choices):
        command = line
        for alternatives, one in zip(choices, chosen, strict=True):
            command = command.replace("|".join(alternatives), one, 1)
        if command.endswith(" ..."):
            bare = command.removesuffix(" ...")
            command = f"{bare} {rest.get(bare, '')}"
        yield command.strip()


def words(command: str, folder: Path) -> list[str]:
    """Returns what bash makes of a command in this folder: quotes, globs, variables and comments are its business."""
    printed = subprocess.run(
        ["bash", "-uc", f"printf '%s\\0' {command}"], cwd=folder, capture_output=True, check=True, env=os.environ
    )
    return printed.stdout.decode().split("\0")[:-1]
