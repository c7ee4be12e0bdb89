"""The parity matrix: every strategy against plain torch in fp64, on loss, gradient norm and every weight."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.parity import matrix
from tests.parity.cells import cells
from tests.parity.planted import bugs


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return matrix.run(1, "quick")


def test_quick_cut(alone: dict[str, Any]) -> None:
    found = alone | matrix.run(2, "quick")
    assert {f"{cell.name} on {cell.processes}" for cell in cells() if cell.quick} <= {*found}
    assert matrix.red(found) == []


@pytest.mark.slow
def test_all_of_it() -> None:
    found = matrix.everything()
    assert len(found) == len(list(cells()))
    assert matrix.red(found) == []


@pytest.mark.slow
def test_planted_bugs_turn_it_red(alone: dict[str, Any]) -> None:
    """A mean of means, gradients that are not scaled, a sum where an average belongs, and their like."""
    found = matrix.run(2, "planted")
    assert {name for name, _, _ in bugs()} <= {name.removesuffix(" on 2") for name in found}
    for name in [name for name in found if name.startswith("rounded: ")]:
        rounded = found.pop(name)
        assert rounded["loss"] < 1e-3
        assert 1e-5 < rounded["norm"] < 1e-2  # 2^-9 for one gradient
    for name, errors in found.items():
        problems = matrix.red(alone | {name: {"fp32": {"planted": errors}}})
        assert problems, f"{name}: not noticed"
        print(*problems, sep="\n")


def test_what_readme_shows_was_found() -> None:
    found = json.loads(matrix.RESULT.read_text())
    assert matrix.red(found) == []
    assert {f"{cell.name} on {cell.processes}" for cell in cells()} == set(found), "run `make parity`"
    for name, lines in (("README.md", matrix.short_table(found)), ("docs/STRATEGIES.md", matrix.table(found))):
        text = (matrix.ROOT / name).read_text()
        assert text == matrix.written(text, "parity", lines), "run `make parity`"
