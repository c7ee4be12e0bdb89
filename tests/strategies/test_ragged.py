"""Sums over targets / the global count, never a mean of means: ragged batches against one fp64 process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.strategies import ragged
from trainer.objectives.causal_lm import IGNORE


def reference() -> dict[str, Any]:
    """Plain torch in float64: one process, one batch."""
    model = ragged.model(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=ragged.LR, eps=ragged.EPSILON)
    losses, norms = [], []
    for step in range(2):
        batch = ragged.batch(step)
        logits = model(batch).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, batch["targets"].flatten(), ignore_index=IGNORE)  # mean over targets
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), ragged.CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "weights": model.state_dict()}


def train(strategy: str, processes: int, micro_batch: int, checkpointing: str, out: Path) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, "-m", "tests.strategies.ragged", str(out)]
    command += [strategy, str(micro_batch), checkpointing]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


@pytest.mark.parametrize(
    ("strategy", "processes", "micro_batch", "checkpointing"),
    [
        ("ddp", 1, 3, "none"),
        ("ddp", 2, 1, "full"),
        pytest.param("ddp", 3, 2, "none", marks=pytest.mark.slow),
        ("ddp static", 2, 1, "full"),
        pytest.param("ddp static", 3, 1, "selective", marks=pytest.mark.slow),
        ("fsdp", 2, 1, "full"),
        pytest.param("fsdp", 3, 3, "none", marks=pytest.mark.slow),
        pytest.param("fsdp whole", 2, 2, "selective", marks=pytest.mark.slow),
        ("hsdp", 4, 1, "none"),
    ],
)
def test_loss_norm_and_weights(
    strategy: str, processes: int, micro_batch: int, checkpointing: str, tmp_path: Path
) -> None:
    trained, theirs = train(strategy, processes, micro_batch, checkpointing, tmp_path / "out.pt"), reference()
    assert min(theirs["norms"]) > ragged.CLIP  # clipping is active
    for dtype, of_loss, of_norm, of_weights in (("float64", 1e-9, 1e-9, 1e-9), ("float32", 1e-5, 1e-4, 1e-4)):
        ours = trained[f"torch.{dtype}"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=of_loss)
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=of_norm)
        for name, weight in theirs["weights"].items():
            found = ours["weights"][name].double()
            torch.testing.assert_close(found, weight, rtol=of_weights, atol=of_weights / 50)


def test_gradients_summed_in_bf16_are_rounded_and_no_worse(tmp_path: Path) -> None:
    ours, theirs = train("ddp bf16 reduce", 2, 2, "none", tmp_path / "out.pt")["torch.float32"], reference()
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=1e-6)
    assert ours["losses"][1] == pytest.approx(theirs["losses"][1], rel=1e-3)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-2)
    assert ours["norms"] != pytest.approx(theirs["norms"], rel=1e-6)  # 2^-8 for one of them
    for name, weight in theirs["weights"].items():
        assert (ours["weights"][name].double() - weight).norm() < 1e-2 * weight.norm() + 1e-3
