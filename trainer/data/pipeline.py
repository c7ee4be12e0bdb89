"""webdataset's pipeline behind onecurve's order, with a state: `StatefulDataLoader` need not replay what was read."""

from __future__ import annotations

from typing import Any

import webdataset

from trainer.data.ordered_samples import OrderedSamples


class OrderedPipeline(webdataset.DataPipeline):
    """Runs a `webdataset.DataPipeline` that `source` starts; torchdata's `Stateful`, as the source is.

    The state is exact for stages that hold no sample back, such as `map`, `decode` and `to_tuple`; not for `batched`
    (let the data loader make batches) and `shuffle` (the order is shuffled already).
    """

    def __init__(self, source: OrderedSamples, *stages: Any):
        super().__init__(source, *stages)
        self._source = source

    def state_dict(self) -> dict[str, Any]:
        """Returns where the source stands."""
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was saved, in constant time. Raises ValueError for other data or another order."""
        self._source.load_state_dict(state)
