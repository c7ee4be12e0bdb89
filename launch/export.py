"""`onecurve export RUN_DIR`: a checkpoint's weights, for transformers where it knows the model, else as one file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
LARGEST = "5GB"


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "export", help="a checkpoint's weights: a folder that transformers loads, or a safetensors file"
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "overrides", nargs="*", metavar="model.weights=PATH", help="where the weights that it began with are now"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder to write (default: RUN_DIR/export), or a file that ends in .safetensors: the weights alone, under "
        "the names they have here. Where transformers has no such model it is a file always (default: "
        "RUN_DIR/model.safetensors)",
    )
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="convert to it (default: as trained)")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (optimizer.ema)")
    parser.add_argument(
        "--shard-size",
        type=size,
        metavar="SIZE",
        help=f"largest file in the folder, such as 500MB (default: {LARGEST})",
    )
    parser.add_argument("--plugins", nargs="*", default=[], help="packages of yours that the run's classes come from")
    parser.set_defaults(func=export)


def size(text: str) -> int:
    """Parses a size such as `500MB` or `2GB` into a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip(), re.IGNORECASE)
    if match is None or not (count := int(float(match[1]) * UNITS[match[2].upper()])):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 500MB or 2GB")
    return count


def export(arguments: argparse.Namespace) -> int:
    from trainer.errors import ConfigError
    from trainer.export import PlainModel, Weights, count_elements, find_checkpoint, to_transformers
    from trainer.models.family import UnknownFamily, family_of
    from trainer.models.pretrained_files import read_kept
    from trainer.models.weight_files import write_file
    from trainer.precision import DTYPES
    from trainer.sampling import open_run, where_weights_are

    folder, family, why = arguments.run_dir, None, "--out names one file"
    config, tokenizer = open_run(folder, arguments.plugins, where_weights_are(arguments.overrides))
    source = find_checkpoint(folder, arguments.step)
    if arguments.out is None or arguments.out.suffix != ".safetensors":
        try:
            family = family_of(config, tokenizer)
        except UnknownFamily as reason:
            why = str(reason)
    plain = PlainModel(config, tokenizer, source) if config.model.transforms else None
    tensors = Weights(source, arguments.ema, DTYPES.get(arguments.dtype), plain).tensors(family)
    out = arguments.out or folder / ("export" if family else "model.safetensors")
    try:
        if family:
            out.mkdir(parents=True, exist_ok=True)
            base = read_kept(folder, getattr(config.model, "weights", None))
            to_transformers(out, tensors, family, arguments.shard_size or size(LARGEST), folder, base)
        elif arguments.shard_size:
            raise ConfigError(f"--shard-size: this export is one file: {why}")
        else:
            out = out / "model.safetensors" if out.is_dir() else out
            write_file(out, tensors, {"run": config.run.name})
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from error
    print(f"{out}: {len(tensors)} tensors, {count_elements(tensors):,} numbers, of step {source.manifest['step']}")
    print(f"transformers.AutoModelForCausalLM.from_pretrained('{out}')" if family else f"no config.json: {why}")
    return 0
