"""`onecurve recipes`: every experiment, what it does, on which hardware, how long it takes, and what comes out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config.recipes import Recipe


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("recipes", help="every experiment: what it does, its hardware, minutes and target")
    parser.add_argument("--json", action="store_true", help="as a list of objects")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="also those in DIR/experiment, your own")
    parser.set_defaults(func=show)


def show(arguments: argparse.Namespace) -> int:
    from trainer.config.recipes import recipes
    from trainer.errors import ConfigError

    if arguments.config_dir and not arguments.config_dir.is_dir():
        raise ConfigError(f"--config-dir {arguments.config_dir}: no such folder")
    experiments = recipes(arguments.config_dir)
    if arguments.json:
        print(json.dumps(list(map(asdict, experiments)), indent=2))
        return 0
    for recipe in experiments:
        print(f"experiment={recipe.name}: {recipe.what}")
        for name, value in _facts(recipe):
            print(f"    {name:9} {value}")
    return 0


def _facts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.hardware:
        yield "hardware", recipe.hardware
    if recipe.minutes is not None:
        yield "minutes", f"{recipe.minutes:g}"
    if recipe.metric:
        yield "target", _target(recipe)
    if recipe.run:
        yield "run", recipe.run


def _target(recipe: Recipe) -> str:
    return f"{recipe.metric} {recipe.target:g}" if recipe.target is not None else recipe.metric


def renew_table(page: str) -> str:
    """Returns the text of README with the table between its marks brought up to date."""
    from trainer.config.recipes import recipes

    before, begin, remainder = page.partition("<!-- recipes -->\n")
    _, end, after = remainder.partition("<!-- end of recipes -->")
    if not (begin and end):
        raise ValueError("the page has no marks of recipes")
    return before + begin + "\n".join(table(recipes())) + "\n" + end + after


def table(recipes: Iterable[Recipe]) -> list[str]:
    """Returns the lines of the table in README."""
    lines = ["| `experiment=` | | hardware | minutes | target |", "|---|---|---|---|---|"]
    for recipe in recipes:
        minutes = "" if recipe.minutes is None else f"{recipe.minutes:g}"
        target = _target(recipe) if recipe.metric else ""
        lines.append(f"| `{recipe.name}` | {recipe.what} | {recipe.hardware} | {minutes} | {target} |")
    return lines


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    readme.write_text(renew_table(readme.read_text()))
