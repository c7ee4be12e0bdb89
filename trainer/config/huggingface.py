"""Checks the keys of transformers' models: transformers itself silently accepts any key.

The package is optional, and imported only for a config that names one of its models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal

from pydantic import Field

from trainer.config.models import Pretrained
from trainer.config.strategy import strategy_of
from trainer.config.words import nearest_hint
from trainer.errors import ConfigError

_USELESS = {"add_cross_attention", "use_cache"}  # not for training on text alone


class HuggingFace(Pretrained):
    """The keys that all models of transformers share."""

    architecture: str = Field(description="The class in transformers.")
    config: dict[str, Any] = Field(
        description="Keys of its config in transformers, such as `model.config.hidden_size=512`; the others are as "
        "there. The size of the vocabulary (of `data.tokenizer`) and the longest position (`data.sequence_length`) "
        "need not be given. Leave dropout at 0 for one curve: transformers draws it from torch's generator, so its "
        "masks depend on the number of processes and on `train.micro_batch`."
    )

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        if data := sections.get("data"):
            yield from refused_combinations(self, data.sequence_length, strategy_of(sections).layout(world_size).tensor)
            yield from data.without_text("model", self.name)


class Llama(HuggingFace):
    architecture: Literal["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"] = Field(
        description="The class in transformers."
    )


class GPT2(HuggingFace):
    architecture: Literal["GPT2LMHeadModel"] = Field(description="The class in transformers.")


def architecture(model: HuggingFace) -> Any:
    """Returns the class in transformers. Raises ConfigError if the class or the package is missing."""
    from trainer.optional_packages import without_torchao

    without_torchao()  # transformers imports torchao if it is installed: this keeps that silent
    try:
        import transformers
    except ImportError:
        needs = "needs the package transformers: pip install 'onecurve[transformers]'"
        raise ConfigError(f"model.architecture={model.architecture}: {needs}") from None
    model_class = getattr(transformers, model.architecture, None)
    if model_class is None:
        raise ConfigError(f"model.architecture={model.architecture}: no such class in transformers")
    return model_class


def make_transformers_config(model: HuggingFace, sequence_length: int, **defaults: Any) -> Any:
    """Returns the config object of transformers; `defaults` and the longest position fill in keys that are not set."""
    config_class, keys = architecture(model).config_class, model.config
    filled = {"bos_token_id": None, "eos_token_id": None, "attn_implementation": "sdpa", **defaults}
    positions = config_class.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if not {positions, "max_position_embeddings"} & set(keys):
        filled[positions] = sequence_length
    return config_class(**{**filled, **keys})


def refused_combinations(model: HuggingFace, sequence_length: int, tensor_parallel: int) -> Iterator[str]:
    """Yields the problems of `model.config`."""
    try:
        config_class = architecture(model).config_class
    except ConfigError as error:
        yield from error.problems
        return
    names, aliases = set(model.config), config_class.attribute_map
    known_names = {field.name for field in fields(config_class)} - {
        field.name for field in fields(config_class.__base__)
    }
    unknown = names - (known_names | set(aliases)) | names & _USELESS
    for key in sorted(unknown):
        near = nearest_hint(f"model.config.{key}", [f"model.config.{name}" for name in known_names - _USELESS])
        yield f"model.config.{key}: no such key{near}"
    duplicates = {name for name in names & set(aliases) if aliases[name] in names}
    for name in sorted(duplicates):
        yield f"model.config.{name}: is another name of model.config.{aliases[name]}; give one of the two"
    if unknown or duplicates:
        return
    try:
        config = make_transformers_config(model, sequence_length)
    except Exception as error:  # of many kinds; the last line says what is wrong
        yield f"model.config: {str(error).splitlines()[-1].strip()}"
        return
    width, heads = config.hidden_size, config.num_attention_heads
    key_heads, positions = getattr(config, "num_key_value_heads", heads), config.max_position_embeddings
    if width % heads:
        yield f"model.config: its width {width} does not divide by its {heads} attention heads"
    if heads % key_heads:
        yield f"model.config.num_key_value_heads={key_heads}: does not divide the {heads} attention heads"
    if key_heads % tensor_parallel:
        yield f"model.config: its {key_heads} heads of keys do not divide by strategy.tensor_parallel={tensor_parallel}"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < sequence_length:
        key, limit = f"model.config.sliding_window={window}", f"data.sequence_length={sequence_length}"
        yield f"{key}: windows shorter than {limit} are not supported; nearest: data.sequence_length={window}"
    if positions < sequence_length:
        yield f"model.config: its {positions} positions are fewer than data.sequence_length={sequence_length}"
