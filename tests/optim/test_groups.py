"""Kinds of parameters: what is decayed, and what Muon makes orthogonal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.config.compose import load
from trainer.data.tokenizer import ByteTokenizer
from trainer.models.factory import model_factory
from trainer.optim.groups import by_decay, kind, names
from trainer.optim.muon import _is_hidden
from trainer.patches import without_values


class Scaled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.layer_scale = nn.Parameter(torch.ones(4))


class WordEmbedding(nn.Embedding):
    pass


class Odd(nn.Module):
    """Parameters as vision and speech models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.words = Scaled(), WordEmbedding(8, 4)
        self.attention, self.norm = nn.MultiheadAttention(4, 2), nn.LayerNorm(4)
        self.patches, self.head = nn.Conv2d(3, 4, 2), nn.Linear(4, 1)
        self.gate = nn.Parameter(torch.zeros(1))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(9, 4))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.experts = nn.Parameter(torch.zeros(2, 4, 4))


KINDS = {
    "block.weight": "matrix", "block.bias": "bias", "block.layer_scale": "vector", "words.weight": "embedding",
    "attention.in_proj_weight": "matrix", "attention.in_proj_bias": "bias", "attention.out_proj.weight": "matrix",
    "attention.out_proj.bias": "bias", "norm.weight": "norm", "norm.bias": "bias", "patches.weight": "matrix",
    "patches.bias": "bias", "head.weight": "matrix", "head.bias": "bias", "gate": "vector", "logit_scale": "vector",
    "cls_token": "vector", "pos_embed": "embedding", "relative_position_bias_table": "bias", "experts": "matrix",
}  # fmt: skip


def test_kinds() -> None:
    model = Odd()
    assert {name: kind(model, name) for name in names(model)} == KINDS


def test_what_only_scales_is_not_decayed_by_default() -> None:
    model = Odd()
    no_decay = load(["experiment=none"]).optimizer.no_decay
    decayed, undecayed = by_decay(model, names(model), 0.1, no_decay)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    found = {name for name, parameter in model.named_parameters() if any(parameter is p for p in decayed["params"])}
    assert found == {name for name, what in KINDS.items() if what in ("matrix", "embedding")}


def test_muon_takes_no_table_of_positions() -> None:
    model = Odd()
    hidden = {name for name in names(model) if _is_hidden(model, name, ["head"])}
    assert hidden == {"block.weight", "attention.in_proj_weight", "attention.out_proj.weight"}


@pytest.mark.parametrize("architecture", ["gpt", "llama", "gpt2"])
def test_models_of_ours_have_no_vectors(architecture: str) -> None:
    """So that their runs are what they were when all but biases and norms was decayed."""
    small = ["model.layers=1", "model.width=32", "model.heads=2"] if architecture == "gpt" else []
    config = load(["experiment=none", f"model={architecture}", *small])
    with without_values():
        model = model_factory(config, ByteTokenizer()).build()
    before = {name: "bias" if name.endswith(".bias") else "norm" for name, p in model.named_parameters() if p.ndim == 1}
    assert {name: kind(model, name) for name in before} == before
    assert {kind(model, name) for name in set(names(model)) - before.keys()} == {"matrix", "embedding"}
