"""Adds the metrics of a step for each source of a mixture: `loss/web` beside `loss`."""

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
    """Returns a subclass of `kind` whose objectives also sum for each source alone, under the source's name.

    An objective's sums are sums over rows, so a source's sums are those of its rows. Held-out data belong to no source.
    Raises ConfigError if `kind` is not a subclass of Objective.
    """
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise ConfigError("track.by_source=true: needs an objective that is a subclass of onecurve.Objective")

    longest_first = sorted(names, key=len, reverse=True)  # a name may end with another one

    class BySource(kind):  # type: ignore[valid-type, misc]
        def __reduce__(self) -> Any:
            return _restore, (kind, names, self.__dict__)

        def counts(self, batch: Batch) -> Mapping[str, float]:
            counts, source_counts = dict(super().counts(batch)), dict[str, float]()
            for name, rows in _rows(batch, names):
                part = super().counts(_select(batch, rows, batch)) if len(rows) else dict.fromkeys(counts, 0)
                source_counts |= {f"{key}/{name}": value for key, value in part.items()}
            return counts | source_counts

        def loss(self, outputs: Outputs, batch: Batch, normalizers: Normalizers) -> tuple[Tensor, Sums]:
            share, sums = super().loss(outputs, batch, normalizers)
            unit_normalizers: Normalizers = defaultdict(lambda: torch.ones_like(share.detach(), dtype=torch.float64))
            zeros, source_sums = {key: torch.zeros_like(value.detach()) for key, value in sums.items()}, Sums()
            with torch.no_grad():
                for name, rows in _rows(batch, names):
                    part = zeros
                    if len(rows):
                        _, part = super().loss(
                            _select(outputs, rows, batch), _select(batch, rows, batch), unit_normalizers
                        )
                    source_sums |= {f"{key}/{name}": value for key, value in part.items()}
            return share, {**sums, **source_sums}

        def summary(self, sums: Mapping[str, float], rows: Mapping[str, Tensor]) -> dict[str, float]:
            by_name: dict[str, dict[str, float]] = {name: {} for name in ("", *names)}
            for key, value in sums.items():
                name = next((name for name in longest_first if key.endswith(f"/{name}")), "")
                by_name[name][key.removesuffix(f"/{name}") if name else key] = value
            result = super().summary(by_name.pop(""), rows)
            for name, source_sums in by_name.items():
                if num_targets := source_sums.get(NUM_TARGETS):
                    result |= {f"{key}/{name}": value for key, value in super().summary(source_sums, {}).items()}
                    result[f"{NUM_TARGETS}/{name}"] = num_targets
            return result

    return BySource


def _restore(kind: type[Objective], names: Sequence[str], state: dict[str, Any]) -> Objective:
    objective_class: Any = by_source(kind, names)
    objective: Objective = objective_class.__new__(objective_class)
    objective.__dict__.update(state)
    return objective


def _rows(batch: Batch, names: Sequence[str]) -> list[tuple[str, Tensor]]:
    """Returns each source's name and its rows in a batch, int64 [n]; an empty list for a batch without sources."""
    if SOURCE not in batch:
        return []
    return [(name, (batch[SOURCE] == number).nonzero().flatten()) for number, name in enumerate(names)]


def _select(tree: Any, rows: Tensor, batch: Batch) -> Any:
    """Returns these rows of each tensor that has rows, and anything else unchanged."""
    count = len(batch["draws"])

    def select(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != count:
            return leaf
        if isinstance(leaf, DTensor):  # logits of a vocabulary that is sharded over ranks
            indices = DTensor.from_local(rows, leaf.device_mesh, [Replicate()] * leaf.device_mesh.ndim)
            return leaf.detach().index_select(0, indices)
        return leaf.detach()[rows]

    return tree_map(select, tree)
