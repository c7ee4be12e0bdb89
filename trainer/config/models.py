"""Keys of onecurve's own models, and refused combinations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from trainer.config.section import Count, Share
from trainer.config.strategy import strategy_of
from trainer.config.transforms import Transformed
from trainer.config.words import divisor, multiples


class Pretrained(Transformed):
    """A model that may start with pretrained weights in Hugging Face's format."""

    # With a default, unlike all others: sections of users' own models, and of earlier runs, do not have it.
    weights: str | None = Field(
        default=None,
        description="Start with these weights: a folder as `save_pretrained` of transformers writes it, or a "
        "`.safetensors` file, on every machine. A run that goes on has its own, and no longer needs them, "
        "unless `model.transforms` have frozen some. null: draw them.",
    )


class GPT(Pretrained):
    layers: Count = Field(description="Number of transformer blocks.")
    width: Count = Field(description="Width of the residual stream.")
    heads: Count = Field(description="Attention heads; they divide the width.")
    dropout: Share = Field(description="Dropout on embeddings and on every residual branch.")
    positions: Literal["learned", "rotary"] = Field(
        description="learned (GPT-2) or rotary (RoPE) position information."
    )
    activation: Literal["gelu", "relu2"] = Field(
        description="Inside the MLP: gelu (tanh form, GPT-2) or relu2 (squared ReLU, Primer)."
    )
    bias: bool = Field(description="Biases in linear layers and norms, as in GPT-2.")
    fused_norm: bool = Field(
        description="Norms by NVIDIA Apex's FusedLayerNorm, which has a bias: for `model.bias=true`. A run may change "
        "it at any time."
    )

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        yield from self._model_problems()
        if data := sections.get("data"):
            yield from data.without_text("model", self.name)
        strategy = strategy_of(sections)
        size = strategy.layout(world_size).tensor
        key = f"strategy.tensor_parallel={size}"
        if size > 1 and self.fused_norm:
            yield f"{key}: does not go with Apex's norms; nearest: model.fused_norm=false"
        if self.heads % size:
            yield f"{key}: does not divide model.heads={self.heads}; nearest: {divisor(self.heads, size)}"
        if strategy.splits_sequences() and self.dropout:
            yield (
                f"strategy.sequence_parallel=true: needs model.dropout=0 (now {self.dropout:g}): a process that holds "
                "a part of a sequence cannot draw the mask of all of it; nearest: strategy.sequence_parallel=false"
            )
        yield from strategy.cut_problems(self.layers, world_size, tied=True)

    def _model_problems(self) -> Iterator[str]:
        if self.weights is not None and (differences := self.unlike_gpt2()):
            yield f"model.weights={self.weights}: transformers has no weights for it; it is GPT-2 with {differences}"
        if self.fused_norm and not self.bias:
            remedy = "set model.bias=true, or model.fused_norm=false"
            yield f"model.fused_norm=true: Apex's FusedLayerNorm has a bias; {remedy}"
        if self.width % self.heads:
            near = multiples(self.width, self.heads)
            yield f"model.width={self.width}: does not divide by model.heads={self.heads}; nearest: {near}"
        elif self.positions == "rotary" and (size := self.width // self.heads) % 2:
            sizes = f"width {self.width} / heads {self.heads} = {size}"
            yield f"model.positions=rotary: needs an even head size, but {sizes}"

    def unlike_gpt2(self) -> str | None:
        """Returns the keys to change so that the model is GPT-2; None if it is."""
        gpt2 = {"positions": "learned", "activation": "gelu", "bias": True}
        changes = {key: value for key, value in gpt2.items() if getattr(self, key) != value}
        return " ".join(f"model.{key}={str(value).lower()}" for key, value in changes.items()) or None
