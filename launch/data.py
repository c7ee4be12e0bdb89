"""`onecurve data pack | index | check`: making shards, indexing them, and finding what is wrong with them."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import track

from trainer.data.documents import SPLITS
from trainer.data.index import SIDECAR, ShardIndex, expand
from trainer.data.write import SHARD_BYTES, pack_text
from trainer.errors import ConfigError, DataError
from trainer.files import sha256


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    """Registers `data` and its commands; each sets `func`: parsed arguments in, exit code out."""
    data = subparsers.add_parser("data", help="pack, index and check tar shards", description=__doc__)
    commands = data.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("pack", help="pack text files into shards and a tokenizer")
    command.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help=".txt .md .jsonl [.xz .gz], folders")
    command.add_argument("--out", required=True, type=Path, help="the dataset's folder; must not exist")
    command.add_argument("--tokenizer", default="bpe:1024", help="bpe:SIZE, chars, bytes or a tokenizer.json")
    command.add_argument("--validation", type=float, default=0.05, metavar="SHARE", help="share of documents held out")
    command.add_argument("--split", choices=list(SPLITS), default="file", help="what a document is")
    command.add_argument("--field", default="txt", help="name of the member that holds the text")
    command.add_argument("--shard-mb", type=float, default=SHARD_BYTES / 2**20, help="size of a shard, MiB")
    command.set_defaults(func=pack)

    command = commands.add_parser("index", help="make the indexes beside shards; print what is in them")
    command.add_argument("shards", nargs="+", metavar="SHARDS", help="paths, globs, {000..007} ranges")
    command.set_defaults(func=index)

    command = commands.add_parser("check", help="walk shards from end to end; exit code 3 if any is damaged")
    command.add_argument("shards", nargs="+", metavar="SHARDS", help="paths, globs, {000..007} ranges")
    command.set_defaults(func=check)


def pack(args: argparse.Namespace) -> int:
    """Packs, then prints what came of it and how to train on it."""
    if not args.shard_mb > 0:
        raise ConfigError(f"--shard-mb: must be above 0, not {args.shard_mb}")
    with Console(stderr=True).status("packing") if sys.stdout.isatty() else nullcontext():
        pack_text(
            args.inputs,
            args.out,
            tokenizer=args.tokenizer,
            validation=args.validation,
            field=args.field,
            split=args.split,
            shard_bytes=int(args.shard_mb * 2**20),
        )
    made = json.loads((args.out.expanduser() / "dataset.json").read_text(encoding="utf-8"))
    for name, split in made["splits"].items():
        if split["shards"]:
            print(f"{name}: {split['samples']} samples, {_size(split['bytes'])}, {args.out / split['shards']}")
    load = made["tokenizer"]["load"]
    tokenizer = load if load == "bytes" else str(args.out / load)
    print(f"tokenizer: {tokenizer}, {made['tokenizer']['vocab_size']} tokens")
    return 0


def index(args: argparse.Namespace) -> int:
    """One line a shard, then the sums."""
    indexes = []
    for path in _progress(expand(args.shards, "SHARDS"), "indexing"):
        indexes.append(ShardIndex.open(path))
        if ShardIndex.load(Path(path + SIDECAR), path) is None:
            raise ConfigError(f"{path}{SIDECAR}: cannot be written (runs keep the index in their cache instead)")
        print(f"{path}: {_summary(indexes[-1:])}")
    print(f"{len(indexes)} shards: {_summary(indexes)}")
    return 0


def check(args: argparse.Namespace) -> int:
    """Prints what is wrong, one problem a line, and returns 3; or 0 and the sums if nothing is."""
    paths = expand(args.shards, "SHARDS")
    indexes, damaged = [], 0
    for path in _progress(paths, "checking"):
        try:
            indexes.append(ShardIndex.build(path))
            _compare(indexes[-1])
        except DataError as error:
            damaged += 1
            print(error)
    print(f"{len(paths)} shards, {damaged} damaged: {_summary(indexes)}")
    return DataError.exit_code if damaged else 0


def _compare(found: ShardIndex) -> None:
    """Compares a shard with what was written about it: its index, and the checksum of the packed dataset."""
    path = Path(found.path)
    stored = ShardIndex.load(Path(found.path + SIDECAR), found.path)
    if stored is not None and stored != found:
        raise DataError(f"{path}: is not what its index says; delete {path}{SIDECAR} if the shard is right")
    try:
        listed = json.loads((path.parent / "dataset.json").read_text(encoding="utf-8"))["sha256"][path.name]
    except (OSError, ValueError, KeyError, TypeError):
        return  # not a dataset that `pack` made
    if sha256(path) != listed:
        raise DataError(f"{path}: its checksum is not the one in dataset.json; payloads have changed")


def _summary(indexes: Sequence[ShardIndex]) -> str:
    """Samples, bytes and fields; a field that some samples lack, with their number."""
    samples = sum(len(index.keys) for index in indexes)
    counts = Counter(field for index in indexes for members in index.members for field in members)
    fields = (field if count == samples else f"{field} (in {count})" for field, count in sorted(counts.items()))
    size = _size(sum(index.size for index in indexes))
    return f"{samples} samples, {size}, fields: {', '.join(fields) or 'none'}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def _progress(paths: Sequence[str], what: str) -> Iterable[str]:
    """The paths, behind a progress bar on a terminal."""
    return track(paths, what, console=Console(stderr=True)) if sys.stdout.isatty() else paths
