"""The rooms of the building: who imports whom, late imports and those for types included, and how large files are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from onecurve.paths import ROOT

PACKAGES = ("trainer", "launch", "onecurve")
LINES = 400
MODULES_OF_THE_ROOT = 25


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (Path(ROOT) / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """Yields the modules of ours that a module names, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in modules() or node.module in modules():
                    yield name if name in modules() else node.module


def above(name: str) -> Iterator[str]:
    """Yields the packages that a module is in."""
    while name := name.rpartition(".")[0]:
        yield name


@cache
def graph() -> dict[str, set[str]]:
    """Each module with those that it imports: of another package also the package, which is run before its module."""
    edges = {}
    for name, path in modules().items():
        direct = set(imported(ast.parse(path.read_text())))
        needed = direct | {package for target in direct for package in above(target)}
        edges[name] = {other for other in needed if not f"{name}.".startswith(f"{other}.") or other in direct} - {name}
    return edges


def cycles(edges: dict[str, set[str]]) -> set[frozenset[str]]:
    """Returns the sets of modules that all import each other, directly or not."""
    reached: dict[str, set[str]] = {}
    for start in edges:
        seen, waiting = set[str](), [start]
        while waiting:
            new = edges[waiting.pop()] - seen
            seen |= new
            waiting += new
        reached[start] = seen
    rings = {name: {other for other in there if name in reached[other]} for name, there in reached.items()}
    return {frozenset(ring) for ring in rings.values() if ring}


def test_a_cycle_is_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set[str]()}
    assert cycles(edges) == {frozenset({"b", "c"})}


def test_no_module_imports_itself_through_others() -> None:
    assert cycles(graph()) == set()


def test_training_knows_nothing_of_the_command_line() -> None:
    assert {name: there for name, needed in graph().items() if name.split(".")[0] == "trainer"
            if (there := {other for other in needed if other.split(".")[0] == "launch"})} == {}  # fmt: skip


def test_the_composition_root_leaves_the_making_to_the_rooms() -> None:
    assert len(set(imported(ast.parse(modules()["trainer.build"].read_text())))) < MODULES_OF_THE_ROOT


def test_files_are_short() -> None:
    long = {str(path.relative_to(ROOT)) for path in modules().values() if len(path.read_text().splitlines()) >= LINES}
    assert long == set()


def test_the_wheel_has_all_packages() -> None:
    """An editable installation works without, so that only users would notice."""
    text = (Path(ROOT) / "pyproject.toml").read_text()
    listed = re.findall(r'"([\w.]+)"', re.findall(r"^packages = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)[0])
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in modules().values()}
    assert folders | {"trainer.conf", "launch.slurm"} == set(listed)
