"""Any checkpoint, anywhere: into any other strategy the same curve, back into its own the same bits."""

from __future__ import annotations

import json

import pytest

from tests.anywhere import matrix


@pytest.mark.slow
def test_all_of_it() -> None:
    assert matrix.red(matrix.everything()) == []


def test_what_the_page_shows_was_found() -> None:
    found = json.loads(matrix.RESULT.read_text())
    assert matrix.red(found) == []
    text = (matrix.ROOT / "docs" / "CHECKPOINTS.md").read_text()
    assert text == matrix.written(text, "anywhere", matrix.table(found)), "run `make anywhere`"
