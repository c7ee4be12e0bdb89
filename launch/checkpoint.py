"""`onecurve checkpoint ls | verify | diff | prune | restore`: what a run saved, whether it is whole, what differs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import checkpoint_prune, checkpoint_restore
from launch.checkpoint_names import named, of_step, readable, saved, shown, step_in
from launch.sizes import size
from trainer.errors import TrainingError

if TYPE_CHECKING:
    from trainer.checkpoint.inspection import CheckpointInfo, Comparison

WORST = 10  # differing tensors that are named


def add_commands(subparsers: Any) -> None:
    parent = subparsers.add_parser("checkpoint", help="list, verify, compare, delete and restore checkpoints")
    commands = parent.add_subparsers(metavar="COMMAND", required=True)

    parser = commands.add_parser("ls", help="what each checkpoint is, and whether it counts")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, for machines")
    parser.set_defaults(func=ls)

    parser = commands.add_parser("verify", help="check every byte; exit code 4 if one is damaged; changes nothing")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--step", type=int, metavar="N", help="only the checkpoint of this step")
    parser.add_argument("--fast", action="store_true", help="check only that all files are there, of their sizes")
    parser.set_defaults(func=verify)

    about = """What differs between two checkpoints. Exit code 0 if every tensor is the same to the bit, else 1;
    differences of the config, identity, topology or progress are told, but do not make it 1."""
    parser = commands.add_parser("diff", help="what differs between two checkpoints", description=about)
    for name in ("A", "B"):
        parser.add_argument(name, help="a checkpoint's folder, RUN_DIR (its newest whole one) or RUN_DIR:STEP")
    parser.set_defaults(func=diff)

    checkpoint_prune.add_command(commands)
    checkpoint_restore.add_command(commands)


def ls(arguments: argparse.Namespace) -> int:
    """Prints a table of all, also of those set aside, in rising order of steps."""
    from trainer.checkpoint import inspection
    from trainer.tracking.jsonl import dumps

    with readable("RUN_DIR", arguments.run_dir):
        found = [it for path in saved(arguments.run_dir, aside=True) if (it := inspection.inspect_checkpoint(path))]
    if arguments.json:
        for it in found:
            print(dumps(_row(it)))
        return 0
    table = [("step", "bytes", "tensors", "written", "saved on", "strategy", "loss", "state")]
    for line in _aligned([*table, *(_cells(_row(it)) for it in found)], right=3):
        print(line)
    print(f"{size(sum(it.bytes for it in found))}; of `whole` ones only sizes were checked: verify reads every byte")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Prints one line a checkpoint. Exit code 4 if one does not count."""
    from trainer.checkpoint import inspection

    damaged = False
    with readable("RUN_DIR", arguments.run_dir):
        paths = saved(arguments.run_dir)
        for path in paths if arguments.step is None else [of_step(paths, arguments.step, "--step ")]:
            if it := inspection.inspect_checkpoint(path, contents=not arguments.fast):
                how = "sizes only" if arguments.fast else "every byte checked"
                whole = f"whole ({how}, {size(it.bytes)})"
                print(f"{path.name}: {f'damaged: {shown(it.problem)}' if it.problem else whole}", flush=True)
                damaged |= it.problem is not None
    return TrainingError.exit_code if damaged else 0


def diff(arguments: argparse.Namespace) -> int:
    """Prints what differs. Exit code 1 if a tensor does."""
    from trainer.checkpoint import inspection
    from trainer.tracking.jsonl import read as read_rows

    a, b = named("A", arguments.A), named("B", arguments.B)
    print(f"A  {a.path}\nB  {b.path}")
    for name, *sides in inspection.changes(a.manifest, b.manifest):
        before, after = (json.dumps(side[0]) if side else "(none)" for side in sides)
        print(f"{shown(name)}: {before} -> {after}")
    metrics = [found.path.parents[1] / "metrics.jsonl" for found in (a, b)]
    if metrics[0] != metrics[1] and (apart := inspection.split_step(*map(read_rows, metrics))):
        print(f"the runs part at step {apart[0]}: the first difference is in {apart[1]}")
    with readable("A or B", f"{a.path}, {b.path}"):
        compared = inspection.compare(a, b)
    for line in _told(compared):
        print(line)
    return 0 if compared.same else 1


def _row(it: CheckpointInfo) -> dict[str, Any]:
    """What `ls` tells of a checkpoint. The state is `whole`, `damaged` or `set aside`, `problem` the reason."""
    aside, strategy = it.path.name.startswith("."), it.value_of("config.strategy.name")
    return {
        "checkpoint": it.path.name,
        "step": step_in(it.path),
        "bytes": it.bytes,
        "tensors": it.tensors,
        "written": it.written and datetime.fromtimestamp(it.written).astimezone().isoformat(timespec="seconds"),
        "topology": it.value_of("topology"),
        "strategy": strategy,
        "evaluation": it.evaluation or None,
        "state": "set aside" if aside else "damaged" if it.problem else "whole",
        "problem": it.problem,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    at, loss = row["topology"], (row["evaluation"] or {}).get("loss")
    state = f"set aside as {row['checkpoint']}" if row["state"] == "set aside" else row["state"]
    return [
        str(row["step"]),
        size(row["bytes"]),
        "-" if row["tensors"] is None else str(row["tensors"]),
        "-" if row["written"] is None else row["written"][:19].replace("T", " "),
        shown(f"{at.get('processes')} x {at.get('device')}") if isinstance(at, dict) else "-",
        shown(row["strategy"] or "-"),
        f"{loss:.4f}" if isinstance(loss, (int, float)) else "-",
        f"{state}: {shown(row['problem'])}" if row["problem"] else state,
    ]


def _aligned(rows: Sequence[Sequence[str]], right: int) -> Iterator[str]:
    """Columns, the first of them to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if i < right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _told(compared: Comparison) -> Iterator[str]:
    """The lines on tensors."""
    for side, names in zip("AB", compared.only, strict=True):
        yield from (f"only in {side}: {shown(name)}" for name in names)
    for name, a, b in compared.reshaped:
        yield f"{shown(name)}: {a.dtype} {list(a.shape)} -> {b.dtype} {list(b.shape)}"
    count = len(compared.equal) + len(compared.different)
    yield f"{len(compared.equal)} of {count} common tensors are equal to the bit"
    if worst := compared.different[:WORST]:
        yield f"the largest differences of {len(compared.different)}, relative to the tensor's largest number:"
        rows = [(f"{it.relative:.3g}", f"{it.absolute:.3g}", shown(it.name)) for it in worst]
        yield from _aligned([("relative", "absolute", "name"), *rows], right=2)
