"""GPT: a pre-norm transformer decoder with tied embeddings (Radford et al. 2019; rotary positions: Su et al. 2021)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from trainer.config import schema
from trainer.facts import Facts
from trainer.models.attention import Attend, Spec
from trainer.models.dropout import dropout
from trainer.models.family import gpt_family
from trainer.models.tensor_parallel import Replicated
from trainer.optional_packages import without_apex


def missing(config: schema.GPT) -> str:
    """Returns what the model needs and this machine does not have; empty if nothing."""
    reason = without_apex("FusedLayerNorm") if config.fused_norm else ""
    return f"model.fused_norm=true: {reason}; nearest: model.fused_norm=false" if reason else ""


class GPT(nn.Module):
    """Maps a batch to logits. `blocks` are the layers that strategies may shard, checkpoint, compile or cut between."""

    Config = schema.GPT
    embedding_parts = ("token_embedding", "position_embedding")
    head_parts = ("norm", "token_embedding")
    family = staticmethod(gpt_family)

    def __init__(self, config: schema.GPT, facts: Facts):
        super().__init__()
        self.config = config
        self.sequence_length = facts.sequence_length
        self.token_embedding = nn.Embedding(facts.vocab_size, config.width)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(facts.sequence_length, config.width)
        self.attend = Attend()
        self.blocks = nn.ModuleList(Block(config, layer, self.attend) for layer in range(config.layers))
        self.norm = layer_norm(config)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """`inputs` int64 [B, T], optional `draws` int64 [B] (used in training only) -> logits [B, T, vocabulary].

        Optional `documents` and `positions`, int64 [B, T]: tokens attend to their own document only, and count their
        positions in it.
        """
        return self.project(self.run(self.blocks, self.embed(batch), batch), batch)

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the input of the first block, [B, T, width]."""
        inputs, positions = batch["inputs"], batch.get("positions")
        x = self.token_embedding(inputs)
        if self.config.positions == "learned":
            if positions is None:
                positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
            x = x + self.position_embedding(positions)
        return dropout(x, self.config.dropout, self._draws(batch), site=0)

    def run(self, blocks: Iterable[nn.Module], x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Returns `x` [B, T, width] after these blocks."""
        inputs, rotation = batch["inputs"], None
        if self.config.positions == "rotary":
            head_size = self.config.width // self.config.heads
            rotation = rotary(inputs.shape[1], head_size, inputs.device, batch.get("positions"))
        mask = self.attend.mask(Spec(documents=batch.get("documents")), inputs.shape[1], inputs.device)
        for block in blocks:
            x = block(x, rotation, self._draws(batch), mask)
        return x

    def project(self, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Returns the logits of the output of the last block."""
        return F.linear(self.norm(x), self.token_embedding.weight)

    def tensor_parallel_plan(self, sequence_parallel: bool) -> dict[str, ParallelStyle]:
        """Returns the plan in which each rank has a shard of the heads, of the MLP's hidden layer and of the
        vocabulary. In between it has all activations, or with `sequence_parallel` a part of each sequence."""
        between: Placement = Shard(1) if sequence_parallel else Replicate()
        plan: dict[str, ParallelStyle] = {
            "token_embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
            "position_embedding": Replicated(output_layout=between),
            # The embedding's matrix, a DTensor, is multiplied by the norm's output.
            "norm": Replicated(input_layout=between, use_local_output=False),
        }
        for name in ("attention_norm", "mlp_norm"):
            plan[f"blocks.*.{name}"] = Replicated(input_layout=between, output_layout=between)
        for name in ("attention.query_key_value", "mlp.input"):
            plan[f"blocks.*.{name}"] = ColwiseParallel(input_layouts=between)
        for name in ("attention.output", "mlp.output"):
            plan[f"blocks.*.{name}"] = RowwiseParallel(output_layouts=between)
        return plan

    def _draws(self, batch: dict[str, Tensor]) -> Tensor | None:
        return batch.get("draws") if self.training else None

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Gives a parameter GPT-2's initial value: residual projections are scaled by 1 / sqrt(2 layers)."""
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            scale = 1 / math.sqrt(2 * self.config.layers) if name.endswith("output.weight") else 1.0
            parameter.normal_(0.0, 0.02 * scale, generator=generator)


class Block(nn.Module):
    """Attention and MLP, each after a norm and on a residual branch."""

    def __init__(self, config: schema.GPT, layer: int, attend: Attend):
        super().__init__()
        self.p, self.layer = config.dropout, layer
        self.attention_norm = layer_norm(config)
        self.attention = Attention(config, attend)
        self.mlp_norm = layer_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: Tensor | None, draws: Tensor | None, mask: Any) -> Tensor:
        x = x + dropout(self.attention(self.attention_norm(x), rotation, mask), self.p, draws, site=2 * self.layer + 1)
        return x + dropout(self.mlp(self.mlp_norm(x)), self.p, draws, site=2 * self.layer + 2)


def layer_norm(config: schema.GPT) -> nn.Module:
    """Returns torch's LayerNorm, or Apex's if it is configured and installed. Training does not start without it
    (`missing`), but sampling from its weights works."""
    if config.fused_norm and not without_apex("FusedLayerNorm"):
        return importlib.import_module("apex.normalization").FusedLayerNorm(config.width)
    return nn.LayerNorm(config.width, bias=config.bias)


class Attention(nn.Module):
    """Multi-head self-attention. `mask`: which tokens see which, as made by `attend`."""

    def __init__(self, config: schema.GPT, attend: Attend):
        super().__init__()
        self.attend = attend
        self.head_size = config.width // config.heads
        # Its rows are query, key and value head by head, so that a shard of the rows is a shard of the heads.
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.output = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor, rotation: Tensor | None, mask: Any) -> Tensor:
        qkv = self.query_key_value(x)
        qkv = qkv.unflatten(-1, (-1, 3, self.head_size))
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(dim=3))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        y = self.attend(q, k, v, mask)
        return self.output(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Four times wider inside; GELU in its tanh form, or the squared ReLU (So et al. 2021, Primer, section 4.1)."""

    def __init__(self, config: schema.GPT):
        super().__init__()
        self.activation = config.activation
        self.input = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.output = nn.Linear(4 * config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        return self.output(F.gelu(x, approximate="tanh") if self.activation == "gelu" else _square(F.relu(x)))


def _square(x: Tensor) -> Tensor:
    """Returns x * x. CUDA's autocast computes a power, such as torch's `x.square()`, in fp32 and keeps it so."""
    return x * x


def rotary(
    length: int, head_size: int, device: torch.device, positions: Tensor | None = None, base: float = 10_000.0
) -> Tensor:
    """Returns cosines and sines of the rotation angles: [2, T, head_size / 2], or of `positions` [B, T]:
    [2, B, 1, T, head_size / 2]."""
    frequencies = base ** (-torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
    positions = torch.arange(length, device=device) if positions is None else positions[:, None]
    angles = positions[..., None].float() * frequencies
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the pairs (i, i + head_size / 2) of `x` [B, heads, T, head_size] by their positions' angles."""
    cos, sin = rotation.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
