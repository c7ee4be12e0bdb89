"""Text from a trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from trainer.build import model_factory
from trainer.checkpoint.load import newest, read
from trainer.config import Config
from trainer.config.check import check
from trainer.config.compose import completed
from trainer.data import tokenizer as tokenizers
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.folder import CHECKPOINTS
from trainer.randomness import key


def open_run(folder: Path, plugins: Sequence[str] = ()) -> tuple[Config, Tokenizer]:
    """The config and tokenizer of a run's folder, which is only read.

    It is the config for one process, `strategy=single`: here its model is whole, however it was spread. Code is
    imported from no package but those in `plugins`, whatever the folder says. Raises ConfigError if the folder holds no
    run that can be read.
    """
    try:
        raw = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{folder}: is no run's folder (config.yaml: {str(error).splitlines()[0]})") from None
    if isinstance(raw, dict) and isinstance(raw.get("run"), dict):
        raw["run"]["plugins"] = list(plugins)
    config = check(completed(raw | {"strategy": {"name": "single"}}) if isinstance(raw, dict) else raw)
    own = folder / "tokenizer.json"
    return config, tokenizers.load(str(own) if own.exists() else "bytes")


def load_run(folder: Path, plugins: Sequence[str] = ()) -> tuple[Config, nn.Module, Tokenizer]:
    """As `open_run`, with the newest model (on the CPU). Raises ConfigError if there is none yet, too."""
    config, tokenizer = open_run(folder, plugins)
    found, _ = newest(folder / CHECKPOINTS, set_aside=False)
    if found is None:
        raise ConfigError(f"{folder}: has no checkpoint yet")
    model = model_factory(config, tokenizer, loaded=True)()
    read(found, {f"model/{name}": tensor for name, tensor in model.state_dict().items()})
    return config, model, tokenizer


def with_weights(config: Config, tokenizer: Tokenizer, weights: Mapping[str, Tensor]) -> nn.Module:
    """A model on the CPU that holds `weights`."""
    model = model_factory(config, tokenizer, loaded=True)()
    model.load_state_dict(dict(weights))
    return model


def sample(config: Config, model: nn.Module, tokenizer: Tokenizer) -> list[str]:
    """The samples that the config's `sample` section asks for; the same each time for the same weights.

    Raises ConfigError if the run is not one that learns text.
    """
    if not config.learns_text:
        raise ConfigError(f"{config.run.name}: is no run that learns text: there is nothing to sample")
    wanted = config.sample
    generator = torch.Generator().manual_seed(key(config.run.seed, "sample"))
    return generate(
        model,
        tokenizer,
        wanted.prompt,
        count=wanted.count,
        tokens=wanted.tokens,
        context=config.data.sequence_length,
        temperature=wanted.temperature,
        top_k=wanted.top_k,
        generator=generator,
    )


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    count: int,
    tokens: int,
    context: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
) -> list[str]:
    """`count` continuations of `prompt`, prompt included, each of up to `tokens` tokens.

    A continuation ends at the end-of-document token. The model sees the last `context` tokens.
    """
    model.eval()
    start = [tokenizer.separator, *tokenizer.encode(prompt).tolist()]
    ids = torch.tensor([start] * count, dtype=torch.int64)
    for _ in range(tokens if count else 0):
        logits = model({"inputs": ids[:, -context:]})[:, -1].float()
        if temperature == 0:
            chosen = logits.argmax(dim=-1, keepdim=True)
        else:
            if top_k is not None:
                floor = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < floor, float("-inf"))
            chosen = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
        ids = torch.cat((ids, chosen), dim=1)
    texts = []
    for row in ids[:, 1:].tolist():
        end = row.index(tokenizer.separator) if tokenizer.separator in row else len(row)
        texts.append(tokenizer.decode(row[:end]))
    return texts
