"""The zoo: odd models x strategies. Each pair is trained, killed, taken up again, and compared."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from random import Random

from webdataset import TarWriter

from tests import forks
from tests.runs import Run
from tests.zoo import models

STEPS, SAVED, KILLED = 9, 3, 8
STRATEGIES = {
    "single": (1, ("strategy=single",)),
    "ddp 2": (2, ("strategy=ddp",)),
    "fsdp 2": (2, ("strategy=fsdp",)),
    "hsdp 2 x 2": (4, ("strategy=hsdp", "strategy.shard_size=2")),
    "zero1 2": (2, ("strategy=zero", "strategy.stage=1")),
    "zero2 2": (2, ("strategy=zero", "strategy.stage=2")),
    "zero3 2": (2, ("strategy=zero", "strategy.stage=3")),
    "pipeline 2": (2, ("strategy=pipeline",)),
}
MODELS = (
    "BatchNorm", "UnusedHead", "Frozen", "FrozenMatrices", "Tied", "FrozenTied", "NoBlocks", "Scalar", "Reshaped",
    "Bf16Buffer", "NonPersistent", "LayerScale",
)  # fmt: skip
OF_A_MICRO_BATCH = {"BatchNorm", "Bf16Buffer"}  # what these compute depends on who is in a micro-batch together
REFUSED = {
    ("NoBlocks", "pipeline 2"): "cannot be cut",
    **{
        ("Scalar", strategy): "blocks.0.inner.scale of the model is a scalar"
        for strategy in ("fsdp 2", "hsdp 2 x 2", "zero1 2", "zero2 2", "zero3 2")
    },
}
BESIDES = {("UnusedHead", "ddp 2"): ("strategy.find_unused_parameters=true",)}


@dataclass(frozen=True)
class Zoo:
    """`folder`: of the data and of the models' configs, which all cells share, and of the runs."""

    folder: Path

    def prepare(self) -> Zoo:
        """Three shards to train on; a validation split of five sequences, which leaves ranks without one."""
        random = Random(3)
        (self.folder / "model").mkdir()
        for name in [*MODELS, "Net", "Alternating", "AllFrozen"]:
            (self.folder / "model" / f"{name}.yaml").write_text(f"name: {models.__name__}:{name}\n")
        for name, documents in (("a", 20), ("b", 20), ("held", 1)):
            with TarWriter(str(self.folder / f"{name}.tar")) as tar:
                for i in range(documents):
                    text = "".join(random.choices("to be or not", k=random.randint(60, 120)))
                    tar.write({"__key__": f"{name}{i:02d}", "txt": text})
        return self

    def run(self, name: str, procs: int, overrides: tuple[str, ...]) -> Run:
        base = (
            "data=webdataset", f"data.shards={self.folder}/[ab].tar", f"data.validation={self.folder}/held.tar",
            f"data.cache={self.folder}/cache", "data.tokenizer=bytes", "data.sequence_length=16", "data.ledger=true",
            "data.lanes=4", f"train.steps={STEPS}", "train.global_batch=8", "train.micro_batch=2", "train.log_every=1",
            f"checkpoint.every={SAVED}", "checkpoint.asynchronous=false", "eval.every=4", "eval.steps=null",
            "optimizer.lr=0.002", "optimizer.weight_decay=0.1", "schedule.warmup_steps=2", "sample.count=0",
            "track.report=false", "precision=fp32",
        )  # fmt: skip
        return Run(self.folder / name, procs, overrides, base=base)

    def train(self, run: Run, *more: str) -> tuple[list[int], str]:
        """One life of the run, by the fork server; exit codes and output."""
        arguments = [*run.base, f"run.dir={run.folder}", *run.overrides, *more]
        return forks.train(["--config-dir", str(self.folder), "run.plugins=[tests]", *arguments], run.procs)

    def whole(self, model: str, procs: int, overrides: tuple[str, ...]) -> Run:
        """A run trained to its end without a disturbance; once."""
        run = self.run(_name(model, procs, overrides), procs, (f"model={model}", *overrides))
        if not run.folder.exists():
            codes, output = self.train(run)
            assert set(codes) == {0}, output
        return run

    def killed(self, model: str, procs: int, overrides: tuple[str, ...]) -> Run:
        """The same, killed in between on all processes, and taken up from the last checkpoint."""
        run = self.run(f"{_name(model, procs, overrides)}-killed", procs, (f"model={model}", *overrides))
        codes, output = self.train(run, f"debug.faults=[step.after_update:kill:{KILLED}]")
        assert set(codes) == {-9}, output
        assert run.last_step() < KILLED
        codes, output = self.train(run)
        assert set(codes) == {0}, output
        return run


def _name(*parts: object) -> str:
    return re.sub(r"\W+", "-", " ".join(map(str, parts)))
