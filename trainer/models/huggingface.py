"""Causal language models of the transformers library, trained from their configs.

Parameters keep their names in transformers, so that exported weights have the names of its checkpoints.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from trainer.config import schema
from trainer.config.huggingface import architecture, make_transformers_config
from trainer.errors import ConfigError
from trainer.facts import Facts
from trainer.models.attention import Attend, Spec
from trainer.models.family import transformers_family
from trainer.models.tensor_parallel import Replicated

IMPLEMENTATION = "onecurve"  # of attention, as transformers' configs name it


class HuggingFace(nn.Module, ABC):
    """A model of transformers, whose modules keep their names and are called layer by layer.

    A subclass knows one layout of models: where its modules are, and how a layer is called.
    """

    Config = schema.HuggingFace
    family = staticmethod(transformers_family)
    layers: str
    embedding_parts: Sequence[str]
    head_parts: Sequence[str]
    residual: str | None = None  # the name of projections into the residual stream, if their initial values are smaller

    def __init__(self, config: schema.HuggingFace, facts: Facts):
        super().__init__()
        self.config = make_transformers_config(config, facts.sequence_length, vocab_size=facts.vocab_size)
        if self.config.vocab_size < facts.vocab_size:
            problem = f"fewer than the {facts.vocab_size} tokens of data.tokenizer"
            raise ConfigError(f"model.config.vocab_size={self.config.vocab_size}: {problem}")
        for name, module in architecture(config)(self.config).named_children():
            self.add_module(name, module)
        self.attend = Attend()
        route_attention(self, self.attend)
        self.tied = self.config.tie_word_embeddings
        if self.tied:  # the head shares the embedding's matrix: one parameter, one name, as transformers saves it
            del self.lm_head
        self.head_parts = (*self.head_parts, self.embedding_parts[0] if self.tied else "lm_head")

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """`inputs` int64 [B, T] -> logits [B, T, vocabulary].

        Optional `documents` and `positions`, int64 [B, T]: tokens attend to their own document only, and count their
        positions in it. Dropout, if the config has any, draws from torch's generator.
        """
        return self.project(self.run(self.blocks, self.embed(batch), batch), batch)

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.get_submodule(self.layers))

    @abstractmethod
    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the input of the first block, [B, T, width]."""

    @abstractmethod
    def run(self, blocks: Iterable[nn.Module], x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Returns `x` [B, T, width] after these blocks."""

    def mask(self, batch: dict[str, Tensor]) -> Any:
        """Returns which tokens see which, in the form that `attend` takes."""
        inputs = batch["inputs"]
        return self.attend.mask(Spec(documents=batch.get("documents")), inputs.shape[1], inputs.device)

    def project(self, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Returns the logits of the output of the last block."""
        norm, matrix = (self.get_submodule(name) for name in self.head_parts)
        return F.linear(norm(x), matrix.weight) if self.tied else matrix(norm(x))  # type: ignore[arg-type]

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Gives a parameter the initial value that transformers gives it."""
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:  # of a norm
            parameter.fill_(1.0)
        else:
            is_residual = self.residual is not None and name.endswith(f"{self.residual}.weight")
            scale = 1 / math.sqrt(2 * self.config.num_hidden_layers) if is_residual else 1.0
            parameter.normal_(0.0, self.config.initializer_range * scale, generator=generator)


class Llama(HuggingFace):
    """LlamaForCausalLM, and models of its layout."""

    model: Any
    layers = "model.layers"
    embedding_parts = ("model.embed_tokens",)
    head_parts = ("model.norm",)

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model.embed_tokens(batch["inputs"])

    def run(self, blocks: Iterable[nn.Module], x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        rotation, mask = self.model.rotary_emb(x, position_ids(batch)), self.mask(batch)
        for block in blocks:
            x = block(x, attention_mask=mask, position_embeddings=rotation)
        return x

    def tensor_parallel_plan(self, sequence_parallel: bool) -> dict[str, ParallelStyle]:
        """Returns transformers' plan for the layers' matrices; the vocabulary is sharded, too.

        With `sequence_parallel` each rank has a part of each sequence in the residual stream and its norms. The parts
        are gathered after the norms, since attention takes the sequence length from its input.
        """
        between: Placement = Shard(1) if sequence_parallel else Replicate()
        styles = {
            "colwise": ColwiseParallel(),
            "rowwise": RowwiseParallel(output_layouts=between),
            "replicated_with_grad_allreduce": Replicated(Shard(2), Shard(2)),  # norms of [B, T, heads, head size]
        }
        plan = {f"model.{name}": styles[style] for name, style in self.config.base_model_tp_plan.items()}
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
        for name in ("input_layernorm", "post_attention_layernorm"):
            plan[f"model.layers.*.{name}"] = Replicated(between)
        # If tied, the embedding's matrix, a DTensor, is multiplied by the norm's output.
        plan["model.norm"] = Replicated(between, use_local_output=not self.tied)
        if not self.tied:
            plan["lm_head"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        return plan


class GPT2(HuggingFace):
    """GPT2LMHeadModel."""

    transformer: Any
    layers = "transformer.h"
    embedding_parts = ("transformer.wte", "transformer.wpe")
    head_parts = ("transformer.ln_f",)
    residual = "c_proj"

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        return self.transformer.drop(self.transformer.wte(batch["inputs"]) + self.transformer.wpe(position_ids(batch)))

    def run(self, blocks: Iterable[nn.Module], x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        mask = self.mask(batch)
        for block in blocks:
            x = block(x, attention_mask=mask)
        return x


def position_ids(batch: dict[str, Tensor]) -> Tensor:
    """Returns the positions of the tokens, [B, T], or [1, T] if they are the same in every sequence."""
    inputs = batch["inputs"]
    positions = batch.get("positions")
    return torch.arange(inputs.shape[1], device=inputs.device)[None] if positions is None else positions


def route_attention(model: nn.Module, attend: Attend) -> None:
    """Makes the layers of transformers call `attend` instead of torch's attention."""
    from transformers import AttentionInterface  # an extra

    AttentionInterface.register(IMPLEMENTATION, _attention)
    module: Any
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(module, "is_causal") and getattr(config, "_attn_implementation", None) == "sdpa":
            module.config = copy.copy(config)  # a copy, since the original is exported
            module.config._attn_implementation = IMPLEMENTATION
            module.attend = attend


def _attention(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Calls `attend` as transformers expects: [B, heads, T, head size] in, [B, T, heads, head size] out."""
    return module.attend(q, k, v, mask, dropout=dropout, scale=scaling).transpose(1, 2).contiguous(), None
