"""Bad data under `data.on_error=quarantine`: counted on all ranks together, written down before the run goes on.

What is written down stays left out in every later life of the run, also should it be readable by then: the same curve.
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
    """`budget`: how many samples and shards may be bad in the whole run. None: this run fails at the first."""

    def __init__(self, folder: Path, topology: Topology, budget: int | None, resumed: bool):
        self._path, self._topology, self._budget = folder / NAME, topology, budget
        if topology.is_main and not resumed:
            self._path.unlink(missing_ok=True)
        if topology.is_main:
            repair(self._path)
        self._rows: list[dict[str, Any]] = topology.broadcast(read(self._path) if topology.is_main else None)

    @property
    def left_out(self) -> list[ExampleId]:
        """What earlier lives left out. Of a step that weights or batch sizes were changed for since, other units may
        come at these numbers: those are read."""
        return [ExampleId(row["number"], row["source"], row["unit"]) for row in self._rows if row["number"] is not None]

    def opened(self, faults: Sequence[BadData]) -> list[dict[str, Any]]:
        """Takes in what was found damaged when the data was opened; all ranks bring the same. As `steps`."""
        known = [{name: row[name] for name in ("shard", "key", "byte", "cause")} for row in self._rows]
        nowhere = {"step": None, "number": None, "source": None, "unit": None}
        return self._add([nowhere | asdict(fault) for fault in faults if asdict(fault) not in known])

    def steps(self, steps: Sequence[StepData]) -> list[dict[str, Any]]:
        """Takes in what these steps left out, on all ranks; gives what is to be told of it.

        One collective, where there is a budget. DataError on all ranks if it is spent.
        """
        if self._budget is None:
            return []
        own = [{"step": data.step, **slot._asdict(), **asdict(fault)} for data in steps for slot, fault in data.faults]
        own = own if self._topology.is_data_rank else []
        rows = [row for part in self._topology.gather(own) for row in part]
        return self._add(sorted(rows, key=lambda row: row["number"]))

    def _add(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if rows and self._topology.is_main:
            with open(self._path, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
                file.flush()
                sync(file.fileno())
        self._rows += rows
        # A sample that comes again, in another epoch or sequence or from where the data was moved to, is one.
        bad = len({(row["shard"] and file_name(row["shard"]), row["key"]) for row in self._rows})
        if self._budget is not None and bad > self._budget:
            last = self._rows[-1]["cause"]
            raise DataError(
                f"{bad} samples or shards cannot be read, but data.error_budget={self._budget}; "
                f"the last: {last}. All are in {self._path}"
            )
        return [{name: row[name] for name in ("number", "shard", "key", "byte", "cause")} for row in rows]
