"""`onecurve data pack INPUT... --out DIR`: text, JSONL, parquet or folders of images into shards."""

from __future__ import annotations

import argparse
import json
import shlex
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
        "inputs", nargs="+", type=Path, metavar="INPUT", help=".txt .md .jsonl [.gz .xz .zst], .parquet, folders"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the data set's folder; must not exist")
    parser.add_argument("--kind", choices=["texts", "images"], help="what is packed of a folder that holds both")
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
    text.add_argument("--separator", metavar="TOKEN", help="token that ends a document (default: the tokenizer's own)")
    text.add_argument(
        "--on-error", choices=["fail", "skip"], default="fail", help="what a document that cannot be read does"
    )
    images = parser.add_argument_group("images")
    images.add_argument("--labels", choices=["folder", "none"], default="folder", help="what the member cls is from")
    parser.set_defaults(func=pack)


def pack(arguments: argparse.Namespace) -> int:
    """Packs the inputs into shards and prints the result."""
    from trainer.data.tools.pack import Options, pack_inputs
    from trainer.data.tools.parallel import cores

    if not 0 < arguments.shard_mb < float("inf"):
        raise ConfigError(f"--shard-mb: must be a number above 0, not {arguments.shard_mb:g}")
    if arguments.workers is not None and arguments.workers < 1:
        raise ConfigError(f"--workers: must be at least 1, not {arguments.workers}")
    options = Options(
        kind=arguments.kind,
        validation=arguments.validation,
        shard_bytes=int(arguments.shard_mb * 2**20),
        split=arguments.split,
        text_field=arguments.text_field,
        keep_json=arguments.keep_json,
        field=arguments.field,
        tokenizer=arguments.tokenizer,
        separator=arguments.separator,
        tokenize=arguments.tokenize,
        on_error=arguments.on_error,
        labels=arguments.labels == "folder",
    )
    workers = arguments.workers or cores()
    try:
        with progress() as report:
            left_out = pack_inputs(
                arguments.inputs, arguments.out, options, workers=workers, restart=arguments.restart, report=report
            )
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what is finished", file=sys.stderr)
        raise
    if left_out:
        print(f"left out: {len(left_out)} files of other kinds, such as {left_out[0]}", file=sys.stderr)
    _print_result(arguments.out, arguments.tokenizer)
    return 0


def _print_result(out: Path, tokenizer: str) -> None:
    """Prints what was packed, and the command that trains on it."""
    dataset = json.loads((out.expanduser() / "dataset.json").read_text(encoding="utf-8"))
    if skipped := dataset.get("skipped"):
        print(f"skipped: {skipped['documents']} documents that cannot be read, such as", file=sys.stderr)
        print("\n".join(f"  {cause}" for cause in skipped["such_as"]), file=sys.stderr)
    shards = {name: str(out / split["shards"]) for name, split in dataset["splits"].items() if split["shards"]}
    for name, split in dataset["splits"].items():
        if split["shards"]:
            tokens = _tokens(out, name, dataset)
            print(f"{name}: {split['samples']} samples, {size(split['bytes'])}{tokens}, {shards[name]}")
    if "tokenizer" in dataset:
        target, vocab_size = tokenizer.removeprefix("bpe:"), dataset["tokenizer"]["vocab_size"]
        fewer = target.isdecimal() and int(target) > vocab_size
        why = f" (not {target}: the texts have no more pairs to merge)" if fewer else ""
        print(f"tokenizer: {_tokenizer(out, dataset)}, {vocab_size} tokens{why}")
    if "classes" in dataset:
        print(f"classes: {out / 'classes.json'}, {dataset['classes']} of them")
    overrides = [f"data.shards={shards['train']}"]
    overrides += [f"data.validation={shards['validation']}"] if "validation" in shards else []
    if "tokenizer" in dataset:
        field = [f"data.field={dataset['field']}"] if dataset["field"] != "txt" else []
        data = ["data=webdataset", *overrides, f"data.tokenizer={_tokenizer(out, dataset)}", *field]
        print(f"train on it: onecurve train {shlex.join(data)}")
    else:
        label = ", label: cls" if "classes" in dataset else ""
        fields = f'data.fields={{image: "{_images(out, dataset)}"{label}}}'
        classes = [f"data.classes={out / 'classes.json'}"] if "classes" in dataset else []
        data = ["data=samples", *overrides, fields, *classes, "data.image.size=224"]
        print(f"train a model of yours on it: onecurve train {shlex.join(data)} model.name=... objective.name=...")


def _tokenizer(out: Path, dataset: dict[str, Any]) -> str:
    load = dataset["tokenizer"]["load"]
    return load if load == "bytes" else str(out / load)


def _tokens(out: Path, split: str, dataset: dict[str, Any]) -> str:
    """Says how many tokens a split of text has: counted, or estimated from a part of it."""
    from trainer.data.shards import Shards
    from trainer.data.storage import Storage
    from trainer.data.tokenizer import load
    from trainer.data.tools.measure import about_tokens

    split_entry = dataset["splits"][split]
    if "tokens" in split_entry:
        return f", {split_entry['tokens']} tokens"
    if "tokenizer" not in dataset:
        return ""
    folder = out.expanduser()
    shards = Shards.open(str(folder / split_entry["shards"]), dataset["field"], Storage(folder))
    tokens = about_tokens(shards, load(_tokenizer(folder, dataset)))
    shards.close()
    return f", about {tokens} tokens"


def _images(out: Path, dataset: dict[str, Any]) -> str:
    """Returns the extensions of the images, as a field of `data=samples` names them."""
    from trainer.data.images import EXTENSIONS
    from trainer.data.shards import Shards
    from trainer.data.storage import Storage

    folder = out.expanduser()
    shards = Shards.open(str(folder / dataset["splits"]["train"]["shards"]), None, Storage(folder))
    extensions = {name for summary in shards.summaries for name in summary.fields if name in EXTENSIONS}
    return ";".join(sorted(extensions)) or "jpg"
