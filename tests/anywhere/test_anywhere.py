"""Any checkpoint, anywhere: into any other strategy the same curve, back into its own the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.anywhere import matrix
from tests.anywhere.cells import cells


@pytest.mark.slow
def test_each_into_the_next(tmp_path: Path) -> None:
    pairs = matrix.ring()
    matrix.straight(tmp_path, [next(cells()), *(source for source, _ in pairs)])
    again = next(cell for cell, _ in pairs if cell.name == "zero 3")
    found = matrix.moved(tmp_path, [*pairs, (again, again)])
    assert sum(map(len, found.values())) == len(pairs) + 1
    assert matrix.red(found) == []


@pytest.mark.slow
def test_all_of_it() -> None:
    assert matrix.red(matrix.everything()) == []


def test_what_the_page_shows_was_found() -> None:
    found = json.loads(matrix.RESULT.read_text())
    assert matrix.red(found) == []
    text = (matrix.ROOT / "docs" / "CHECKPOINTS.md").read_text()
    assert text == matrix.written(text, "anywhere", matrix.table(found)), "run `make anywhere`"
