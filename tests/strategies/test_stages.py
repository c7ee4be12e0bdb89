"""How a pipeline cuts a model: what parts cost, who gets which, and that names stay."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import nn

from launch.cli import main
from tests.parity.cells import factory, rows
from tests.strategies.ragged import FACTS
from trainer.config.compose import load
from trainer.errors import ConfigError
from trainer.models import ModelFactory
from trainer.models.gpt import GPT
from trainer.strategies.stages import Cost, ModelCosts, OnOtherRank, balance, cut_model, measure_costs

MODEL = [
    "model.layers=5", "model.width=16", "model.heads=2", "model.positions=learned", "model.bias=true",
    "data.sequence_length=16",
]  # fmt: skip


def made() -> ModelFactory:
    return factory(load(MODEL).model, torch.float32)


def measured(costs: list[int], head: int = 0) -> ModelCosts:
    nothing = torch.empty(0)
    blocks = [Cost(0, cost, 0) for cost in costs]
    return ModelCosts(Cost(0, 0, 0), blocks, Cost(0, head, 0), nothing, nothing)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize(("costs", "head"), [([1] * 8, 0), ([1] * 8, 3), ([5, 1, 1, 1, 9, 2], 4), ([3, 3, 3, 1], 0)])
def test_the_slowest_part_is_as_fast_as_can_be(costs: list[int], head: int, parts: int) -> None:
    found = balance(measured(costs, head), parts)
    assert [block for part in found for block in part] == list(range(len(costs)))
    all_costs = [*costs[:-1], costs[-1] + head]

    def slowest(edges: tuple[int, ...]) -> int:
        whole = (0, *edges, len(costs))
        return max(sum(all_costs[a:b]) for a, b in pairwise(whole))

    best = min(slowest(edges) for edges in combinations(range(1, len(costs)), parts - 1))
    assert slowest(tuple(part[0] for part in found[1:])) == best


def test_fewer_layers_than_parts() -> None:
    with pytest.raises(ConfigError, match="2 layers cannot be cut into 3 parts"):
        balance(measured([1, 1]), 3)


def test_costs_are_those_of_the_model() -> None:
    found = measure_costs(made(), torch.enable_grad(), torch.device("cpu"))
    model = made()()
    assert [cost.parameters for cost in found.blocks] == [
        sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks
    ]
    width, length = 16, 16
    products = 2 * length * 12 * width * width  # query, key, value, output, and two of four times the width
    attention = 2 * 2 * length * length * width
    assert found.blocks[0].flops == products + attention
    assert found.head.flops == 2 * length * width * 50
    assert found.embedding.flops == 0
    assert found.hidden.shape == (1, length, width)
    assert found.outputs.shape == (1, length, 50)
    kept = []
    hidden = torch.randn(1, length, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.run([model.blocks[0]], hidden, rows(0, 16))
    weights = {id(parameter) for parameter in model.parameters()}
    distinct = {id(t): t.numel() * t.element_size() for t in kept if id(t) not in weights}
    assert found.blocks[0].activations == pytest.approx(sum(distinct.values()), rel=0.35)


class Misplaced(GPT):
    """A parameter that belongs to no part, and one that two blocks use."""

    def __init__(self, *shape: Any):
        super().__init__(*shape)
        self.scale = nn.Parameter(torch.ones(16))
        self.blocks[1].mlp_norm = self.blocks[0].mlp_norm


def test_parameters_that_a_cut_would_part_are_refused() -> None:
    config = load(MODEL)
    build = partial(Misplaced, config.model, FACTS)
    with pytest.raises(ConfigError, match=r"Misplaced cannot be cut: scale, blocks.0.mlp_norm.weight, blocks.0.mlp_n"):
        measure_costs(replace(made(), build=build), torch.enable_grad(), torch.device("cpu"))


def test_names_stay() -> None:
    whole = set(made()().state_dict())
    first, last, middle = (made()() for _ in range(3))
    assert cut_model(first, range(2), True, False) == ["token_embedding.weight"]
    cut_model(middle, range(2, 4), False, False)
    cut_model(last, range(4, 5), False, True)
    assert isinstance(middle.token_embedding, OnOtherRank)
    names = [set(model.state_dict()) for model in (first, middle, last)]
    assert set.union(*names) == whole
    assert names[0] & names[2] == {"token_embedding.weight"}
    assert not names[1] & (names[0] | names[2])


@pytest.mark.slow
def test_plan_shows_the_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "-n", "4", *MODEL, "strategy=pipeline", "strategy.stages=2", "data.tokenizer=bytes"]
    monkeypatch.setattr(sys, "argv", ["onecurve", *words, "data=webdataset", "data.shards=nowhere.tar"])
    with pytest.raises(SystemExit, match="0"):
        main()
    shown = capsys.readouterr().out
    assert "4 = 2 x 2 that share a copy of the model" in shown
    assert "blocks 0 to 2, embedding" in shown
    assert "blocks 3 to 4, head" in shown
