"""Bad data under `data.on_error=quarantine`: counted on all ranks together, written down before the run goes on.

What is written down stays left out in every later life of the run, also should it be readable by then: the same curve.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.data.faults import Fault
from trainer.data.stream import StepData
from trainer.errors import DataError
from trainer.topology import Topology
from trainer.tracking.jsonl import mend, read

NAME = "quarantine.jsonl"


class Quarantine:
    """`budget`: how many samples and shards may be bad in the whole run. None: this run fails at the first."""

    def __init__(self, folder: Path, topology: Topology, budget: int | None, resumed: bool):
        self._path, self._topology, self._budget = folder / NAME, topology, budget
        if topology.is_main and not resumed:
            self._path.unlink(missing_ok=True)
        if topology.is_main:
            mend(self._path)
        self._rows: list[dict[str, Any]] = topology.broadcast(read(self._path) if topology.is_main else None)

    @property
    def left_out(self) -> list[int]:
        """Numbers in the run of the sequences that earlier lives left out."""
        return [row["number"] for row in self._rows if row["number"] is not None]

    def opened(self, faults: Sequence[Fault]) -> list[dict[str, Any]]:
        """Takes in what was found damaged when the data was opened; all ranks bring the same. As `steps`."""
        known = [{**row, "step": None} for row in self._rows]
        rows = [{"step": None, "number": None, **asdict(fault)} for fault in faults]
        return self._add([row for row in rows if row not in known])

    def steps(self, steps: Sequence[StepData]) -> list[dict[str, Any]]:
        """Takes in what these steps left out, on all ranks; gives what is to be told of it.

        One collective, where there is a budget. DataError on all ranks if it is spent.
        """
        if self._budget is None:
            return []
        own = [
            {"step": data.step, "number": number, **asdict(fault)} for data in steps for number, fault in data.faults
        ]
        rows = [row for part in self._topology.gather(own) for row in part]
        return self._add(sorted(rows, key=lambda row: row["number"]))

    def _add(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if rows and self._topology.is_main:
            with open(self._path, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
        self._rows += rows
        # A sample that comes again in another epoch, or in several sequences, is one.
        bad = len({(row["shard"], row["key"], None if row["key"] else row["byte"]) for row in self._rows})
        if self._budget is not None and bad > self._budget:
            last = self._rows[-1]["cause"]
            raise DataError(
                f"{bad} samples or shards cannot be read, but data.error_budget={self._budget}; "
                f"the last: {last}. All are in {self._path}"
            )
        return [{name: value for name, value in row.items() if name != "step"} for row in rows]
