"""Runs the matrix, judges it, and writes it down: `make parity` renews docs/parity.json and the tables of README and
docs/STRATEGIES.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.parity.cells import cells

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "docs" / "parity.json"
TOLERANCES = {"fp64": 1e-9, "fp32": 1e-5}
SPREAD = 2.0  # bf16: how far off fp64, as a multiple of the farthest that one process gets with any micro-batch
KINDS = {  # rows of README's table: (what it says, how the names of its cells begin)
    "`ddp`": ("ddp",),
    "`fsdp`, also with `cpu_offload`": ("fsdp",),
    "`hsdp`, 2 groups of 2": ("hsdp",),
    "`zero`, stages 0 to 3": ("zero",),
    "`fsdp` with `tensor_parallel=2`, also x 2, sequences and loss shared": ("tensor",),
}

Errors = Mapping[str, Any]  # cell -> precision -> variant -> {"loss", "norm", "weights"}: relative differences


def run(processes: int, which: str, named: str = "") -> dict[str, Any]:
    """Returns what the cells of that many processes are off, under torchrun where there are several."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launcher, "-m", "tests.parity.rank", str(out), which, named]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-8000:]}")
        return {f"{name} on {processes}": found for name, found in json.loads(out.read_text()).items()}


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for processes in sorted({cell.processes for cell in cells()}):
        found |= run(processes, "all")
    return found


def worst(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of the variants of a cell in one precision."""
    return {name: max(variant[name] for variant in found.values()) for name in ("loss", "norm", "weights")}


def red(found: Errors) -> list[str]:
    """What is not as it should be, one sentence each."""
    spread = worst(found["single on 1"]["bf16"])
    problems = []
    for cell, precisions in found.items():
        for precision, variants in precisions.items():
            for name, error in worst(variants).items():
                most = TOLERANCES.get(precision) or SPREAD * spread[name]
                if not error <= most:
                    problems.append(f"{cell}, {precision}: {name} is off by {error:.1e}, more than {most:.1e}")
    return problems


def table(found: Errors) -> Iterator[str]:
    """Every cell: the largest relative difference of loss, gradient norm and weights, of all variants and steps."""
    yield "| | processes | fp64 | fp32 | bf16, to one process's |"
    yield "|---|---|---|---|---|"
    for cell in found:
        name, _, processes = cell.rpartition(" on ")
        yield _row(found, name, processes, [cell])


def short_table(found: Errors) -> Iterator[str]:
    """Cells of a kind together."""
    yield "| | processes | fp64 | fp32 | bf16, to one process's |"
    yield "|---|---|---|---|---|"
    alone = [cell for cell in found if cell.startswith("pipeline") and " x " not in cell]
    kinds = {what: [cell for cell in found if cell.startswith(begins)] for what, begins in KINDS.items()}
    kinds["`pipeline`, six schedules"] = alone
    kinds["`pipeline` of 2 x `ddp`, `fsdp` or `tensor_parallel` of 2"] = [
        cell for cell in found if cell.startswith("pipeline") and cell not in alone
    ]
    for what, its_cells in kinds.items():
        processes = sorted({cell.rpartition(" on ")[2] for cell in its_cells})
        yield _row(found, what, ", ".join(processes), its_cells)


def _row(found: Errors, name: str, processes: str, its_cells: list[str]) -> str:
    spread = worst(found["single on 1"]["bf16"])
    texts = []
    for precision in ("fp64", "fp32", "bf16"):
        errors = [worst(found[cell][precision]) for cell in its_cells if precision in found[cell]]
        if precision == "bf16":
            texts.append(f"{max(error[name] / spread[name] for error in errors for name in spread):.1f}")
        else:
            texts.append(f"{max(max(error.values()) for error in errors):.0e}" if errors else "")
    return f"| {name} | {processes} | {' | '.join(texts)} |"


def written(text: str, mark: str, lines: Iterator[str]) -> str:
    """`text` with `lines` between its two marks."""
    before, begin, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- end of {mark} -->")
    assert begin, mark
    assert end, mark
    return before + begin + "\n".join(lines) + "\n" + end + after


def kept(found: Mapping[str, Any], path: Path) -> Any:
    """Writes down what was found, to two digits; gives what is written."""
    rounded = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.2g}"))
    path.write_text(json.dumps(rounded, indent=1) + "\n")
    return rounded


def main() -> None:
    found = everything()
    if problems := red(found):
        raise SystemExit("\n".join(problems))
    rounded = kept(found, RESULT)
    for file, lines in ((ROOT / "README.md", short_table(rounded)), (ROOT / "docs" / "STRATEGIES.md", table(rounded))):
        file.write_text(written(file.read_text(), "parity", lines))


if __name__ == "__main__":
    main()
