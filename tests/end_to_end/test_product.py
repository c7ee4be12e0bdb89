"""The whole product on a small scale: launch, continue, sample, report, sweeps, Hydra's command line, the wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.end_to_end.test_refusals import onecurve, trainer
from tests.runs import Run

SMOKE = ("experiment=smoke", "track.wandb.mode=offline")


def run(command: list[str], cwd: Path, **keywords) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **keywords)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("product")
    output = run(onecurve("train", "-n", "2", *SMOKE), cwd)
    assert "nats/char" in output
    assert "bits/byte" in output
    assert "next:" in output
    return cwd


def test_the_folder_keeps_the_contract(trained: Path) -> None:
    folder = trained / "runs" / "smoke"
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, 21))
    keys = {"step", "loss", "grad_norm", "lr", "tokens", "samples", "step_s", "data_wait_s", "tokens_per_s", "skipped"}
    assert all(keys <= row.keys() for row in metrics)
    assert {"loss", "nats_per_char", "bits_per_byte"} <= metrics[-1]["eval"].keys()
    assert metrics[-1]["tokens"] == 20 * 48 * 64
    assert {path.name for path in (folder / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    manifest = json.loads((folder / "checkpoints" / "step-00000020" / "manifest.json").read_text())
    assert {"step", "topology", "config", "files"} <= manifest.keys()
    assert "steps: 20" in (folder / "config.yaml").read_text()
    assert not list(trained.rglob(".hydra")) + list(trained.rglob("outputs"))


def test_goodput_accounts_for_every_second(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "runs/smoke/goodput.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (trained / "runs/smoke/events.jsonl").read_text().splitlines()]
    seconds = sum(value for row in rows for value in row["seconds"].values())
    from datetime import datetime

    start, end = (datetime.fromisoformat(event["time"].replace("Z", "+00:00")) for event in (events[0], events[-1]))
    assert seconds > 0.9 * (end - start).total_seconds()
    assert {kind for row in rows for kind in row["seconds"]} >= {"startup", "productive", "data_wait", "checkpoint"}


@pytest.mark.slow
def test_samples_and_report(trained: Path) -> None:
    text = run(onecurve("sample", "runs/smoke", "--prompt", "JULIET:", "--count", "1", "--tokens", "20"), trained)
    assert text.startswith("JULIET:")
    assert text == run(
        onecurve("sample", "runs/smoke", "--prompt", "JULIET:", "--count", "1", "--tokens", "20"), trained
    )
    report = (trained / "runs" / "smoke" / "report.html").read_text()
    assert "ROMEO:" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "report.html" in run(onecurve("report", "runs/smoke"), trained)


def test_exported_weights_are_the_checkpoints(trained: Path) -> None:
    run(onecurve("export", "runs/smoke", "--out", "weights.safetensors"), trained)
    exported = safetensors.torch.load_file(trained / "weights.safetensors")
    saved = Run(trained / "runs" / "smoke").weights()
    assert {f"model/{name}" for name in exported} == {name for name in saved if name.startswith("model/")}
    assert all(torch.equal(tensor, saved[f"model/{name}"]) for name, tensor in exported.items())


@pytest.mark.slow
def test_the_same_command_of_a_finished_run_does_nothing(trained: Path) -> None:
    before = (trained / "runs/smoke/metrics.jsonl").read_bytes()
    run(onecurve("train", "-n", "1", *SMOKE), trained)
    assert (trained / "runs/smoke/metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_wandb_has_one_run_for_all_lives(trained: Path) -> None:
    run(onecurve("train", "-n", "1", *SMOKE, "train.steps=30"), trained, env=_with_wandb())
    output = run(onecurve("train", "-n", "1", *SMOKE, "train.steps=35"), trained, env=_with_wandb())
    runs = list((trained / "runs/smoke/wandb").glob("wandb/offline-run-*")) or list(
        (trained / "runs/smoke/wandb").glob("offline-run-*")
    )
    assert len(runs) >= 2
    assert len({path.name.rpartition("-")[2] for path in runs}) == 1
    assert "wandb sync" in output


def _with_wandb() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}


@pytest.mark.slow
def test_hydras_command_line(tmp_path: Path) -> None:
    assert "steps: 7" in run(trainer("--cfg", "job", "train.steps=7"), tmp_path)
    assert "Defaults List" in run(trainer("--info", "defaults"), tmp_path)
    assert "train.global_batch=" in run(trainer("--help"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_completion(tmp_path: Path) -> None:
    env = {**os.environ, "COMP_LINE": "onecurve-trainer model.la", "COMP_POINT": "25"}
    command = [sys.executable, "-c", "from trainer.__main__ import main; main()", "-sc", "query=bash"]
    assert run(command, tmp_path, env=env).strip() == "model.layers="


@pytest.mark.slow
def test_a_sweep_trains_each_in_a_folder_of_its_own(tmp_path: Path) -> None:
    run(trainer("-m", *SMOKE, "train.steps=2", "optimizer.lr=0.001,0.01"), tmp_path)
    rates = []
    for metrics in sorted((tmp_path / "runs/smoke").glob("*/metrics.jsonl")):
        assert "optimizer.lr=" in metrics.parent.name
        rates.append(json.loads(metrics.read_text().splitlines()[-1])["lr"])
    assert rates == pytest.approx([0.0004, 0.004])


@pytest.mark.slow
def test_own_text_from_pack_to_training(tmp_path: Path) -> None:
    """A user's own road: pack a folder of texts, train on its shards."""
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Text number {number}. " * 40)
    run(onecurve("data", "pack", "texts", "--out", "shards", "--tokenizer", "bpe:300", "--validation", "0.2"), tmp_path)
    shards = ("data=webdataset", "data.shards='shards/train-*.tar'", "data.validation='shards/validation-*.tar'")
    output = run(trainer(*SMOKE, *shards, "data.tokenizer=shards/tokenizer.json", "run.name=own"), tmp_path)
    assert "nats/char" in output


@pytest.mark.slow
def test_own_model_from_own_package(tmp_path: Path) -> None:
    """A user's own model, as the README says: a package, a YAML file, an allowlist; trained, resumed, sampled."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "net.py").write_text(
        """
import torch
import trainer.config

class Net(torch.nn.Module):
    class Config(trainer.config.Plugin):
        depth: int
    def __init__(self, config, facts):
        super().__init__()
        self.embedding = torch.nn.Embedding(facts.vocab_size, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(config.depth))
        self.head = torch.nn.Linear(16, facts.vocab_size)
    def forward(self, batch):
        x = self.embedding(batch["inputs"])
        for layer in self.layers:
            x = torch.nn.functional.dropout(layer(x).relu(), 0.1, self.training)
        return self.head(x)
    def initialise(self, name, parameter, generator):
        parameter.normal_(0.0, 0.1, generator=generator)
"""
    )
    (tmp_path / "my_conf" / "model").mkdir(parents=True)
    (tmp_path / "my_conf" / "model" / "net.yaml").write_text("name: my_package.net:Net\ndepth: 2\n")
    own = ("--config-dir", "my_conf", "experiment=none", "model=net", "run.plugins=[my_package]", "run.name=own")
    small = ("train.global_batch=8", "train.log_every=1", "data.tokenizer=bytes", "sample.count=1", "sample.tokens=8")
    losses = []
    for steps in (4, 8):
        run(trainer(*own, *small, f"train.steps={steps}", "train.activation_checkpointing=full"), tmp_path)
        rows = [json.loads(line) for line in (tmp_path / "runs/own/metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows])
    assert len(losses[1]) == 8
    assert losses[1][:4] == losses[0]
    assert losses[1][-1] < losses[1][0]
    own = ("--plugins", "my_package", "--tokens", "4", "--prompt", "ROMEO:")
    sample = run(onecurve("sample", "runs/own", *own), tmp_path)
    assert sample.startswith("ROMEO:")
    refused = subprocess.run(onecurve("sample", "runs/own"), cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "package 'my_package' is not allowed" in refused.stderr


@pytest.mark.slow
def test_a_wheel_installed_elsewhere_trains(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path / "dist"), str(root)], tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    target = tmp_path / "site"
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)], tmp_path)
    env = {**os.environ, "PYTHONPATH": str(target)}
    where = run(
        [sys.executable, "-c", "import trainer, trainer.conf, launch.slurm; print(trainer.__file__)"], tmp_path, env=env
    )
    assert where.startswith(str(target))
    assert (target / "launch" / "slurm" / "job.sh").is_file()
    assert "nats/char" in run(trainer(*SMOKE), tmp_path, env=env)
