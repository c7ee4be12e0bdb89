"""The whole product on a small scale: launch, continue, sample, report, sweeps, Hydra's command line, the wheel."""

from __future__ import annotations

import json
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


def test_the_same_command_of_a_finished_run_does_nothing(trained: Path) -> None:
    before = (trained / "runs/smoke/metrics.jsonl").read_bytes()
    run(onecurve("train", "-n", "1", *SMOKE), trained)
    assert (trained / "runs/smoke/metrics.jsonl").read_bytes() == before


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
    import os

    return {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}


def test_hydras_command_line(tmp_path: Path) -> None:
    assert "steps: 7" in run(trainer("--cfg", "job", "train.steps=7"), tmp_path)
    assert "Defaults List" in run(trainer("--info", "defaults"), tmp_path)
    assert "train.global_batch=" in run(trainer("--help"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_completion(tmp_path: Path) -> None:
    import os

    env = {**os.environ, "COMP_LINE": "onecurve-trainer model.la", "COMP_POINT": "25"}
    command = [sys.executable, "-c", "from trainer.__main__ import main; main()", "-sc", "query=bash"]
    assert run(command, tmp_path, env=env).strip() == "model.layers="


def test_a_sweep_trains_each_in_a_folder_of_its_own(tmp_path: Path) -> None:
    run(trainer("-m", *SMOKE, "train.steps=2", "optimizer.lr=0.001,0.01"), tmp_path)
    rates = []
    for metrics in sorted((tmp_path / "runs/smoke").glob("*/metrics.jsonl")):
        assert "optimizer.lr=" in metrics.parent.name
        rates.append(json.loads(metrics.read_text().splitlines()[-1])["lr"])
    assert rates == pytest.approx([0.0004, 0.004])


def test_own_text_from_pack_to_training(tmp_path: Path) -> None:
    """A user's own road: pack a folder of texts, train on its shards."""
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Text number {number}. " * 40)
    run(onecurve("data", "pack", "texts", "--out", "shards", "--tokenizer", "bpe:300", "--validation", "0.2"), tmp_path)
    shards = ("data=webdataset", "data.shards='shards/train-*.tar'", "data.validation='shards/validation-*.tar'")
    output = run(trainer(*SMOKE, *shards, "data.tokenizer=shards/tokenizer.json", "run.name=own"), tmp_path)
    assert "nats/char" in output
