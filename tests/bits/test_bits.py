"""`train.deterministic=topology`: loss, norm, weights and moments have the bits of one process, on any topology."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bits import cells

ROOT = Path(__file__).parents[2]
Found = dict[str, Any]


def run(processes: int, which: str, folder: Path) -> Found:
    """The bits of all cells of that many processes, by cell, variant, layers and processes."""
    out = folder / f"{processes}.json"
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "tests.bits.rank", str(out), which]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-8000:]
    return {f"{name} on {processes}": bits for name, bits in json.loads(out.read_text()).items()}


def differences(found: Found, single: Found) -> dict[str, list[str]]:
    """What is not the same, one sentence each, by cell; nothing of cells that are."""
    problems: dict[str, list[str]] = {}
    for name, bits in found.items():
        variant, _, layers = name.partition(", ")[2].partition(" on ")[0].partition(", ")
        expected = single[f"single, {variant}, {layers} on 1"]
        steps = [i for i, (ours, theirs) in enumerate(zip(bits["steps"], expected["steps"], strict=True), 1)
                 if ours != theirs]  # fmt: skip
        of_cell = [f"loss or norm differ from step {steps[0]} on"] if steps else []
        if bits["state"].keys() != expected["state"].keys():
            of_cell.append("other names")
        elif others := [key for key, digest in bits["state"].items() if digest != expected["state"][key]]:
            of_cell.append(f"{len(others)} tensors differ, such as {others[0]}")
        if of_cell:
            problems[name] = of_cell
    return problems


def test_quick_cut(tmp_path: Path) -> None:
    single, two = run(1, "quick", tmp_path), run(2, "quick", tmp_path)
    assert len(two) == sum(len(cell.quick) for cell in cells.cells() if cell.processes == 2)
    assert differences(two, single) == {}


@pytest.mark.slow
def test_all_of_it(tmp_path: Path) -> None:
    single, found = run(1, "all", tmp_path), Found()
    for processes in (2, 3, 4):
        found |= run(processes, "all", tmp_path)
    assert len(found) == len(list(cells.cells())) * len(cells.VARIANTS)
    assert differences(found, single) == {}


@pytest.mark.slow
def test_a_planted_difference_is_seen_in_every_cell(tmp_path: Path) -> None:
    single, planted = run(1, "quick", tmp_path), run(2, "planted", tmp_path)
    assert differences(planted, single).keys() == planted.keys()
