"""`onecurve sample RUN_DIR`: text from a run's newest checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("sample", help="text from a run's newest checkpoint")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "overrides", nargs="*", metavar="model.weights=PATH", help="where the weights that it began with are now"
    )
    parser.add_argument("--prompt", help="text to continue (default: the run's sample.prompt)")
    parser.add_argument("--count", type=int, help="how many samples")
    parser.add_argument("--tokens", type=int, help="tokens of a sample")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int, dest="top_k")
    parser.add_argument("--plugins", nargs="*", default=[], help="packages of yours that the run's classes come from")
    parser.set_defaults(func=sample)


def sample(arguments: argparse.Namespace) -> int:
    from trainer import sampling
    from trainer.config.schema import Sample
    from trainer.config.validate import validate_section

    config, model, tokenizer = sampling.load_run(arguments.run_dir, arguments.plugins, arguments.overrides)
    options = {name: value for name in Sample.model_fields if (value := getattr(arguments, name, None)) is not None}
    section = validate_section("sample", Sample, {**config.sample.model_dump(), **options})
    config = config.model_copy(update={"sample": section})
    print("\n\n---\n\n".join(sampling.sample(config, model, tokenizer)))
    return 0
