"""Folders of runs that were never trained: a config, and checkpoints of a model whose biases and norms count."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from launch.cli import main
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.save import Saver
from trainer.config import Config
from trainer.config.compose import load
from trainer.data.tokenizer import ByteTokenizer
from trainer.models.factory import model_factory
from trainer.topology import ALONE

LENGTH = 24
INPUTS = torch.randint(0, 257, (2, LENGTH), generator=torch.Generator().manual_seed(1))
LLAMA = (
    "model=llama", "model.config.hidden_size=32", "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2", "model.config.num_attention_heads=4",
)  # fmt: skip
GPT = ("model=gpt", "model.width=32", "model.layers=2")
GPT2_SHAPED = (*GPT, "model.positions=learned", "model.activation=gelu", "model.bias=true")
MODELS = {
    "llama": LLAMA,
    "llama tied": (*LLAMA, "model.config.tie_word_embeddings=true"),
    "gpt2": ("model=gpt2", "model.config.n_embd=32", "model.config.n_layer=2"),
    "gpt": GPT2_SHAPED,
}


def config_of(*overrides: str) -> Config:
    return load([*overrides, "data.tokenizer=bytes", f"data.sequence_length={LENGTH}"])


def shaken(config: Config, seed: int = 1) -> nn.Module:
    """The model, moved away from its initial values."""
    model, generator = model_factory(config, ByteTokenizer())(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return model.eval()


def saved(
    folder: Path,
    config: Config,
    models: dict[int, nn.Module],
    about: dict[str, Any] | None = None,
    **more: torch.Tensor,
) -> Path:
    """A run's folder with a checkpoint of each model, by step; `about` is in its manifest, `more` beside weights."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.resolved()))
    saver = Saver(checkpoints, ALONE, Retention(keep=9), asynchronous=False, pauses=())
    for step, model in models.items():
        state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        saver.save(step, state | more, about or {})
    saver.close()
    return folder


def onecurve(monkeypatch: pytest.MonkeyPatch, words: Sequence[Any], expect: int = 0) -> None:
    monkeypatch.setattr(sys, "argv", ["onecurve", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == expect
