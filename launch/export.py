"""`onecurve export RUN_DIR`: the newest checkpoint's weights as one safetensors file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("export", help="the newest checkpoint's weights as safetensors")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="file to write (default: RUN_DIR/model.safetensors)")
    parser.add_argument("--plugins", nargs="*", default=[], help="packages of yours that the run's classes come from")
    parser.set_defaults(func=export)


def export(arguments: argparse.Namespace) -> int:
    import safetensors.torch

    from trainer.errors import ConfigError
    from trainer.files import replace_file
    from trainer.sampling import load_run

    config, model, _ = load_run(arguments.run_dir, arguments.plugins)
    out = arguments.out or arguments.run_dir / "model.safetensors"
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    try:
        replace_file(out, safetensors.torch.save(weights, metadata={"run": config.run.name, "format": "pt"}))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from error
    print(f"{out}: {len(weights)} tensors, {sum(tensor.numel() for tensor in weights.values()):,} numbers")
    return 0
