"""Metrics of each source: what plain torch makes of its rows, also where an objective was sent to another process."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trainer.config.compose import load
from trainer.data import tokenizer
from trainer.errors import ConfigError
from trainer.facts import Facts
from trainer.objectives import NUM_TARGETS, Objective
from trainer.objectives.by_source import SOURCE, by_source
from trainer.objectives.causal_lm import CausalLM

TOKENIZER = tokenizer.load("bytes")
FACTS = Facts(TOKENIZER.vocab_size, 7, 1, TOKENIZER)


@pytest.mark.parametrize("sent", [False, True])
def test_sums_of_a_source_are_those_of_its_rows(sent: bool) -> None:
    objective = by_source(CausalLM, ["code", "none", "web"])(load([], 1).objective, FACTS)
    if sent:  # as to a process that reads
        objective = pickle.loads(pickle.dumps(objective))
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(5, 7, FACTS.vocab_size, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(FACTS.vocab_size, (5, 7), generator=generator)
    targets[1, 2:] = -100
    sources = torch.from_numpy(np.array([2, 0, 2, 2, 0]))
    batch = {"targets": targets, SOURCE: sources, "draws": torch.zeros(5, dtype=torch.int64)}
    counts = objective.counts(batch)
    assert counts == {
        NUM_TARGETS: 30, f"{NUM_TARGETS}/code": 9, f"{NUM_TARGETS}/none": 0, f"{NUM_TARGETS}/web": 21
    }  # fmt: skip
    totals = {name: torch.tensor(value, dtype=torch.float64) for name, value in counts.items()}
    loss, sums = objective.loss(outputs, batch, totals)
    assert loss.requires_grad
    assert not sums["loss/web"].requires_grad
    means = objective.means({**counts, **{name: float(value.detach()) for name, value in sums.items()}})
    for name, number in (("code", 0), ("web", 2)):
        rows = sources == number
        expected = F.cross_entropy(outputs[rows].float().flatten(0, 1), targets[rows].flatten())
        assert means[f"loss/{name}"] == pytest.approx(expected.detach().item(), rel=1e-6)
    assert means["loss"] == pytest.approx(loss.detach().item(), rel=1e-6)
    assert not [name for name in means if "none" in name]


def test_held_out_rows_are_of_no_source() -> None:
    objective = by_source(CausalLM, ["code", "web"])(load([], 1).objective, FACTS)
    batch = {"targets": torch.zeros(2, 3, dtype=torch.int64), "draws": torch.zeros(2, dtype=torch.int64)}
    assert objective.counts(batch) == {NUM_TARGETS: 6}
    assert {*objective.evaluate(torch.zeros(2, 3, FACTS.vocab_size), batch)} == {"loss", "bytes", "chars"}


class Picky(Objective):
    """Whose loss fails without a row, and whose outputs have more than rows."""

    def loss(self, outputs: dict, batch: dict, normalizers: dict) -> tuple:
        assert outputs["nothing"] is None
        assert outputs["factor"].ndim == 0
        rows = outputs["values"] * outputs["factor"]
        return rows.sum() / normalizers[NUM_TARGETS], {"loss": rows.sum(), "largest": rows.max()}


def test_a_source_without_a_row_is_not_computed() -> None:
    objective = by_source(Picky, ["a/b", "b", "empty"])(None, FACTS)
    outputs = {"values": torch.tensor([1.0, 2.0, 4.0]), "factor": torch.tensor(2.0), "nothing": None}
    batch = {SOURCE: torch.tensor([0, 1, 0]), "draws": torch.zeros(3, dtype=torch.int64)}
    counts = objective.counts(batch)
    normalizers = {name: torch.tensor(value, dtype=torch.float64) for name, value in counts.items()}
    sums = objective.loss(outputs, batch, normalizers)[1]
    assert sums["largest/empty"] == 0
    means = objective.means({**counts, **{name: value.item() for name, value in sums.items()}})
    assert {name: value for name, value in means.items() if name.startswith("loss")} == {
        "loss": pytest.approx(14 / 3), "loss/a/b": 5.0, "loss/b": 4.0
    }  # fmt: skip
    assert {name for name in means if name.startswith(NUM_TARGETS)} == {f"{NUM_TARGETS}/a/b", f"{NUM_TARGETS}/b"}


def test_what_is_not_an_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="a subclass of"):
        by_source(object, ["a"])
