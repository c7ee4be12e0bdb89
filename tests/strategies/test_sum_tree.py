"""One order of adding: any processes, any order of arrival, the same bits."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from trainer.data.deal import Deal
from trainer.strategies.leafwise.exact_sums import sums_of_squares
from trainer.strategies.leafwise.sum_tree import SumTree, find_branches

COUNTS = (1, 2, 3, 5, 8, 12, 31)


def terms(count: int) -> list[list[Tensor | None]]:
    generator = torch.Generator().manual_seed(count)
    return [[torch.randn(7, generator=generator) * 10.0**-i, torch.randn(3, generator=generator)] for i in range(count)]


def total(values: list[list[Tensor | None]], order: list[int]) -> list[Tensor]:
    tree = SumTree(len(values))
    for leaf in order:
        tree.add((leaf, leaf + 1), [None if value is None else value.clone() for value in values[leaf]])
    return list(tree.take_total())  # type: ignore[arg-type]


def by_halves(values: list[Tensor]) -> Tensor:
    if len(values) == 1:
        return values[0]
    middle = len(values) // 2
    return by_halves(values[:middle]) + by_halves(values[middle:])


@pytest.mark.parametrize("count", COUNTS)
def test_any_order_of_arrival_gives_the_sum_by_halves(count: int) -> None:
    values = terms(count)
    expected = [by_halves([leaf[i] for leaf in values]) for i in range(2)]  # type: ignore[misc]
    for seed in range(5):
        order = random.Random(seed).sample(range(count), count)
        assert all(map(torch.equal, total(values, order), expected))


def test_a_plain_sum_has_other_bits() -> None:
    values = terms(12)
    plain = values[0][0].clone()  # type: ignore[union-attr]
    for leaf in values[1:]:
        plain += leaf[0]
    assert not torch.equal(plain, total(values, list(range(12)))[0])


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("in_turn", [False, True])
def test_branches_of_several_processes_make_the_same_sum(count: int, processes: int, in_turn: bool) -> None:
    values, whole, deal = terms(count), SumTree(count), Deal(1, processes if in_turn else 1)
    for process in range(processes):
        own, leaves = SumTree(count), deal.leaves_of(count, process, processes)
        for leaf in leaves:
            own.add((leaf, leaf + 1), [value.clone() for value in values[leaf]])  # type: ignore[union-attr]
        assert sorted(own.sums) == find_branches(leaves, count)
        if not in_turn:
            assert len(own.sums) <= 2 * math.ceil(math.log2(count)) + 1
        for node, sums in own.sums.items():
            whole.add(node, sums)
    assert all(map(torch.equal, whole.take_total(), total(values, list(range(count)))))


def test_few_sums_are_kept_of_leaves_that_follow_each_other() -> None:
    tree = SumTree(100)
    for leaf in range(100):
        tree.add((leaf, leaf + 1), [torch.ones(1)])
        assert len(tree.sums) <= 8
    assert tree.take_total() == [torch.tensor([100.0])]


def test_what_is_missing_adds_nothing() -> None:
    values = terms(6)
    for leaf in (0, 3, 4):
        values[leaf][1] = None
    got = total(values, [5, 4, 3, 2, 1, 0])
    assert torch.equal(got[1], values[1][1] + values[2][1] + values[5][1])  # type: ignore[operator]
    assert total([[None], [None]], [0, 1]) == [None]
    with pytest.raises(KeyError):
        SumTree(2).take_total()


@pytest.mark.parametrize("rows", [1, 7, 24, 50])
@pytest.mark.parametrize("deal", [Deal(), Deal(4), Deal(4, 2), Deal(3)])
def test_every_row_is_dealt_once(rows: int, deal: Deal) -> None:
    for replicas in (2, 4, 6) if deal.neighbors == 2 else (1, 2, 3, 5):
        dealt = [row for replica in range(replicas) for row in deal.rows(rows, replica, replicas).tolist()]
        assert sorted(dealt) == list(range(rows))


def test_leaves_have_the_same_rows_on_any_number_of_replicas() -> None:
    deal = Deal(4)
    alone = [deal.leaf_rows(24, leaf).tolist() for leaf in deal.leaves_of(6, 0, 1)]
    assert alone[1] == [1, 7, 13, 19]
    for neighbors, expected in ((1, [(0, 1), (2, 3), (4, 5)]), (3, [(0, 3), (1, 4), (2, 5)])):
        assert [Deal(4, neighbors).leaves_of(6, replica, 3) for replica in range(3)] == expected
    assert [Deal(4, 2).leaves_of(8, replica, 4) for replica in range(4)] == [(0, 2), (1, 3), (4, 6), (5, 7)]


@pytest.mark.parametrize("rows", [1, 7, 23, 24])
@pytest.mark.parametrize("deal", [Deal(), Deal(4), Deal(4, 2)])
def test_an_evaluation_has_every_row_once_and_as_many_batches_on_all_replicas(rows: int, deal: Deal) -> None:
    for replicas in (2, 4):
        batches = [deal.batches(rows, 4, replica, replicas) for replica in range(replicas)]
        assert len({len(of_replica) for of_replica in batches}) == 1
        assert sorted(row for of_replica in batches for batch in of_replica for row in batch) == list(range(rows))


def test_a_leaf_comes_once_and_belongs_to_the_tree() -> None:
    tree = SumTree(4)
    tree.add((1, 2), [None])
    for node in ((1, 2), (1, 3), (4, 5)):
        with pytest.raises(ValueError, match=r"is there already|not a node"):
            tree.add(node, [None])


@pytest.mark.parametrize("kind", ["normal", "wide", "zero", "tiny", "bf16"])
def test_sums_of_squares_are_exact_however_the_tensor_is_cut(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(100_003, generator=generator)
    if kind == "wide":
        whole *= 10.0 ** torch.randint(-20, 15, whole.shape, generator=generator)
    whole = {"zero": whole * 0, "tiny": whole * 1e-38, "bf16": whole.bfloat16()}.get(kind, whole)
    exact = math.fsum((whole.double() ** 2).tolist())
    seen = set()
    for parts in (1, 2, 3, 7):
        pieces = whole.chunk(parts)
        largest = torch.stack([piece.abs().max() for piece in pieces]).double().max().reshape(1)
        collected: list[Tensor] = []

        def keep(sums: Tensor, collected: list[Tensor] = collected) -> Tensor:
            collected.append(sums)
            return torch.stack(collected).sum(0)

        for piece in pieces:
            result = sums_of_squares(
                [piece], [whole.numel()], torch.device("cpu"), lambda _, largest=largest: largest, keep
            )
        seen.add(result.item())
    assert len(seen) == 1
    assert seen.pop() == pytest.approx(exact, rel=1e-15, abs=0)


def test_norms_of_what_is_not_finite_are_not_finite() -> None:
    for value in (math.inf, math.nan):
        tensor = torch.tensor([1.0, value])
        result = sums_of_squares([tensor], [2], torch.device("cpu"), lambda x: x, lambda x: x)
        assert not math.isfinite(result.item())
