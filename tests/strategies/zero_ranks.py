"""One rank of test_zero.py: what `ragged` does in fp32, with each of some kinds of ZeRO in turn."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.strategies import ragged
from trainer import topology
from trainer.config import schema
from trainer.strategies.zero import Zero


def main(out: Path, micro_batch: int, checkpointing: str, kinds: list[str]) -> None:
    """`kinds`: such as `2`, `2o` (optimizer offloaded), `3op` (parameters, too)."""
    ranks, trained = topology.join(timeout_s=60), {}
    for kind in kinds:
        offload = {"offload_optimizer": "o" in kind, "offload_parameters": "p" in kind}
        ragged.STRATEGIES[kind] = (Zero, schema.Zero(name="zero", stage=int(kind[0]), bucket_mb=1, **offload))
        trained[kind] = ragged.train(ranks, kind, micro_batch, torch.float32, checkpointing)
    if ranks.is_main:
        torch.save(trained, out)
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
