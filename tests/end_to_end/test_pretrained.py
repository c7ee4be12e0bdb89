"""Runs that start with weights of Hugging Face's: one curve under every strategy, resumed without them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.end_to_end.test_huggingface import BASE, LLAMA, STRATEGIES, made
from tests.runs import Run, assert_same_curve
from trainer.config.compose import load
from trainer.data.tokenizer import ByteTokenizer
from trainer.models.family import family_of

transformers = pytest.importorskip("transformers")
STEPS = 4


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In several files, and far from initial values: with these the loss would be log(257) = 5.5."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(7)
    config = load([*BASE, *LLAMA])
    model = transformers.AutoModelForCausalLM.from_config(family_of(config, ByteTokenizer()).config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture(scope="module")
def single(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    steps = (f"train.steps={STEPS}", "checkpoint.every=2")
    run = made(
        tmp_path_factory.mktemp("single") / "run", 1, *LLAMA, *steps, f"model.weights={weights}", "strategy=single"
    )
    run.train()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_curve(strategy: str, single: Run, tmp_path: Path) -> None:
    run = made(tmp_path / "run", 2, *single.overrides[:-1], *STRATEGIES[strategy])
    run.train()
    assert run.metrics()[0]["loss"] > 7
    assert_same_curve(run, single, STEPS)


@pytest.mark.slow
def test_resumed_it_is_the_same_run_and_does_not_need_them(single: Run, weights: Path, tmp_path: Path) -> None:
    kept = single.folder / "pretrained/config.json"  # for exports
    assert kept.read_bytes() == (weights / "config.json").read_bytes()
    shutil.copytree(single.folder, tmp_path / "run")
    shutil.copytree(weights, tmp_path / "copy")
    at = f"model.weights={tmp_path}/copy"
    run = made(tmp_path / "run", 1, *single.overrides, at, f"train.steps={STEPS + 2}")
    run.train()  # the same weights in another place
    told = made(tmp_path / "run", 1, *run.overrides, "model.weights=null").train(expect=2)
    assert "model.weights: the run has '" in told
    shutil.rmtree(tmp_path / "copy")
    longer = made(tmp_path / "run", 1, *run.overrides, f"train.steps={STEPS + 4}")
    longer.train()
    assert longer.last_step() == STEPS + 4
    assert "no such file or folder" in made(tmp_path / "new", 1, *run.overrides).train(expect=2)
    assert not (tmp_path / "new").exists()
