"""One rank of the matrix of bits: all cells of as many processes as there are, one after the other.

python -m tests.bits.rank OUT.json quick|all|planted    (under torchrun, or alone: the reference)
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from tests.bits import cells
from tests.bits.cells import Cell
from trainer import topology
from trainer.strategies.leafwise import sum_tree


def main(out: Path, which: str) -> None:
    ranks = topology.join(timeout_s=120)
    steps = cells.STEPS if which == "all" else cells.QUICK_STEPS
    bits = {}
    if ranks.world_size == 1:
        quick = tuple({variant for cell in cells.cells() for variant in cell.quick})
        chosen = [Cell("single", 1, "strategy=single", quick, layers) for layers in (4, 8)]
    else:
        chosen = [cell for cell in cells.cells() if cell.processes == ranks.world_size]
    if which == "planted":
        _swap_one_addition()
    for cell in chosen:
        for variant in cells.VARIANTS if which == "all" else cell.quick:
            if which == "quick" and cell.layers == 8:
                continue
            bits[f"{cell.name}, {variant}, {cell.layers} layers"] = asdict(cells.trained(cell, ranks, variant, steps))
    if ranks.is_main:
        out.write_text(json.dumps(bits))
    ranks.close()


def _swap_one_addition() -> None:
    """Halves of the tree are cut at another leaf where a half has three."""

    def find_other(node: sum_tree.Node, leaves: int) -> tuple[sum_tree.Node, sum_tree.Node]:
        first, end = 0, leaves
        while True:
            middle = (first + end) // 2 + ((first, end) == (0, 3))
            halves = (first, middle), (middle, end)
            if node in halves:
                return halves[node == halves[0]], (first, end)
            first, end = halves[node[0] >= middle]

    sum_tree.find_sibling = find_other  # type: ignore[assignment]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
