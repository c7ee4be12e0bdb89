"""Work shared out among ranks: all get all, errors are raised on all, and nobody waits in silence."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.data.ranks import on_ranks
from trainer.data import team as module
from trainer.data.team import ALONE, Team
from trainer.errors import ConfigError, DataError, OnecurveError


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_all_get_all(size: int, count: int) -> None:
    made: list[int] = []

    def square(i: int) -> int:
        made.append(i)
        return i * i

    squares = [i * i for i in range(count)]
    assert on_ranks(size, lambda team: team.share("squares", list(range(count)), square)) == [squares] * size
    assert sorted(made) == list(range(count))  # once, by one of them


def test_what_one_raises_is_raised_on_all() -> None:
    def fails(i: int) -> int:
        if i in (1, 4):
            raise DataError(f"{i} is bad")
        if i == 5:
            raise ConfigError("5 is wrong")
        return i

    for items, code in ((5, 3), (6, 2)):
        one, other = on_ranks(2, lambda team, items=items: team.share("items", list(range(items)), fails))
        for error in (one, other):
            assert isinstance(error, OnecurveError)
            assert error.exit_code == code
            assert str(error).split("\n")[:2] == ["1 is bad", "4 is bad"]


def test_those_who_wait_for_another_hear_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow rank's peers meet it in collectives all the time, instead of in one that takes as long as its work."""
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.1)
    told: list[tuple[str, int, int]] = []

    def work(i: int) -> int:
        time.sleep(1.0 if i == 1 else 0)
        return i

    def shared(team: Team) -> Any:
        return team.share("slow work", list(range(4)), work)

    assert on_ranks(2, shared, lambda *what: told.append(what)) == [[0, 1, 2, 3]] * 2
    assert ("slow work", 3, 4) in told
    assert len(told) >= 2 * 5
    assert ALONE.share("work", [1], work) == [1]
