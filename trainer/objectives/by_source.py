"""The metrics of a step once more for each source of a mixture: `loss/web` beside `loss`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._pytree import tree_map

from trainer.errors import ConfigError
from trainer.objectives import NUM_TARGETS, Batch, Normalizers, Objective, Outputs, Sums

SOURCE = "source_number"  # field of a batch, int64 [B]: which of the mixture's sources each row came from


def by_source(kind: type[Objective], names: Sequence[str]) -> Callable[..., Objective]:
    """Returns what makes an objective of `kind` that also sums for each source alone, by their names.

    An objective's sums are sums over rows, so those of a source are what `kind` makes of its rows. Held-out data are of
    no source. Raises ConfigError for what is not a subclass of Objective.
    """
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise ConfigError("track.by_source=true: needs an objective that is a subclass of onecurve.Objective")

    longest_first = sorted(names, key=len, reverse=True)  # a name may end as another one does

    class BySource(kind):  # type: ignore[valid-type, misc]
        def __reduce__(self) -> Any:
            return _restored, (kind, names, self.__dict__)

        def counts(self, batch: Batch) -> Mapping[str, float]:
            counts, of_sources = dict(super().counts(batch)), dict[str, float]()
            for name, rows in _rows(batch, names):
                part = super().counts(_select(batch, rows, batch)) if len(rows) else dict.fromkeys(counts, 0)
                of_sources |= {f"{key}/{name}": value for key, value in part.items()}
            return counts | of_sources

        def loss(self, outputs: Outputs, batch: Batch, totals: Normalizers) -> tuple[Tensor, Sums]:
            share, sums = super().loss(outputs, batch, totals)
            ones: Normalizers = defaultdict(lambda: torch.ones_like(share.detach(), dtype=torch.float64))
            nothing, of_sources = {key: torch.zeros_like(value.detach()) for key, value in sums.items()}, Sums()
            with torch.no_grad():
                for name, rows in _rows(batch, names):
                    part = nothing
                    if len(rows):
                        _, part = super().loss(_select(outputs, rows, batch), _select(batch, rows, batch), ones)
                    of_sources |= {f"{key}/{name}": value for key, value in part.items()}
            return share, {**sums, **of_sources}

        def summary(self, sums: Mapping[str, float], rows: Mapping[str, Tensor]) -> dict[str, float]:
            by_name: dict[str, dict[str, float]] = {name: {} for name in ("", *names)}
            for key, value in sums.items():
                name = next((name for name in longest_first if key.endswith(f"/{name}")), "")
                by_name[name][key.removesuffix(f"/{name}") if name else key] = value
            result = super().summary(by_name.pop(""), rows)
            for name, its in by_name.items():
                if targets := its.get(NUM_TARGETS):
                    result |= {f"{key}/{name}": value for key, value in super().summary(its, {}).items()}
                    result[f"{NUM_TARGETS}/{name}"] = targets
            return result

    return BySource


def _restored(kind: type[Objective], names: Sequence[str], state: dict[str, Any]) -> Objective:
    made: Any = by_source(kind, names)
    objective: Objective = made.__new__(made)
    objective.__dict__.update(state)
    return objective


def _rows(batch: Batch, names: Sequence[str]) -> list[tuple[str, Tensor]]:
    """Returns each source's name and its rows in a batch, int64 [n]; nothing of a batch without sources."""
    if SOURCE not in batch:
        return []
    return [(name, (batch[SOURCE] == number).nonzero().flatten()) for number, name in enumerate(names)]


def _select(tree: Any, rows: Tensor, batch: Batch) -> Any:
    """Returns these rows of what has rows; anything else as it is."""
    count = len(batch["draws"])

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != count:
            return leaf
        if isinstance(leaf, DTensor):  # logits of a vocabulary that processes share
            where = DTensor.from_local(rows, leaf.device_mesh, [Replicate()] * leaf.device_mesh.ndim)
            return leaf.detach().index_select(0, where)
        return leaf.detach()[rows]

    return tree_map(of, tree)
