"""Attention in one place: which tokens attend to which (`Spec`), and what computes it (`Backend`).

A model has one `Attend`, which all of its layers call. A strategy that computes attention in another way
replaces or wraps its backend, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_GROUPED_HEAD = 256  # torch's fast kernels support grouped heads up to this size


@dataclass(frozen=True)
class Spec:
    """Which tokens of a sequence see which. Each condition narrows what the others allow, except `prefix`."""

    causal: bool = True
    """A token sees itself and the tokens before it; if false, those after it, too."""
    window: int | None = None
    """A token sees tokens at distances below this; 1: only itself. None: at any distance."""
    documents: Tensor | None = None
    """Integers [B, T], equal for the contiguous tokens of one document: a token sees its own document only."""
    prefix: int | Tensor | None = None
    """How many tokens at the beginning of each document (of the sequence, without `documents`) all of its tokens see,
    within the window, even if `causal`: a number, a number for each sequence [B], or one for each token [B, T], equal
    within a document."""

    def allowed(self, length: int, device: torch.device) -> Tensor | None:
        """Returns the spec as a mask that is True where a query (dimension 2) sees a key (dimension 3): bool [1, 1, T,
        T], or [B, 1, T, T] if it differs between sequences. None if `causal` alone says it all."""
        window = self.window if self.window is not None and self.window < length else None
        if window is None and self.documents is None and self.prefix is None:
            return None
        positions = torch.arange(length, device=device)
        distance = positions[:, None] - positions
        mask = (distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool))[None, None]
        if self.prefix is not None:
            mask = mask | self._in_prefix(positions)[:, None, None]
        if window is not None:
            mask = mask & (distance.abs() < window)
        if self.documents is not None:
            mask = mask & (self.documents[:, None, :, None] == self.documents[:, None, None, :])
        return mask

    def _in_prefix(self, positions: Tensor) -> Tensor:
        """Returns which tokens are in the prefix of their document, bool [1 or B, T]."""
        lengths = torch.as_tensor(self.prefix, device=positions.device)
        lengths = lengths[:, None] if lengths.dim() == 1 else lengths
        if self.documents is None:
            return torch.atleast_2d(positions < lengths)
        is_first = torch.ones_like(self.documents, dtype=torch.bool)
        is_first[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        starts = torch.where(is_first, positions, 0).cummax(dim=1).values
        return positions - starts < lengths


class Mask(NamedTuple):
    """A spec in the form that `SDPA` takes."""

    causal: bool
    allowed: Tensor | None
    """As `Spec.allowed` returns it."""


class Backend(Protocol):
    """What computes attention."""

    def mask(self, spec: Spec, length: int, device: torch.device) -> Any:
        """Returns the spec in this backend's own form. It is made once a pass, outside of what is recomputed."""
        ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, dropout: float = 0.0, scale: float | None = None
    ) -> Tensor:
        """Returns [B, heads, T, head size] of queries of that shape, and of keys and values, which may have fewer heads
        (each is then that of several neighboring queries). `mask`: what `mask` made. `scale`: of the products; None:
        1 / sqrt(head size)."""
        ...


class SDPA:
    """torch's scaled_dot_product_attention, with a mask only where causal attention alone is not enough."""

    def mask(self, spec: Spec, length: int, device: torch.device) -> Mask:
        allowed = spec.allowed(length, device)
        return Mask(spec.causal and allowed is None, allowed)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, dropout: float = 0.0, scale: float | None = None
    ) -> Tensor:
        group = q.shape[1] // k.shape[1]
        gqa = group > 1 and mask.allowed is None and k.shape[-1] == v.shape[-1] <= LARGEST_GROUPED_HEAD
        if group > 1 and not gqa:  # with a mask, torch only has a slow kernel for grouped heads
            k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask.allowed, dropout_p=dropout, is_causal=mask.causal, scale=scale, enable_gqa=gqa
        )


class Attend:
    """Attention of one model. All of its layers call this object, so that a new `backend` is used by all of them."""

    def __init__(self, backend: Backend | None = None):
        self.backend: Backend = backend or SDPA()

    def mask(self, spec: Spec, length: int, device: torch.device) -> Any:
        return self.backend.mask(spec, length, device)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, dropout: float = 0.0, scale: float | None = None
    ) -> Tensor:
        return self.backend(q, k, v, mask, dropout=dropout, scale=scale)
