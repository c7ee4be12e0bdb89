"""What is done to layers before a strategy wraps them."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from trainer.config.compose import load
from trainer.facts import Facts
from trainer.models.gpt import GPT
from trainer.strategies.layers import wrap_layers


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_all_layers_are_compiled_together(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than torch compiles one function for, that differ by their number only."""
    config = load(["model.layers=12", "model.width=32", "model.heads=2", f"model.dropout={dropout}"], 1)
    torch.manual_seed(0)
    model = GPT(config.model, Facts(257, 16, steps=1))
    batch = {"inputs": torch.randint(0, 257, (4, 16)), "draws": torch.arange(4)}
    expected = model(batch)
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    torch.compiler.reset()
    counters.clear()
    wrap_layers(model, "none", compile=True)
    torch.testing.assert_close(model(batch), expected)
    assert counters["stats"]["unique_graphs"] <= 2, dict(counters["stats"])
    assert counters["frames"]["ok"] == counters["frames"]["total"], dict(counters["frames"])
