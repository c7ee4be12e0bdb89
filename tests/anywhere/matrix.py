"""Saved under one strategy at step 20, gone on under another to step 40: against one process that did all 40 steps.

`make anywhere` runs all of it and renews docs/anywhere.json and the table in docs/CHECKPOINTS.md.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.anywhere.cells import COMMON, SAVED_AT, STEPS, Cell, cells
from tests.parity.matrix import ROOT, kept, written
from tests.runs import Run
from trainer.checkpoint.format import folder_name

RESULT = ROOT / "docs" / "anywhere.json"
LIMITS = {"loss": 1e-5, "norm": 1e-4}  # invariant I3, relative, on every step
Found = Mapping[str, Mapping[str, dict[str, Any]]]  # from -> to -> differences


def together(cell_runs: Iterable[tuple[Cell, Path]]) -> None:
    """Trains each in its folder: those of as many processes in one launch."""
    jobs: dict[int, list[list[str]]] = {}
    for cell, folder in cell_runs:
        jobs.setdefault(cell.processes, []).append([*COMMON, *cell.overrides, f"run.dir={folder}"])
    for processes, its in sorted(jobs.items()):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(its, file)
            file.flush()
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            done = subprocess.run(
                [*launcher, "-m", "tests.anywhere.rank", file.name],
                cwd=ROOT,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        if done.returncode:
            raise RuntimeError(f"{processes} processes: exit code {done.returncode}\n{done.stderr[-8000:]}")


def straight(folder: Path, wanted: Iterable[Cell]) -> None:
    """All steps of each in one go, in `folder/<cell>`; with a checkpoint half way."""
    together((cell, folder / cell.folder) for cell in wanted)


def moved(folder: Path, pairs: Iterable[tuple[Cell, Cell]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Goes on from each first one's half-way checkpoint as the second one."""
    begun = []
    for source, target in pairs:
        run = folder / f"{source.folder}-to-{target.folder}"
        shutil.copytree(folder / source.folder, run)
        shutil.rmtree(run / "checkpoints" / folder_name(STEPS))
        begun.append((source, target, run))
    together((target, run) for _, target, run in begun)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    single = Run(folder / next(cells()).folder)
    for source, target, run in begun:
        found.setdefault(_name(source), {})[_name(target)] = away(
            Run(run), single, Run(folder / target.folder) if source == target else None
        )
        shutil.rmtree(run)
    return found


def away(run: Run, single: Run, same: Run | None) -> dict[str, Any]:
    """How far a run is off `single`, relative, the most of all steps. `same`: what it has to equal to the bit."""
    rows, theirs = run.metrics(), single.metrics()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert f"resume at step {SAVED_AT}" in _resumed(run)
    found: dict[str, Any] = {"ledger": run.ledger() == single.ledger()}
    for name, key in (("loss", "loss"), ("norm", "grad_norm")):
        pairs = [(row[key], other[key]) for row, other in zip(rows, theirs, strict=True)]
        found[name] = max(abs(a - b) / abs(b) for a, b in pairs)
    if same is not None:
        ours, its = run.weights(), same.weights()
        equal = ours.keys() == its.keys() and all(torch.equal(ours[name], its[name]) for name in ours)
        found["bits"] = equal and run.curve() == same.curve()
    return found


def _resumed(run: Run) -> list[str]:
    return [f"resume at step {row['step']}" for row in run.rows("events.jsonl") if row["kind"] == "resume"]


def red(found: Found) -> list[str]:
    """What is not as it should be."""
    problems = []
    for source, targets in found.items():
        for target, errors in targets.items():
            wrong = [name for name, most in LIMITS.items() if not errors[name] <= most]
            wrong += [name for name in ("ledger", "bits") if not errors.get(name, True)]
            problems += [f"from {source} to {target}: {name} is {errors[name]}" for name in wrong]
    return problems


def everything() -> Found:
    with tempfile.TemporaryDirectory() as name:
        folder, all_cells = Path(name), list(cells())
        straight(folder, all_cells)
        pairs = [
            (source, target)
            for target in all_cells
            for source in all_cells
            if (source.anywhere and target.anywhere) or source == target
        ]
        return moved(folder, pairs)


def table(found: Found) -> Iterator[str]:
    """From (rows) into (columns): the largest relative difference of the loss; = where all bits are the same."""
    names = [_name(cell) for cell in cells() if cell.anywhere]
    yield f"| from \\ into | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    for source in names:
        texts = [f"{found[source][name]['loss']:.0e}" + " =" * found[source][name].get("bits", False) for name in names]
        yield f"| {source} | {' | '.join(texts)} |"
    yield ""
    others = [_name(cell) for cell in cells() if not cell.anywhere]
    yield f"Resumed where they were, also the same bits: {', '.join(others)}."


def _name(cell: Cell) -> str:
    return f"{cell.name} on {cell.processes}"


def main() -> None:
    found = everything()
    if problems := red(found):
        raise SystemExit("\n".join(problems))
    page = ROOT / "docs" / "CHECKPOINTS.md"
    page.write_text(written(page.read_text(), "anywhere", table(kept(found, RESULT))))


if __name__ == "__main__":
    main()
