"""A recipe and what a person chooses besides: an option that was chosen by hand has its own values."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trainer.__main__ import guarded
from trainer.config.compose import compose, load, recipe_message
from trainer.errors import ConfigError

RECIPE = """# @package _global_
fits: {schedule: [linear]}
model: {layers: 2, width: 64, heads: 2}
optimizer: {betas: [0.9, 0.9], eps: 1.0e-6}
schedule: {min_ratio: 0.5, warmup_steps: 3}
train: {steps: 7}
"""
MINE = """# @package _global_
defaults:
  - override /optimizer: sgd
optimizer: {lr: 0.5}
"""
SGD = """
import trainer.config

class SGD:
    class Config(trainer.config.Plugin):
        lr: float
        weight_decay: float
        warm: int
"""
LOCAL = "# @package _global_\ndefaults:\n  - override /optimizer: lion\n"
OWN = ["run.plugins=[recipe_sgd]"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for group, name, text in (
        ("experiment", "ours", RECIPE),
        ("experiment", "mine", MINE),
        ("experiment", "wrong", "# @package _global_\nmodel: {layrs: 2}\n"),
        ("experiment", "misfit", "# @package _global_\nfits: {dta: [webdataset]}\n"),
        ("optimizer", "sgd", "name: recipe_sgd:SGD\nlr: 0.01\nweight_decay: 0.0\nwarm: ${train.steps}\n"),
        ("optimizer", "adam", "name: adamw\nlr: 0.02\n"),
    ):
        (tmp_path / "conf" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / group / f"{name}.yaml").write_text(text)
    (tmp_path / "recipe_sgd.py").write_text(SGD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return str(tmp_path / "conf")


def test_a_chosen_optimizer_has_its_own_rate(folder: str) -> None:
    assert load([]).optimizer.lr == 0.004
    for experiment in ([], ["experiment=shakespeare"]):
        config = load([*experiment, "optimizer=lion"])
        assert (config.optimizer.lr, config.optimizer.betas, config.train.steps) == (0.0006, (0.9, 0.99), 1200)
        assert "without its optimizer.lr" in recipe_message()
    config = load(["optimizer=sgd", *OWN], config_dir=folder)
    assert (config.optimizer.lr, config.optimizer.warm) == (0.01, 1200)  # its interpolation sees the run's values
    assert compose(["optimizer=adam"], folder)[0]["optimizer"]["lr"] == 0.02
    assert load(["optimizer=lion", "optimizer.lr=0.1"]).optimizer.lr == 0.1
    assert load(["optimizer=adamw"]).optimizer.lr == 0.004  # the recipe's own: nothing else was chosen


def test_an_option_chosen_in_conf_local_or_by_its_name_has_its_own_values(folder: str) -> None:
    (Path(folder) / "local").mkdir()
    (Path(folder) / "local" / "default.yaml").write_text(LOCAL)
    assert load(["experiment=shakespeare"], config_dir=folder).optimizer.lr == 0.0006
    assert load([], config_dir=folder).optimizer.lr == 0.0006
    raw, _ = compose(["experiment=ours", "optimizer.name=recipe_sgd:SGD", *OWN], config_dir=folder)
    assert raw["optimizer"]["betas"] == [0.9, 0.99]


@pytest.mark.parametrize(
    "other", ["model=llama", "data=webdataset", "data=samples", "objective.name=mine:Goal", "model.name=mine:Net"]
)
def test_the_default_recipe_is_for_its_own_model_data_and_objective(other: str) -> None:
    chosen = [other, "strategy=fsdp", "data.shards=x.tar"]
    assert compose(chosen) == compose([*chosen, "experiment=none"])
    compose(chosen)
    assert recipe_message().startswith(f"none: the default one, shakespeare, is not for {other};")
    assert compose(chosen)[0]["run"]["name"] == "run"


def test_what_is_no_choice_of_a_group_leaves_the_default_recipe() -> None:
    for other in ([], ["strategy=fsdp"], ["precision=bf16"], ["model.layers=1"], ["schedule=wsd"], ["launch=slurm"]):
        config = load(other)
        assert (config.train.global_batch, config.optimizer.lr, config.run.name) == (12, 0.004, "shakespeare")
        assert config.sample.prompt == "ROMEO:\n"
        assert recipe_message().startswith("shakespeare, the default;")
    assert load(["experiment=none"]).sample.prompt == ""


def test_a_recipe_says_for_which_other_options_its_values_are_made(folder: str) -> None:
    given = load(["experiment=ours", "schedule=linear"], config_dir=folder)
    assert (given.schedule.min_ratio, given.schedule.warmup_steps) == (0.5, 3)
    other = load(["experiment=ours", "schedule=wsd", "model=llama"], config_dir=folder)
    assert (other.schedule.min_ratio, other.schedule.warmup_steps, other.train.steps) == (0.0, 100, 7)
    smoke = load(["experiment=smoke", "model=llama", "data=webdataset", "data.shards=x.tar", "schedule=constant"])
    assert (smoke.data.sequence_length, smoke.schedule.warmup_steps, smoke.train.steps) == (64, 5, 20)
    large = load(["experiment=gpt2_124m", "data=webdataset", "data.shards=x.tar", "optimizer=muon"])
    assert (large.data.lanes, large.optimizer.lr, large.schedule.warmup_steps) == (960, 0.003, 700)


def test_the_option_that_a_recipe_chooses_itself_is_its_own(folder: str) -> None:
    for again in ([], ["optimizer=sgd"]):
        assert load(["experiment=mine", *OWN, *again], config_dir=folder).optimizer.lr == 0.5
    assert load(["experiment=mine", "optimizer=adamw"], config_dir=folder).optimizer.lr == 0.003


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=ours", "model=llama", "model.layers=3"], "model.layers: no such key"),
        (["experiment=wrong"], "model.layrs: no such key; did you mean 'model.layers'?"),
        (["experiment=misfit", "data=webdataset"], "experiment=misfit: `fits` names options by group"),
    ],
)
def test_what_nobody_has_a_key_for_is_refused(folder: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(overrides, config_dir=folder)
    assert message in str(caught.value)


def test_hydras_own_command_line_composes_alike(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer"])
    assert guarded(["--cfg", "job", "-p", "optimizer", "optimizer=lion"], 0.0) == 0
    assert "lr: 0.0006\n" in capsys.readouterr().out
    assert guarded(["--cfg", "job", "data=webdataset"], 0.0) == 0
    shown = capsys.readouterr().out
    assert "\n  name: run\n" in shown
    assert "fits:" not in shown


def test_a_recipe_chosen_in_conf_local_keeps_its_options(folder: str) -> None:
    (Path(folder) / "local").mkdir()
    chosen = "# @package _global_\ndefaults:\n  - override /experiment: mine\n"
    (Path(folder) / "local" / "default.yaml").write_text(chosen)
    config = load(OWN, config_dir=folder)
    assert (config.optimizer.name, config.optimizer.lr) == ("recipe_sgd:SGD", 0.5)
    assert recipe_message() == "mine"
