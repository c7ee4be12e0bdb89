"""`model.weights` of a user's model that means something of its own by it: part of what the run is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.config import Config
from trainer.config.compose import load
from trainer.data.tokenizer import ByteTokenizer
from trainer.errors import ConfigError
from trainer.run_data import FoundData
from trainer.run_directory import _refuse_other_run

FOUND = FoundData({}, None, ByteTokenizer())


def config_of(folder: Path, *overrides: str) -> Config:
    return load(["data.tokenizer=bytes", "run.plugins=[tests]", *overrides], config_dir=str(folder))


def goes_on(folder: Path, before: dict[str, Any], config: Config, weights: str | None = None) -> bool:
    then = {"identity": before, "config": config.resolved(), "step": 0}
    try:
        _refuse_other_run(then, FOUND.identity(config, weights, {}, 0), config, folder)
    except ConfigError as error:
        return "model.weights: the run has" not in str(error)
    return True


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weighted.yaml").write_text("name: tests.transforms.users:Weighted\nweights: equal\n")
    return tmp_path


def test_of_a_users_model_its_value_counts(folder: Path) -> None:
    equal, other = (config_of(folder, "model=weighted", f"model.weights={value}") for value in ("equal", "by_size"))
    before = FOUND.identity(equal, None, {}, 0)
    assert goes_on(folder, before, equal)
    assert not goes_on(folder, before, other)
    del before["model"]["weights"]  # as an earlier version wrote it
    assert goes_on(folder, before, equal)


def test_of_a_built_in_one_the_fingerprint_counts_wherever_they_lie(folder: Path) -> None:
    gpt2 = ("model=gpt", "model.positions=learned", "model.activation=gelu", "model.bias=true")
    drawn, here, there = (config_of(folder, *gpt2, f"model.weights={path}") for path in ("null", "a", "b"))
    assert "weights" not in FOUND.identity(drawn, None, {}, 0)["model"]  # as earlier versions wrote it
    before = FOUND.identity(here, "f1", {}, 0)
    assert goes_on(folder, before, there, "f1")
    assert not goes_on(folder, before, here, "f2")
    assert not goes_on(folder, FOUND.identity(drawn, None, {}, 0), here, "f1")
