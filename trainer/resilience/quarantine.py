"""Bad data under `data.on_error=quarantine`: counted over all ranks, and recorded before the run continues.

Recorded samples stay left out in every later attempt of the run, even if they are readable by then, so that the curve
is the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.data.bad_data import BadData
from trainer.data.shard_spec import file_name
from trainer.data.stream import ExampleId, StepData
from trainer.errors import DataError
from trainer.files import sync
from trainer.topology import Topology
from trainer.tracking.jsonl import read, repair

NAME = "quarantine.jsonl"


class Quarantine:
    """The samples and shards that a run has left out. `budget` is how many may be bad; None fails at the first one."""

    def __init__(self, folder: Path, topology: Topology, budget: int | None, resumed: bool):
        self._path, self._topology, self._budget = folder / NAME, topology, budget
        if topology.is_main and not resumed:
            self._path.unlink(missing_ok=True)
        if topology.is_main:
            repair(self._path)
        self._rows: list[dict[str, Any]] = topology.broadcast(read(self._path) if topology.is_main else None)

    @property
    def left_out(self) -> list[ExampleId]:
        """Returns the samples that earlier attempts left out. If mixture weights or batch sizes have changed since,
        other samples may be at these positions; those are read."""
        return [ExampleId(row["number"], row["source"], row["unit"]) for row in self._rows if row["number"] is not None]

    def add_opening_faults(self, faults: Sequence[BadData]) -> list[dict[str, Any]]:
        """Records shards that were damaged when the data was opened, the same on all ranks. Returns their events."""
        recorded_faults = [{name: row[name] for name in ("shard", "key", "byte", "cause")} for row in self._rows]
        no_position = {"step": None, "number": None, "source": None, "unit": None}
        return self._add([no_position | asdict(fault) for fault in faults if asdict(fault) not in recorded_faults])

    def add_step_faults(self, steps: Sequence[StepData]) -> list[dict[str, Any]]:
        """Records the samples that these steps left out, on all ranks. Returns their events.

        It is one collective if there is a budget. Raises DataError on all ranks if the budget is spent.
        """
        if self._budget is None:
            return []
        local_rows = [
            {"step": data.step, **slot._asdict(), **asdict(fault)} for data in steps for slot, fault in data.faults
        ]
        local_rows = local_rows if self._topology.is_data_rank else []
        rows = [row for part in self._topology.gather(local_rows) for row in part]
        return self._add(sorted(rows, key=lambda row: row["number"]))

    def _add(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if rows and self._topology.is_main:
            with open(self._path, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
                file.flush()
                sync(file.fileno())
        self._rows += rows
        # A sample counts once, also if it comes again in another epoch or sequence, or after the data was moved.
        num_bad = len({(row["shard"] and file_name(row["shard"]), row["key"]) for row in self._rows})
        if self._budget is not None and num_bad > self._budget:
            last_cause = self._rows[-1]["cause"]
            raise DataError(
                f"{num_bad} samples or shards cannot be read, but data.error_budget={self._budget}; "
                f"the last: {last_cause}. All are in {self._path}"
            )
        return [{name: row[name] for name in ("number", "shard", "key", "byte", "cause")} for row in rows]
