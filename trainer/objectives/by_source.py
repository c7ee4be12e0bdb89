"""The metrics of a step once more for each source of a mixture: `loss/web` beside `loss`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._pytree import tree_map

from trainer.objectives import NUM_TARGETS, Batch, Normalizers, Objective, Outputs, Sums

SOURCE = "source_number"  # field of a batch, int64 [B]: which of the mixture's sources each row came from


def by_source(kind: type[Objective], names: Sequence[str]) -> Callable[..., Objective]:
    """Returns what makes an objective of `kind` that also sums for each source alone, by their names.

    An objective's sums are sums over rows, so those of a source are what `kind` makes of its rows. Held-out data are of
    no source.
    """

    class BySource(kind):  # type: ignore[valid-type, misc]
        def __reduce__(self) -> Any:
            return _restored, (kind, names, self.__dict__)

        def counts(self, batch: Batch) -> Mapping[str, float]:
            counts = dict(super().counts(batch))
            for name, rows in _rows(batch, names):
                counts |= {f"{key}/{name}": value for key, value in super().counts(_select(batch, rows)).items()}
            return counts

        def loss(self, outputs: Outputs, batch: Batch, totals: Normalizers) -> tuple[Tensor, Sums]:
            share, sums = super().loss(outputs, batch, totals)
            ones: Normalizers = defaultdict(lambda: torch.ones_like(share.detach(), dtype=torch.float64))
            sums = dict(sums)
            with torch.no_grad():
                for name, rows in _rows(batch, names):
                    of_source = super().loss(_select(outputs, rows), _select(batch, rows), ones)[1]
                    sums |= {f"{key}/{name}": value for key, value in of_source.items()}
            return share, sums

        def summary(self, sums: Mapping[str, float], rows: Mapping[str, Tensor]) -> dict[str, float]:
            by_name: dict[str, dict[str, float]] = {name: {} for name in ("", *names)}
            for key, value in sums.items():
                whole, _, name = key.rpartition("/")
                whole, name = (whole, name) if whole and name in by_name else (key, "")
                by_name[name][whole] = value
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


def _select(tree: Any, rows: Tensor) -> Any:
    def of(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):  # logits of a vocabulary that processes share
            where = DTensor.from_local(rows, tensor.device_mesh, [Replicate()] * tensor.device_mesh.ndim)
            return tensor.detach().index_select(0, where)
        return tensor.detach()[rows]

    return tree_map(of, tree)
