"""Makes help for every key from the schema: the text of `--help` and the page docs/REFERENCE.md."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.config.compose import compose, options
from trainer.config.schema import SECTIONS, Section
from trainer.config.section import MISSING
from trainer.config.validate import keys
from trainer.registry import OPTIONS, TRANSFORMS

USAGE = """\
onecurve: kill it anywhere, resume it anywhere, the same curve.

usage: python -m trainer [key=value ...] [group=option ...]
       torchrun --nproc-per-node N -m trainer [...]
       onecurve train -n N [...]

Running the same command again continues the run. Of Hydra's options all work: --cfg job, --info, -m (sweeps),
--config-dir DIR (groups of your own), -sc (shell completion, for the command `onecurve-trainer`), --hydra-help.
"""


@dataclass(frozen=True)
class Key:
    name: str
    type: str
    default: str
    help: str


def help_text(width: int = 110) -> str:
    """Returns the text of `--help`: every key, section by section."""
    lines = [USAGE, f"experiments   experiment={'|'.join(options('experiment'))}", ""]
    for title, rows in sections():
        lines.append(title)
        for key in rows:
            lines.append(f"  {key.name}={key.default}   ({key.type})")
            lines += textwrap.wrap(key.help, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    return "\n".join(lines)


def markdown() -> str:
    """Returns the page docs/REFERENCE.md."""
    lines = [
        "# Every key",
        "",
        "Generated from the sections in `trainer/config` by `make docs`; a test keeps it current.",
        "`python -m trainer --help` prints the same. Defaults are those of `conf/`.",
        "",
        f"Whole recipes: {', '.join(f'`experiment={name}`' for name in options('experiment'))}.",
    ]
    for title, rows in sections():
        lines += ["", f"## {title}", "", "| key | default | type | |", "|---|---|---|---|"]
        lines += [f"| `{key.name}` | `{key.default}` | {_cell(key.type)} | {_cell(key.help)} |" for key in rows]
    return "\n".join(lines) + "\n"


def sections() -> Iterator[tuple[str, list[Key]]]:
    """Yields (title, keys) for each section and each option of a group; options with the same keys come once."""
    defaults, problems = compose([])
    assert not problems, problems
    for name, schema in SECTIONS.items():
        yield name, list(_rows(name, schema, defaults[name]))
    for group, choices in OPTIONS.items():
        schemas = {name: option.config for name, option in choices.items()}
        for schema in dict.fromkeys(schemas.values()):
            alike = [name for name, candidate in schemas.items() if candidate is schema]
            shown = "webdataset" if "webdataset" in alike else alike[0]
            values = defaults
            if defaults[group]["name"] != shown:
                shards = ["data.shards=''"] if shown == "webdataset" else []
                values, _ = compose(["experiment=none", f"{group}={shown}", *shards])
            yield f"{group}={'|'.join(alike)}", list(_rows(group, schema, values[group]))
        if group == "model":
            for name, option in TRANSFORMS.items():
                schema = option.config
                values = {key: MISSING if field.is_required() else field.default for key, field in keys(schema)}
                yield (
                    f"model.transforms.{name}",
                    list(_rows(f"model.transforms.{name}", schema, values | {"name": name})),
                )


def _rows(section: str, schema: type[Section], defaults: dict[str, Any]) -> Iterator[Key]:
    properties = schema.model_json_schema()
    for name, field in keys(schema):
        node, value = properties, defaults
        for part in name.split("."):
            node = _resolve(node["properties"][part], properties)
            value = value[part]
        default = value if isinstance(value, str) else json.dumps(value)
        yield Key(f"{section}.{name}", _type(node), default, field.description)


def _resolve(node: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    return root["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def _type(node: dict[str, Any]) -> str:
    """Describes a JSON schema node: `integer >= 1`, `none|full|selective`, ..."""
    if "enum" in node:
        return "|".join(map(str, node["enum"]))
    if "const" in node:
        return str(node["const"])
    if "anyOf" in node:
        return " or ".join(_type(part) for part in node["anyOf"])
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = " and ".join(f"{sign} {node[name]:g}" for name, sign in bounds.items() if name in node)
    kind = "list" if node["type"] == "array" else node["type"]
    return f"{kind} {limits}".strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
