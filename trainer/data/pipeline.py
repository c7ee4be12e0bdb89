"""webdataset's pipeline behind onecurve's order, with a state: `StatefulDataLoader` need not replay what was read."""

from __future__ import annotations

from typing import Any

import webdataset

from trainer.data.ordered_samples import OrderedSamples


class OrderedPipeline(webdataset.DataPipeline):
    """A `webdataset.DataPipeline` that `source` starts, torchdata's `Stateful` as that is.

    Exact for stages that hold no sample back when they give one, such as `map`, `decode` and `to_tuple`; not for
    `batched` (let the data loader make batches) and `shuffle` (the order is shuffled already).
    """

    def __init__(self, source: OrderedSamples, *stages: Any):
        super().__init__(source, *stages)
        self._source = source

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands."""
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes there, in constant time. ValueError if the state is of other data or another order."""
        self._source.load_state_dict(state)
