"""Small models that are unlike GPT: each has one thing that an engine easily gets wrong."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from trainer.config import Plugin
from trainer.facts import Facts

WIDTH = 16
Batch = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self, inner: nn.Module | None = None):
        super().__init__()
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.inner = inner or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.hidden(self.inner(x)))


class Net(nn.Module):
    """An embedding, two blocks, a head. It can be cut."""

    class Config(Plugin):
        pass

    embedding_parts = ("embedding",)
    head_parts = ("head",)

    def __init__(self, config: Config, facts: Facts):
        super().__init__()
        self.embedding = nn.Embedding(facts.vocab_size, WIDTH)
        self.blocks = nn.ModuleList(self.block() for _ in range(2))
        self.head = nn.Linear(WIDTH, facts.vocab_size, bias=False)

    def block(self) -> nn.Module:
        return Block()

    def embed(self, batch: Batch) -> Tensor:
        return self.embedding(batch["inputs"])

    def run(self, blocks: Iterable[nn.Module], x: Tensor, batch: Batch) -> Tensor:
        for block in blocks:
            x = block(x)
        return x

    def project(self, x: Tensor, batch: Batch) -> Tensor:
        return self.head(x)

    def forward(self, batch: Batch) -> Tensor:
        return self.project(self.run(self.blocks, self.embed(batch), batch), batch)

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        parameter.normal_(1.0 if parameter.dim() < 2 and "bias" not in name else 0.0, 0.1, generator=generator)


class Normed(nn.Module):
    """Batch norm over all positions of a micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, -2)).view_as(x)


class BatchNorm(Net):
    def block(self) -> nn.Module:
        return Block(Normed())


class UnusedHead(Net):
    """A head that no step uses."""

    head_parts = ("head", "extra")

    def __init__(self, config: Net.Config, facts: Facts):
        super().__init__(config, facts)
        self.extra = nn.Linear(WIDTH, WIDTH)


class Frozen(Net):
    """Its embedding, its first block, and all matrices of the other one are frozen."""

    def __init__(self, config: Net.Config, facts: Facts):
        super().__init__(config, facts)
        for part in (self.embedding, self.blocks[0], self.blocks[1].hidden.weight):
            part.requires_grad_(False)


class FrozenMatrices(Net):
    """Only what has no decay is trained: one of the optimizer's groups would be empty."""

    def __init__(self, config: Net.Config, facts: Facts):
        super().__init__(config, facts)
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.dim() < 2)


class AllFrozen(Net):
    def __init__(self, config: Net.Config, facts: Facts):
        super().__init__(config, facts)
        self.requires_grad_(False)


class Tied(Net):
    head_parts = ("embedding",)

    def __init__(self, config: Net.Config, facts: Facts):
        super().__init__(config, facts)
        del self.head

    def project(self, x: Tensor, batch: Batch) -> Tensor:
        return F.linear(x, self.embedding.weight)


class FrozenTied(Tied):
    def __init__(self, config: Net.Config, facts: Facts):
        super().__init__(config, facts)
        self.embedding.requires_grad_(False)


class NoBlocks(nn.Module):
    """One module that names no layers. It cannot be cut."""

    Config = Net.Config
    initialise = Net.initialise

    def __init__(self, config: Net.Config, facts: Facts):
        super().__init__()
        self.embedding = nn.Embedding(facts.vocab_size, WIDTH)
        self.head = nn.Linear(WIDTH, facts.vocab_size)

    def forward(self, batch: Batch) -> Tensor:
        return self.head(self.embedding(batch["inputs"]))


class Scaled(nn.Module):
    """A scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Scalar(Net):
    def block(self) -> nn.Module:
        return Block(Scaled())


class Heads(nn.Module):
    """A reshape that cannot be done without rows, as transformers' attention has it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, WIDTH // 2).softmax(-2).flatten(-2)


class Reshaped(Net):
    def block(self) -> nn.Module:
        return Block(Heads())


class Centered(nn.Module):
    """Takes off a running mean, which it keeps in bf16."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.flatten(0, -2).mean(0).to(self.mean.dtype), 0.25)
        return x - self.mean.clone()


class Bf16Buffer(Net):
    def block(self) -> nn.Module:
        return Block(Centered())


class Masked(nn.Module):
    """A constant that is not saved."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.arange(WIDTH) % 3 > 0, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


class NonPersistent(Net):
    def block(self) -> nn.Module:
        return Block(Masked())


class Gated(nn.Module):
    """LayerScale: a parameter of one dimension that is neither a bias nor in a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class LayerScale(Net):
    def block(self) -> nn.Module:
        return Block(Gated())


class Alternating(Net):
    """A layer for sequences that begin with an even number: in a step maybe only one process uses it, or none."""

    head_parts = ("head", "extra")

    def __init__(self, config: Net.Config, facts: Facts):
        super().__init__(config, facts)
        self.extra = nn.Linear(WIDTH, WIDTH)

    def project(self, x: Tensor, batch: Batch) -> Tensor:
        even = batch["inputs"][:, :1, None] % 2 == 0
        if isinstance(even, FakeTensor) or even.any():
            x = x + torch.where(even, self.extra(x), 0.0)
        return self.head(x)
