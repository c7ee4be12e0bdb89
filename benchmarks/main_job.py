"""The main job beside nanoGPT's CPU recipe, on the same text, split and cores: `python benchmarks/main_job.py`.

Writes benchmarks/main_job.json. Both run alone, one after the other; about 7 minutes on 2 cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPES = {
    "main job": (2, ["experiment=shakespeare"]),
    # config/train_shakespeare_char.py of nanoGPT with the flags its README gives for a CPU, run as one process on all
    # cores; as many steps as fit the main job's seconds on the machine of the log.
    "nanoGPT's CPU recipe": (
        1,
        [
            "experiment=shakespeare", "data.tokenizer=chars", "data.sequence_length=64", "train.global_batch=12",
            "train.steps=3000", "model.layers=4", "model.heads=4", "model.width=128", "model.positions=learned",
            "model.activation=gelu", "model.bias=false", "optimizer.lr=0.001", "optimizer.betas=[0.9,0.99]",
            "optimizer.no_decay=[norm]", "schedule.warmup_steps=100", "schedule.min_ratio=0.1", "eval.every=500",
        ],
    ),
}  # fmt: skip


def measure(procs: int, overrides: list[str], folder: Path) -> dict[str, object]:
    command = [sys.executable, "-c", "from launch.cli import main; main()", "train", "-n", str(procs), *overrides]
    subprocess.run([*command, f"run.dir={folder}", "track.wandb.mode=disabled", "sample.count=0"], check=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds, curve = 0.0, []
    for row in rows:
        seconds += row["step_s"]
        if "eval" in row:
            curve.append({"step": row["step"], "seconds": round(seconds, 1), **row["eval"]})
    return {"processes": procs, "steps": len(rows), "training_seconds": round(seconds, 1), "evaluations": curve}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        results = {
            name: measure(procs, overrides, Path(scratch) / str(number))
            for number, (name, (procs, overrides)) in enumerate(RECIPES.items())
        }
    out = Path(__file__).with_suffix(".json")
    out.write_text(json.dumps({"cpus": os.cpu_count(), **results}, indent=1) + "\n")
    for name, result in results.items():
        last = result["evaluations"][-1]  # type: ignore[index]
        print(f"{name}: {last['nats_per_char']:.4f} nats/char after {result['training_seconds']} s of training")


if __name__ == "__main__":
    main()
