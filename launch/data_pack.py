"""`onecurve data pack INPUT... --out DIR`: text, JSONL, parquet or folders of images into shards."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from launch.progress import progress
from launch.sizes import size
from trainer.errors import ConfigError


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "pack",
        help="pack text, JSONL, parquet or folders of images into shards",
        description="The folder DIR appears when all is done. Killed or interrupted, the same command goes on from "
        "what is finished. The result does not depend on the number of workers.",
    )
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help=".txt .md .jsonl [.gz .xz], .parquet, folders"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the data set's folder; must not exist")
    parser.add_argument("--validation", type=float, default=0.05, metavar="SHARE", help="share of samples held out")
    parser.add_argument("--shard-mb", type=float, default=64, help="size of a shard, MiB")
    parser.add_argument("--workers", type=int, default=None, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--restart", action="store_true", help="drop what another, interrupted command left for DIR")
    text = parser.add_argument_group("text")
    text.add_argument("--split", choices=["file", "paragraphs", "lines"], default="file", help="what is a document")
    text.add_argument("--text-field", default="text", metavar="NAME", help="key of JSONL, column of parquet")
    text.add_argument("--keep-json", action="store_true", help="keep the other keys or columns as a member json")
    text.add_argument("--field", default="txt", help="name of the member that holds the text")
    text.add_argument("--tokenizer", default="bpe:1024", help="bpe:SIZE, chars, bytes or a tokenizer.json")
    text.add_argument("--tokenize", action="store_true", help="store token ids (member u16 or u32) instead of text")
    images = parser.add_argument_group("images")
    images.add_argument("--labels", choices=["folder", "none"], default="folder", help="what the member cls is from")
    parser.set_defaults(func=pack)


def pack(arguments: argparse.Namespace) -> int:
    """Packs, then prints what came of it."""
    from trainer.data.tools.pack import Options, pack_inputs
    from trainer.data.tools.parallel import cores

    if not 0 < arguments.shard_mb < float("inf"):
        raise ConfigError(f"--shard-mb: must be a number above 0, not {arguments.shard_mb:g}")
    if arguments.workers is not None and arguments.workers < 1:
        raise ConfigError(f"--workers: must be at least 1, not {arguments.workers}")
    options = Options(
        validation=arguments.validation,
        shard_bytes=int(arguments.shard_mb * 2**20),
        split=arguments.split,
        text_field=arguments.text_field,
        keep_json=arguments.keep_json,
        field=arguments.field,
        tokenizer=arguments.tokenizer,
        tokenize=arguments.tokenize,
        labels=arguments.labels == "folder",
    )
    workers = arguments.workers or cores()
    try:
        with progress() as told:
            left_out = pack_inputs(
                arguments.inputs, arguments.out, options, workers=workers, restart=arguments.restart, told=told
            )
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what is finished", file=sys.stderr)
        raise
    if left_out:
        print(f"left out: {len(left_out)} files of other kinds, such as {left_out[0]}", file=sys.stderr)
    _tell(arguments.out)
    return 0


def _tell(out: Path) -> None:
    made = json.loads((out.expanduser() / "dataset.json").read_text(encoding="utf-8"))
    for name, split in made["splits"].items():
        if split["shards"]:
            tokens = f", {split['tokens']} tokens" if "tokens" in split else ""
            print(f"{name}: {split['samples']} samples, {size(split['bytes'])}{tokens}, {out / split['shards']}")
    if "tokenizer" in made:
        load = made["tokenizer"]["load"]
        place = load if load == "bytes" else str(out / load)
        print(f"tokenizer: {place}, {made['tokenizer']['vocab_size']} tokens")
        if made["field"] != "txt":
            print(f"train with data.field={made['field']} data.tokenizer={place}")
    if "classes" in made:
        print(f"classes: {out / 'classes.json'}, {made['classes']} of them")
