"""What a model is in transformers: its config there, and what its weights are called and look like there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.config import Config, schema
from trainer.config.huggingface import transformers_config, unlike_gpt2
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError

OUTER = {"token_embedding": "wte", "position_embedding": "wpe", "norm": "ln_f"}
INNER = {
    "attention_norm": "ln_1", "mlp_norm": "ln_2", "attention.query_key_value": "attn.c_attn",
    "attention.output": "attn.c_proj", "mlp.input": "mlp.c_fc", "mlp.output": "mlp.c_proj",
}  # fmt: skip
"""Modules of our GPT, outside of its blocks and in them -> those of transformers' GPT-2."""


class NoFamily(Exception):
    """transformers has no such model; the text says why."""


@dataclass(frozen=True)
class Family:
    config: Any
    """transformers' own object."""
    name: Callable[[str], str] = lambda name: name
    """The name of a parameter there."""
    theirs: Callable[[str, Tensor], Tensor] = lambda name, value: value
    """The value there of the parameter that has this name and value here."""
    ours: Callable[[str, Tensor], Tensor] = lambda name, value: value
    """The other way round; `name` is the one here."""


def family_of(config: Config, tokenizer: Tokenizer) -> Family:
    """Of the run's model. Raises NoFamily."""
    model = config.model
    if isinstance(model, schema.HuggingFace):
        return Family(_theirs(model, config, tokenizer))
    if not isinstance(model, schema.GPT):
        raise NoFamily(f"model {model.name} is none of transformers")
    if other := unlike_gpt2(model):
        raise NoFamily(f"transformers has no such model; it is GPT-2 with {other}")
    keys: dict[str, Any] = {"n_embd": model.width, "n_layer": model.layers, "n_head": model.heads}
    keys |= {"embd_pdrop": model.dropout, "resid_pdrop": model.dropout, "attn_pdrop": 0.0}
    as_theirs = schema.GPT2(name="gpt2", architecture="GPT2LMHeadModel", config=keys)
    try:
        theirs = _theirs(as_theirs, config, tokenizer)
    except ConfigError:
        raise NoFamily("it needs the package transformers: pip install 'onecurve[transformers]'") from None
    return Family(
        theirs,
        gpt2_name,
        lambda name, value: to_gpt2(name, value, model.heads),
        lambda name, value: from_gpt2(name, value, model.heads),
    )


def _theirs(model: schema.HuggingFace, config: Config, tokenizer: Tokenizer) -> Any:
    """The config object of transformers. A text begins and ends with the separator, as in training."""
    size, end = tokenizer.vocab_size, tokenizer.separator
    ends = {"bos_token_id": end, "eos_token_id": end}
    made = transformers_config(model, config.data.sequence_length, vocab_size=size, **ends)
    made.architectures = [model.architecture]
    return made


def gpt2_name(name: str) -> str:
    """What transformers' GPT-2 calls the parameter `name` of our GPT."""
    module, _, leaf = name.rpartition(".")
    if module in OUTER:
        return f"transformer.{OUTER[module]}.{leaf}"
    _, layer, inner = module.split(".", 2)
    return f"transformer.h.{layer}.{INNER[inner]}.{leaf}"


def to_gpt2(name: str, value: Tensor, heads: int) -> Tensor:
    """Our rows are head by head query, key and value, theirs all queries, all keys, all values; and its Conv1D keeps
    matrices transposed."""
    if "query_key_value" in name:
        value = value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return value.T if _is_matrix(name, value) else value


def from_gpt2(name: str, value: Tensor, heads: int) -> Tensor:
    """The other way round; `name` is ours."""
    value = value.T if _is_matrix(name, value) else value
    if "query_key_value" in name:
        value = value.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
    return value


def _is_matrix(name: str, value: Tensor) -> bool:
    return name.startswith("blocks.") and value.ndim == 2
