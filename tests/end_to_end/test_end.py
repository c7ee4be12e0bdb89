"""The end of a run: nothing but the last save comes before `finished`, and nothing behind it changes that."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.runs import TINY, Run
from trainer import sampling
from trainer.config.compose import load
from trainer.data.tokenizer import ByteTokenizer
from trainer.models import ModelFactory
from trainer.topology import ALONE

SHORT = ("train.steps=2", "train.log_every=1", "eval.every=0", "checkpoint.every=0", "train.global_batch=4")
MODEL = """
import json
import pathlib
import time
from trainer.models.gpt import GPT

class Own(GPT):
    class Config(GPT.Config):
        run_dir: str
        seconds: float

    def forward(self, batch):
        status = pathlib.Path(self.config.run_dir, "status.json")
        if "targets" not in batch:  # it is sampled from
            with open(pathlib.Path(self.config.run_dir).parent / "seen", "a") as file:
                file.write(json.loads(status.read_text())["state"] + "\\n")
            time.sleep(self.config.seconds)
        return super().forward(batch)
"""


def sampled(folder: Path, seconds: float, *more: str, procs: int = 1) -> Run:
    """A run of a model that writes down each token's forward pass, and takes `seconds` for it."""
    (folder / "own.py").write_text(MODEL)
    (folder / "conf" / "model").mkdir(parents=True)
    keys = "layers: 1\nwidth: 32\nheads: 2\ndropout: 0.0\npositions: learned\nactivation: gelu\nbias: false\n"
    keys += f"fused_norm: false\nweights: null\nrun_dir: {folder}/run\nseconds: {seconds}\n"
    (folder / "conf" / "model" / "own.yaml").write_text(f"name: own:Own\n{keys}")
    ours = (f"--config-dir={folder}/conf", "run.plugins=[own]", "model=own", "sample.count=1", "sample.tokens=64")
    return Run(folder / "run", procs, (*ours, *SHORT, *more), plain=procs == 1)


@pytest.mark.slow
def test_a_run_is_finished_before_it_is_sampled_and_a_signal_ends_only_that(tmp_path: Path) -> None:
    run = sampled(tmp_path, 0.5)
    process = run.start()
    deadline = time.monotonic() + 200
    while not (tmp_path / "seen").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    states = (tmp_path / "seen").read_text().split()
    assert set(states) == {"finished"}
    assert len(states) < 64
    assert json.loads((run.folder / "status.json").read_text())["state"] == "finished"
    assert not (run.folder / "samples.txt").exists()


@pytest.mark.parametrize(
    ("procs", "strategy"), [(2, "strategy=fsdp"), *(pytest.param(2, s, marks=pytest.mark.slow) for s in (
        "strategy=ddp", "strategy=pipeline", "strategy=zero"))]
)  # fmt: skip
def test_samples_are_those_of_the_checkpoint(procs: int, strategy: str, tmp_path: Path) -> None:
    stages = ["strategy.stages=2"] if strategy == "strategy=pipeline" else []
    run = Run(tmp_path / "run", procs, (*SHORT, strategy, *stages, "sample.count=1", "sample.tokens=24"))
    run.train()
    expected = sampling.sample(*sampling.load_run(run.folder))
    assert (run.folder / "samples.txt").read_text() == expected[0] + "\n"


class Counted:
    """A strategy that counts how often its weights are asked for."""

    def __init__(self, model=None):
        self.model, self.asked = model, 0

    def full_weights(self):
        self.asked += 1
        return iter(())


def test_no_second_model_is_made_and_none_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(ModelFactory, "fill", lambda self, model: drawn.append(model))
    config = load([*TINY, "strategy=single", "sample.count=1", "track.console=false"])
    with sampling.without_values():
        own = sampling.model_factory(config, ByteTokenizer()).build()
    strategy = Counted(own)
    assert sampling.trained_model(config, strategy, ByteTokenizer(), ALONE) is own  # type: ignore[arg-type]
    small = load([*TINY, "strategy=single", "sample.count=1", "sample.max_parameters=1000", "track.console=false"])
    assert sampling.trained_model(small, strategy, ByteTokenizer(), ALONE) is None  # type: ignore[arg-type]
    assert (strategy.asked, drawn) == (0, [])


def test_only_an_objective_that_continues_text_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks.py").write_text(
        "import trainer.config\nimport trainer.objectives\nfrom trainer.objectives.causal_lm import CausalLM\n"
        "class Ranks(trainer.objectives.Objective):\n    class Config(trainer.config.Plugin):\n        pass\n"
        "class Longer(CausalLM):\n    class Config(trainer.config.Plugin):\n        pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = ("run.plugins=[tasks]", "strategy=single")
    assert not sampling.continues_text(load([*TINY, *plugins, "objective.name=tasks:Ranks"]))
    assert sampling.continues_text(load([*TINY, *plugins, "objective.name=tasks:Longer"]))
