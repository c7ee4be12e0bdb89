"""Work shared out among ranks: all get all, errors are raised on all, and nobody waits in silence."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.data.ranks import on_ranks
from trainer.data.shared_work import ALONE, WorkSharing
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


def test_those_who_wait_for_another_hear_of_it() -> None:
    """The slow rank's peers meet it in collectives all the time, instead of in one that takes as long as its work."""
    told: list[tuple[str, int, int]] = []

    def work(i: int) -> int:
        time.sleep(1.0 if i == 1 else 0)
        return i

    def shared(team: WorkSharing) -> Any:
        return team.share("slow work", list(range(4)), work)

    assert on_ranks(2, shared, lambda *what: told.append(what), heartbeat_s=0.1) == [[0, 1, 2, 3]] * 2
    assert ("slow work", 3, 4) in told
    assert len(told) >= 2 * 5
    assert ALONE.share("work", [1], work) == [1]


def test_who_loses_a_peer_does_not_first_finish_its_part() -> None:
    made: list[int] = []

    def work(i: int) -> None:
        time.sleep(0.05)
        made.append(i)

    def lost(value: Any) -> Any:
        raise ConnectionError("peer lost")

    with pytest.raises(ConnectionError):
        WorkSharing(0, 2, gather=lost, heartbeat_s=0.1).share("work", list(range(2000)), work)
    time.sleep(0.3)
    assert len(made) < 100


@pytest.mark.parametrize("size", [1, 3])
def test_the_first_rank_decides_and_its_errors_are_everybodys(size: int) -> None:
    assert on_ranks(size, lambda team: team.run_on_first(lambda: f"seen by {team.rank}")) == ["seen by 0"] * size

    def fails() -> Any:
        raise ConfigError(["one", "two"])

    for error in on_ranks(size, lambda team: team.run_on_first(fails)):
        assert isinstance(error, ConfigError)
        assert (error.problems, error.exit_code) == (["one", "two"], 2)
