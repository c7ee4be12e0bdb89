"""`onecurve checkpoint ls | verify | diff | prune | restore`: what a run saved, whether it is whole, what differs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import checkpoint_prune, checkpoint_restore
from launch.checkpoint_names import (
    find_checkpoint,
    list_checkpoints,
    pick_step,
    printable,
    raise_as_config_error,
    step_of,
)
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
    """Prints a table of all checkpoints in rising order of steps, including those that were set aside."""
    from trainer.checkpoint import inspection
    from trainer.tracking.jsonl import dumps

    with raise_as_config_error("RUN_DIR", arguments.run_dir):
        paths = list_checkpoints(arguments.run_dir, set_aside=True)
        infos = [info for path in paths if (info := inspection.inspect_checkpoint(path))]
    if arguments.json:
        for info in infos:
            print(dumps(_row(info)))
        return 0
    table = [("step", "bytes", "tensors", "written", "saved on", "strategy", "loss", "state")]
    for line in _aligned([*table, *(_cells(_row(info)) for info in infos)], right=3):
        print(line)
    total = size(sum(info.bytes for info in infos))
    print(f"{total}; of `whole` ones only sizes were checked: verify reads every byte")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Prints one line for each checkpoint; returns exit code 4 if one of them is damaged."""
    from trainer.checkpoint import inspection

    damaged = False
    with raise_as_config_error("RUN_DIR", arguments.run_dir):
        paths = list_checkpoints(arguments.run_dir)
        for path in paths if arguments.step is None else [pick_step(paths, arguments.step, "--step ")]:
            if info := inspection.inspect_checkpoint(path, contents=not arguments.fast):
                how = "sizes only" if arguments.fast else "every byte checked"
                whole = f"whole ({how}, {size(info.bytes)})"
                print(f"{path.name}: {f'damaged: {printable(info.problem)}' if info.problem else whole}", flush=True)
                damaged |= info.problem is not None
    return TrainingError.exit_code if damaged else 0


def diff(arguments: argparse.Namespace) -> int:
    """Prints what differs between two checkpoints; returns exit code 1 if a tensor does."""
    from trainer.checkpoint import inspection
    from trainer.tracking.jsonl import read as read_rows

    a, b = find_checkpoint("A", arguments.A), find_checkpoint("B", arguments.B)
    print(f"A  {a.path}\nB  {b.path}")
    for name, *sides in inspection.changes(a.manifest, b.manifest):
        before, after = (json.dumps(side[0]) if side else "(none)" for side in sides)
        print(f"{printable(name)}: {before} -> {after}")
    metrics = [checkpoint.path.parents[1] / "metrics.jsonl" for checkpoint in (a, b)]
    if metrics[0] != metrics[1] and (split := inspection.split_step(*map(read_rows, metrics))):
        print(f"the runs part at step {split[0]}: the first difference is in {split[1]}")
    with raise_as_config_error("A or B", f"{a.path}, {b.path}"):
        comparison = inspection.compare(a, b)
    for line in _tensor_lines(comparison):
        print(line)
    return 0 if comparison.same else 1


def _row(info: CheckpointInfo) -> dict[str, Any]:
    """Returns what `ls` says of a checkpoint: `state` is `whole`, `damaged` or `set aside`, `problem` the reason."""
    is_set_aside, strategy = info.path.name.startswith("."), info.value_of("config.strategy.name")
    return {
        "checkpoint": info.path.name,
        "step": step_of(info.path),
        "bytes": info.bytes,
        "tensors": info.tensors,
        "written": info.saved_at and datetime.fromtimestamp(info.saved_at).astimezone().isoformat(timespec="seconds"),
        "topology": info.value_of("topology"),
        "strategy": strategy,
        "evaluation": info.evaluation or None,
        "state": "set aside" if is_set_aside else "damaged" if info.problem else "whole",
        "problem": info.problem,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    """Returns the cells of a row of the table."""
    topology, loss = row["topology"], (row["evaluation"] or {}).get("loss")
    state = f"set aside as {row['checkpoint']}" if row["state"] == "set aside" else row["state"]
    return [
        str(row["step"]),
        size(row["bytes"]),
        "-" if row["tensors"] is None else str(row["tensors"]),
        "-" if row["written"] is None else row["written"][:19].replace("T", " "),
        printable(f"{topology.get('processes')} x {topology.get('device')}") if isinstance(topology, dict) else "-",
        printable(row["strategy"] or "-"),
        f"{loss:.4f}" if isinstance(loss, (int, float)) else "-",
        f"{state}: {printable(row['problem'])}" if row["problem"] else state,
    ]


def _aligned(rows: Sequence[Sequence[str]], right: int) -> Iterator[str]:
    """Yields rows as columns of equal width, of which the first `right` ones are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if i < right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _tensor_lines(comparison: Comparison) -> Iterator[str]:
    """Yields the lines that compare tensors."""
    for side, names in zip("AB", comparison.only, strict=True):
        yield from (f"only in {side}: {printable(name)}" for name in names)
    for name, a, b in comparison.reshaped:
        yield f"{printable(name)}: {a.dtype} {list(a.shape)} -> {b.dtype} {list(b.shape)}"
    count = len(comparison.equal) + len(comparison.different)
    yield f"{len(comparison.equal)} of {count} common tensors are equal to the bit"
    if worst := comparison.different[:WORST]:
        yield f"the largest differences of {len(comparison.different)}, relative to the tensor's largest number:"
        rows = [(f"{tensor.relative:.3g}", f"{tensor.absolute:.3g}", printable(tensor.name)) for tensor in worst]
        yield from _aligned([("relative", "absolute", "name"), *rows], right=2)
