"""A recipe and a choice that it was not written for: its keys of another option are left out, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trainer.config.compose import load
from trainer.errors import ConfigError

RECIPE = """# @package _global_
model: {layers: 2, width: 64, heads: 2}
objective: {smoothing: 0.1}
optimizer: {betas: [0.9, 0.9], eps: 1.0e-6, momentum: 0.9}
schedule: {min_ratio: 0.5, decay_share: 0.1}
strategy: {stage: 2, stages: 2}
train: {steps: 7}
"""
OBJECTIVE = """
import trainer.config

class Own:
    class Config(trainer.config.Plugin):
        smoothing: float

class Other:
    class Config(trainer.config.Plugin):
        pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for group, name, text in (
        ("experiment", "ours", RECIPE),
        ("experiment", "wrong", "# @package _global_\nmodel: {layrs: 2}\n"),
        ("objective", "own", "name: recipe_goals:Own\nsmoothing: 0.2\n"),
        ("objective", "other", "name: recipe_goals:Other\n"),
        ("objective", "typo", "name: recipe_goals:Other\nsmooth: 1\n"),
    ):
        (tmp_path / "conf" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / group / f"{name}.yaml").write_text(text)
    (tmp_path / "recipe_goals.py").write_text(OBJECTIVE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return str(tmp_path / "conf")


CHOICE = ["run.plugins=[recipe_goals]", "objective=own", "optimizer=muon", "schedule=wsd"]


def test_of_each_group_the_option_that_was_chosen_decides(folder: str) -> None:
    config = load(["experiment=ours", *CHOICE], config_dir=folder)
    assert (config.model.layers, config.objective.smoothing, config.optimizer.momentum) == (2, 0.1, 0.9)
    assert (config.schedule.decay_share, config.train.steps) == (0.1, 7)
    sharded = [*CHOICE[:2], "strategy=zero", "schedule=linear"]
    assert load(["experiment=ours", *sharded], config_dir=folder).strategy.stage == 2
    others = ["model=llama", "objective=other", "optimizer=lion", "schedule=constant", "strategy=fsdp"]
    config = load(["experiment=ours", "run.plugins=[recipe_goals]", *others], config_dir=folder)
    assert config.optimizer.betas == (0.9, 0.9)  # which lion has, too
    assert config.train.steps == 7
    sections = (config.model, config.objective, config.optimizer, config.schedule, config.strategy)
    kept = {key for section in sections for key in section.model_fields_set}
    assert not kept & {"layers", "smoothing", "eps", "momentum", "min_ratio", "decay_share", "stage", "stages"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=ours", "model=llama", "model.layers=3"], "model.layers: no such key"),
        (["experiment=ours", "objective=typo", "run.plugins=[recipe_goals]"], "objective.smooth: no such key"),
        (["experiment=wrong"], "model.layrs: no such key; did you mean 'model.layers'?"),
    ],
)
def test_what_a_person_writes_for_the_option_is_refused(folder: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(overrides, config_dir=folder)
    assert message in str(caught.value)
