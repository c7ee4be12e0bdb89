"""One rank of the matrix: all cells of as many processes as there are, one after the other. Writes what it found.

python -m tests.parity.rank OUT.json quick|all|planted [NAME]    (under torchrun; of cells that have NAME in theirs)
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.parity import cells, planted
from tests.parity.cells import Cell
from trainer import topology


def main(out: Path, which: str, named: str = "") -> None:
    ranks = topology.join(timeout_s=120)
    found = {}

    def errors(cell: Cell, precision: str, variant: tuple[int, str], spoil: Any = None) -> dict[str, float]:
        curve = cells.trained(cell, ranks, precision, *variant, spoil)
        return curve.away_from(cells.reference(cell.layers)) if ranks.is_main else {}

    if which == "planted":
        for cell in [cell for cell in cells.rounded_cells() if cell.processes == ranks.world_size]:
            found[f"rounded: {cell.name}"] = errors(cell, "fp32", (4, "none"))
        for name, cell, spoil in planted.bugs():
            found[name] = errors(cell, "fp32", (4, "none"), spoil)
    else:
        wanted = [cell for cell in cells.cells() if cell.processes == ranks.world_size and named in cell.name]
        for cell in [cell for cell in wanted if which == "all" or cell.quick]:
            started = time.monotonic()
            found[cell.name] = {
                precision: {
                    f"{variant[0]} micro-batches, recomputed: {variant[1]}": errors(cell, precision, variant)
                    for variant in cell.variants(precision, whole=which == "all")
                }
                for precision in (("fp64", "fp32", "bf16") if cell.fp64 else ("fp32", "bf16"))
            }
            if ranks.is_main:
                print(f"{cell.name}: {time.monotonic() - started:.1f} s", file=sys.stderr)
    if ranks.is_main:
        out.write_text(json.dumps(found))
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
