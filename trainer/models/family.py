"""The family of a model in transformers: its config there, and the names and layouts of its weights there."""

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
"""Modules of our GPT, outside of its blocks and in them -> modules of transformers' GPT-2."""


class UnknownFamily(Exception):
    """Raised if transformers has no such model; the text says why."""


@dataclass(frozen=True)
class Family:
    """What a model is in transformers."""

    config: Any
    """The config object of transformers."""
    name: Callable[[str], str] = lambda name: name
    """Returns the name in transformers of a parameter."""
    to_transformers: Callable[[str, Tensor], Tensor] = lambda name, value: value
    """Returns the value in transformers of the parameter with this name and value here."""
    from_transformers: Callable[[str, Tensor], Tensor] = lambda name, value: value
    """Returns the value here of the parameter with this name here and this value in transformers."""
    prefix: str = ""
    """The prefix in the run's config of the keys of transformers' config."""
    refused: Callable[[Mapping[str, Any]], Iterable[str]] = lambda keys: ()
    """Yields why this model cannot have these keys in transformers' config."""


def family_of(config: Config, tokenizer: Tokenizer) -> Family:
    """Returns the family that the class of the run's model declares (`trainer.models.Exportable`). Raises
    UnknownFamily."""
    family = getattr(plugin(config, "model"), "family", None)
    if family is None:
        raise UnknownFamily(f"model {config.model.name} is none of transformers")
    return family(config, tokenizer)


def transformers_family(config: Config, tokenizer: Tokenizer) -> Family:
    """Returns the family of a model that is one of transformers' own."""
    model: HuggingFace = config.model

    def refused(keys: Mapping[str, Any]) -> Iterator[str]:
        aliases = architecture(model).config_class.attribute_map
        other_keys = {key: value for key, value in model.config.items() if aliases.get(key, key) not in keys}
        changed_model = model.model_copy(update={"config": {**other_keys, **keys}})
        return refused_combinations(changed_model, config.data.sequence_length, tensor_parallel=1)

    return Family(_transformers_config(model, config, tokenizer), prefix="model.config.", refused=refused)


def gpt_family(config: Config, tokenizer: Tokenizer) -> Family:
    """Returns the family of our GPT if it is GPT-2. Raises UnknownFamily if not, or if transformers is not
    installed."""
    model: GPT = config.model
    if differences := model.unlike_gpt2():
        raise UnknownFamily(f"transformers has no such model; it is GPT-2 with {differences}")
    keys: dict[str, Any] = {"n_embd": model.width, "n_layer": model.layers, "n_head": model.heads}
    keys |= {"embd_pdrop": model.dropout, "resid_pdrop": model.dropout, "attn_pdrop": 0.0}
    gpt2 = GPT2(name="gpt2", architecture="GPT2LMHeadModel", config=keys)
    try:
        transformers_config = _transformers_config(gpt2, config, tokenizer)
    except ConfigError:
        raise UnknownFamily("it needs the package transformers: pip install 'onecurve[transformers]'") from None
    return Family(
        transformers_config,
        gpt2_name,
        lambda name, value: to_gpt2(name, value, model.heads),
        lambda name, value: from_gpt2(name, value, model.heads),
    )


def _transformers_config(model: HuggingFace, config: Config, tokenizer: Tokenizer) -> Any:
    """Returns the config object of transformers. A text begins and ends with the separator, as in training."""
    size, separator = tokenizer.vocab_size, tokenizer.separator
    special_tokens = {"bos_token_id": separator, "eos_token_id": separator}
    transformers_config = make_transformers_config(
        model, config.data.sequence_length, vocab_size=size, **special_tokens
    )
    transformers_config.architectures = [model.architecture]
    return transformers_config


def gpt2_name(name: str) -> str:
    """Returns the name in transformers' GPT-2 of the parameter `name` of our GPT."""
    module, _, leaf = name.rpartition(".")
    if module in OUTER:
        return f"transformer.{OUTER[module]}.{leaf}"
    _, layer, inner = module.split(".", 2)
    return f"transformer.h.{layer}.{INNER[inner]}.{leaf}"


def to_gpt2(name: str, value: Tensor, heads: int) -> Tensor:
    """Returns the value in transformers' GPT-2 of a parameter of our GPT. Our rows are query, key and value head by
    head, theirs all queries, all keys, all values; and their Conv1D keeps matrices transposed."""
    if "query_key_value" in name:
        value = value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return value.T if _is_matrix(name, value) else value


def from_gpt2(name: str, value: Tensor, heads: int) -> Tensor:
    """Returns the value in our GPT of a parameter of transformers' GPT-2; `name` is ours."""
    value = value.T if _is_matrix(name, value) else value
    if "query_key_value" in name:
        value = value.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
    return value


def _is_matrix(name: str, value: Tensor) -> bool:
    return name.startswith("blocks.") and value.ndim == 2
