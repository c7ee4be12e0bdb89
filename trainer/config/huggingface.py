"""Keys of transformers' models, checked: transformers itself takes any key, and keeps silent.

It is an extra, imported only for a config that names a model of it.
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
    """What models of transformers have in common."""

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
    """The class in transformers. Raises ConfigError if either is not there."""
    from trainer.optional_packages import without_torchao

    without_torchao()  # transformers imports torchao where it is installed: this way without a word on the terminal
    try:
        import transformers
    except ImportError:
        needs = "needs the package transformers: pip install 'onecurve[transformers]'"
        raise ConfigError(f"model.architecture={model.architecture}: {needs}") from None
    found = getattr(transformers, model.architecture, None)
    if found is None:
        raise ConfigError(f"model.architecture={model.architecture}: no such class in transformers")
    return found


def make_transformers_config(model: HuggingFace, sequence_length: int, **defaults: Any) -> Any:
    """The config object of transformers. What is not given of `defaults`, and the longest position, are filled in."""
    kind, given = architecture(model).config_class, model.config
    filled = {"bos_token_id": None, "eos_token_id": None, "attn_implementation": "sdpa", **defaults}
    positions = kind.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if not {positions, "max_position_embeddings"} & set(given):
        filled[positions] = sequence_length
    return kind(**{**filled, **given})


def refused_combinations(model: HuggingFace, sequence_length: int, tensor_parallel: int) -> Iterator[str]:
    """What is wrong with `model.config`."""
    try:
        kind = architecture(model).config_class
    except ConfigError as error:
        yield from error.problems
        return
    given, aliases = set(model.config), kind.attribute_map
    own = {field.name for field in fields(kind)} - {field.name for field in fields(kind.__base__)}
    unknown = given - (own | set(aliases)) | given & _USELESS
    for key in sorted(unknown):
        near = nearest_hint(f"model.config.{key}", [f"model.config.{name}" for name in own - _USELESS])
        yield f"model.config.{key}: no such key{near}"
    twice = {name for name in given & set(aliases) if aliases[name] in given}
    for name in sorted(twice):
        yield f"model.config.{name}: is another name of model.config.{aliases[name]}; give one of the two"
    if unknown or twice:
        return
    try:
        config = make_transformers_config(model, sequence_length)
    except Exception as error:  # of many kinds, with what is wrong in the last line
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
