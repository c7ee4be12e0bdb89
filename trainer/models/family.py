"""What a model is in transformers: its config there, and what its weights are called and look like there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.config import Config
from trainer.config.huggingface import GPT2, HuggingFace, architecture, make_transformers_config, refused_combinations
from trainer.config.models import GPT
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.registry import plugin

OUTER = {"token_embedding": "wte", "position_embedding": "wpe", "norm": "ln_f"}
INNER = {
    "attention_norm": "ln_1", "mlp_norm": "ln_2", "attention.query_key_value": "attn.c_attn",
    "attention.output": "attn.c_proj", "mlp.input": "mlp.c_fc", "mlp.output": "mlp.c_proj",
}  # fmt: skip
"""Modules of our GPT, outside of its blocks and in them -> those of transformers' GPT-2."""


class UnknownFamily(Exception):
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
    prefix: str = ""
    """What stands before a key of transformers' config in the run's config."""
    refused: Callable[[Mapping[str, Any]], Iterable[str]] = lambda keys: ()
    """Yields why this model cannot have these keys in transformers' config."""


def family_of(config: Config, tokenizer: Tokenizer) -> Family:
    """What the class of the run's model says of itself (`trainer.models.Exportable`). Raises UnknownFamily."""
    family = getattr(plugin(config, "model"), "family", None)
    if family is None:
        raise UnknownFamily(f"model {config.model.name} is none of transformers")
    return family(config, tokenizer)


def of_transformers(config: Config, tokenizer: Tokenizer) -> Family:
    """Of a model that is one of transformers' already."""
    model: HuggingFace = config.model

    def refused(keys: Mapping[str, Any]) -> Iterator[str]:
        aliases = architecture(model).config_class.attribute_map
        kept = {key: value for key, value in model.config.items() if aliases.get(key, key) not in keys}
        wanted = model.model_copy(update={"config": {**kept, **keys}})
        return refused_combinations(wanted, config.data.sequence_length, tensor_parallel=1)

    return Family(_theirs(model, config, tokenizer), prefix="model.config.", refused=refused)


def of_gpt(config: Config, tokenizer: Tokenizer) -> Family:
    """Of our GPT, where it is GPT-2. Raises UnknownFamily where it is not, or transformers is not installed."""
    model: GPT = config.model
    if other := model.unlike_gpt2():
        raise UnknownFamily(f"transformers has no such model; it is GPT-2 with {other}")
    keys: dict[str, Any] = {"n_embd": model.width, "n_layer": model.layers, "n_head": model.heads}
    keys |= {"embd_pdrop": model.dropout, "resid_pdrop": model.dropout, "attn_pdrop": 0.0}
    as_theirs = GPT2(name="gpt2", architecture="GPT2LMHeadModel", config=keys)
    try:
        theirs = _theirs(as_theirs, config, tokenizer)
    except ConfigError:
        raise UnknownFamily("it needs the package transformers: pip install 'onecurve[transformers]'") from None
    return Family(
        theirs,
        gpt2_name,
        lambda name, value: to_gpt2(name, value, model.heads),
        lambda name, value: from_gpt2(name, value, model.heads),
    )


def _theirs(model: HuggingFace, config: Config, tokenizer: Tokenizer) -> Any:
    """The config object of transformers. A text begins and ends with the separator, as in training."""
    size, end = tokenizer.vocab_size, tokenizer.separator
    ends = {"bos_token_id": end, "eos_token_id": end}
    made = make_transformers_config(model, config.data.sequence_length, vocab_size=size, **ends)
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
