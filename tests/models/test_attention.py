"""Attention against loops in fp64: each spec and all together, values and gradients; the bits of torch's own call; and
one seam, by which a backend serves every layer of every model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models import test_huggingface
from trainer.config.schema import GPT as GPTConfig
from trainer.facts import Facts
from trainer.models import initialise
from trainer.models.attention import SDPA, Attend, Spec
from trainer.models.gpt import GPT

B, HEADS, T, SIZE = 2, 4, 11, 8
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 1 + [2] * 6, [7] * 3 + [5] * 7 + [-1]])
SPECS = {
    "causal": Spec(),
    "everything": Spec(causal=False),
    "window": Spec(window=3),
    "window of both sides": Spec(causal=False, window=2),
    "window of one": Spec(window=1),
    "window as long as the sequence": Spec(window=T),
    "documents": Spec(documents=DOCUMENTS),
    "documents of both sides": Spec(causal=False, documents=DOCUMENTS),
    "prefix": Spec(prefix=4),
    "prefix of each sequence": Spec(prefix=torch.tensor([0, 5])),
    "prefix of documents": Spec(documents=DOCUMENTS, prefix=2),
    "prefix of each document": Spec(documents=DOCUMENTS, prefix=(DOCUMENTS == 2) * 3),
    "all": Spec(window=3, documents=DOCUMENTS, prefix=torch.tensor([4, 2])),
}


def sees(spec: Spec, row: int, query: int, key: int) -> bool:
    """What the docstrings of `Spec` say, for two tokens."""
    begin = 0
    if spec.documents is not None:
        document = spec.documents[row].tolist()
        if document[query] != document[key]:
            return False
        begin = document.index(document[key])
    if spec.window is not None and abs(query - key) >= spec.window:
        return False
    prefix = torch.as_tensor(0 if spec.prefix is None else spec.prefix)
    length = int(prefix.expand(B)[row] if prefix.dim() < 2 else prefix[row, key])
    return not spec.causal or key <= query or key - begin < length


def reference(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (k, v))
    mask = [[[[sees(spec, row, i, j) for j in range(T)] for i in range(T)]] for row in range(B)]
    scores = (q @ k.transpose(2, 3) / math.sqrt(SIZE)).exp() * torch.tensor(mask)
    return scores / scores.sum(dim=3, keepdim=True) @ v


def drawn(heads: int) -> Tensor:
    generator = torch.Generator().manual_seed(heads)
    return torch.randn(B, heads, T, SIZE, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("name", SPECS)
def test_it_is_what_loops_compute(name: str, key_heads: int) -> None:
    spec, attend = SPECS[name], Attend()
    inputs = [drawn(HEADS), drawn(key_heads), drawn(key_heads) + 1]
    results = []
    for compute in (lambda q, k, v: attend(q, k, v, attend.mask(spec, T, q.device)), lambda *x: reference(*x, spec)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = compute(*leaves)
        output.sin().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_specs_differ() -> None:
    """Else a condition that does nothing would pass."""
    outputs = [reference(drawn(HEADS), drawn(HEADS), drawn(HEADS), spec) for spec in SPECS.values()]
    same = {
        (one, other)
        for i, one in enumerate(SPECS)
        for j, other in enumerate(SPECS)
        if i < j and torch.equal(outputs[i], outputs[j])
    }
    assert same == {("causal", "window as long as the sequence")}


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_its_bits_are_those_of_torch_alone(documents: Tensor | None) -> None:
    """With no mask where none is needed, which is what torch has fast kernels for."""
    q, k, v = (torch.randn(B, HEADS, T, SIZE, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = None if documents is None else (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    attend = Attend()
    made = attend.mask(Spec(documents=documents), T, q.device)
    assert (made.allowed is None) == (documents is None)
    assert torch.equal(attend(q, k, v, made), expected)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("prefix", [None, 2])
def test_a_packed_document_is_what_it_is_alone(window: int | None, prefix: int | None) -> None:
    q, k, v = drawn(HEADS), drawn(HEADS) + 1, drawn(HEADS) - 1
    attend = Attend()
    spec = Spec(window=window, prefix=prefix, documents=DOCUMENTS)
    packed = attend(q, k, v, attend.mask(spec, T, q.device))
    for row in range(B):
        begin = 0
        while begin < T:
            end = begin + int((DOCUMENTS[row] == DOCUMENTS[row, begin]).sum())
            part = [x[row : row + 1, :, begin:end] for x in (q, k, v)]
            alone = attend(*part, attend.mask(Spec(window=window, prefix=prefix), end - begin, q.device))
            torch.testing.assert_close(packed[row : row + 1, :, begin:end], alone, rtol=1e-12, atol=1e-12)
            begin = end


class Counted(SDPA):
    """Torch's attention, which notes how often it is called."""

    calls = 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        self.calls += 1
        return super().__call__(*arguments, **keywords)


def gpt() -> GPT:
    config = GPTConfig(
        name="gpt", layers=3, width=32, heads=4, dropout=0.0, positions="rotary", activation="gelu", bias=False,
        fused_norm=False,
    )  # fmt: skip
    model = GPT(config, Facts(50, 16, steps=1))
    initialise(model, seed=3)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "gpt": gpt,
    "llama": lambda: test_huggingface.factory("LlamaForCausalLM")(),
    "gpt2": lambda: test_huggingface.factory("GPT2LMHeadModel")(),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_models_layers_all_call_its_backend(name: str) -> None:
    model, batch = MODELS[name](), {"inputs": torch.arange(16)[None]}
    before = model(batch)
    model.attend.backend = backend = Counted()
    assert torch.equal(model(batch), before)
    assert backend.calls == 3
