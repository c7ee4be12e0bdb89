"""Wraps a model's layers before a strategy wraps the model: activation checkpointing, then compilation.

The order lets the compiler see the recomputation. Both act in place, so parameter names never change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.errors import ConfigError
from trainer.patches import compile_numbers_of_layers
from trainer.strategies.buffers import clone_buffers, preserve_buffers

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

_EXPENSIVE = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def wrap_layers(model: nn.Module, activation_checkpointing: str, compile: bool) -> None:
    """Applies both to each of `model.blocks`, or to the whole model if it has no `blocks`."""
    if compile:
        compile_numbers_of_layers()
    for layer in getattr(model, "blocks", [model]):
        if activation_checkpointing != "none":
            layer.forward = _recompute(layer, activation_checkpointing == "selective")
        if compile:
            layer.compile()


def raise_if_scalars(model: nn.Module, limitation: str) -> None:
    """Raises ConfigError for a parameter without a dimension. `limitation` says, like "FSDP2 cannot shard", why."""
    if scalars := [name for name, parameter in model.named_parameters() if not parameter.dim()]:
        raise ConfigError(
            f"strategy: the parameter {scalars[0]} of the model is a scalar, which {limitation}: make it a tensor of "
            "one element, torch.ones(1); nearest: strategy=ddp"
        )


def _recompute(layer: nn.Module, selective: bool) -> Callable[..., Any]:
    """Returns the layer's forward with recomputation in the backward pass; `selective` keeps the expensive products.

    A layer with buffers is recomputed with the values that they had in the forward pass, and changes them only once.
    """
    keywords: dict[str, Any] = {"use_reentrant": False}
    if selective:
        keywords["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_expensive)
    if any(True for _ in layer.buffers()):
        keywords["context_fn"] = partial(_preserving_contexts, layer, keywords.get("context_fn", _no_contexts))
    return partial(checkpoint, layer.forward, **keywords)


def _preserving_contexts(layer: nn.Module, inner: Callable[[], Contexts]) -> Contexts:
    """Returns `inner`'s contexts of a forward pass that begins now and of its recomputation with the same buffers."""
    (forward, recomputation), buffers = inner(), clone_buffers(layer)

    @contextmanager
    def recompute_with_buffers() -> Iterator[None]:
        # In this order: the inner context counts the operators that run within it.
        with preserve_buffers(layer, buffers), recomputation:
            yield

    return forward, recompute_with_buffers()


def _no_contexts() -> Contexts:
    return nullcontext(), nullcontext()


def _keep_expensive(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
