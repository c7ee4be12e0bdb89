"""The config: every wrong value refused with all the others, in one block; every key explained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainer.config import reference
from trainer.config.compose import complete, load, options
from trainer.config.interval import Interval
from trainer.config.schema import SECTIONS
from trainer.config.validate import keys, validate
from trainer.errors import ConfigError
from trainer.registry import OPTIONS

ROOT = Path(__file__).parents[2]


def problems(*overrides: str, processes: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(overrides, processes)
    return error.value.problems


def test_defaults_are_valid_for_many_processes() -> None:
    for processes in (1, 2, 3, 4, 6, 12):
        config = load([], processes)
        assert config.train.global_batch % processes == 0


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_is_valid(name: str) -> None:
    overrides = [f"experiment={name}"]
    about = yaml.safe_load((ROOT / "conf" / "experiment" / f"{name}.yaml").read_text())["about"]
    assert about["what"]
    if "data.shards=" in about.get("run", ""):
        overrides.append("data.shards=train.tar")
    load(overrides, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=5", "train.stpes: no such key; did you mean 'train.steps'?"),
        ("trian.steps=5", "trian: no such key; did you mean 'train'?"),
        ("train.steps=abc", "train.steps=abc: should be a valid integer"),
        ("train.steps=true", "train.steps=True: should be a number"),
        ("train.steps=0", "train.steps=0: should be greater than or equal to 1"),
        ("train.steps=1.5", "train.steps=1.5: should be a valid integer"),
        ("optimizer.lr=nan", "optimizer.lr=nan: should be a finite number"),
        ("optimizer.betas=[0.9,2]", "optimizer.betas.1=2: should be less than 1"),
        ("strategy=ddb", "strategy=ddb: no such option; did you mean 'ddp'?"),
        ("experiment=shakespear", "experiment=shakespear: no such option; did you mean 'shakespeare'?"),
        ("model.heads=5", "does not divide by model.heads=5"),
        ("checkpoint.every=3weeks", "'3weeks' is not an interval"),
        ("track.wandb.mod=x", "track.wandb.mod: no such key; did you mean 'track.wandb.mode'?"),
        ("run.name=../x", "run.name=../x: "),
        ("data=webdataset", "data.shards: missing"),
        ("model.name=evil:Net", "package 'evil' is not allowed; if you trust it, add run.plugins=[evil]"),
        ("debug.faults=[step.los:nan:1]", "'step.los' is not a point; there are: start.built"),
        ("debug.faults=[step.loss:die:1]", "'die' is not an action; there are: kill"),
        ("debug.faults=[data.next:nan:1]", "nan needs numbers to change; there are some at step.weights and step.loss"),
        ("debug.faults=[data.next:errno@ENOTHING:1]", "'ENOTHING' is not an error number"),
        ("debug.faults=[data.next:kill:0]", "passes are counted from 1"),
        ("launch.time_limit=100", "launch.time_limit=100: should be a time, such as 3h"),
        ("--steps", "options are written key=value"),
        ("steps 5", "is not an override"),
        ("model=null", "Config group override must be a string"),
        ("~train.clip_norm", "train.clip_norm: missing"),
    ],
)
def test_refused(override: str, message: str) -> None:
    assert message in "\n".join(problems(override))


@pytest.mark.parametrize(
    "value", ["/d/train-{000000..000003}.tar", "~/x-*.tar", "https://h/{a,b}.tar?sig=1&t='x'", "pipe:zcat a.gz | cat"]
)
def test_places_of_shards_need_no_quotes_of_hydras(value: str) -> None:
    config = load(["data=webdataset", f"data.shards={value}"])
    assert config.data.shards == value


def test_all_problems_at_once() -> None:
    found = problems("train.stpes=5", "train.steps=abc", "strategy=ddb", "model.heads=5", "nonsense")
    assert len(found) == 5


def test_batch_arithmetic_is_shown() -> None:
    (problem,) = problems("train.global_batch=7", "train.micro_batch=2", processes=2)
    assert "2 processes x train.micro_batch=2 = 4" in problem
    assert "nearest: 4 or 8" in problem


def test_single_is_refused_on_two_processes() -> None:
    assert "use strategy=ddp" in problems("strategy=single", processes=2)[0]


def test_hybrid_groups_must_divide_the_processes() -> None:
    hybrid = ("strategy=hsdp", "train.global_batch=12")
    (problem,) = problems(*hybrid, "strategy.shard_size=4", processes=6)
    assert problem == "strategy.shard_size=4: does not divide 6 processes into groups; nearest: 3"


def test_implementations_that_do_not_go_together() -> None:
    (problem,) = problems("strategy=fsdp", "optimizer.implementation=apex")
    assert problem == (
        "optimizer.implementation=apex: works with strategy=single, ddp, not with fsdp; nearest: "
        "optimizer.implementation=fused"
    )
    assert (
        "works with strategy=single, ddp, fsdp, hsdp" in problems("strategy=zero", "optimizer.implementation=8bit")[0]
    )
    (problem,) = problems("model.fused_norm=true")
    assert "set model.bias=true" in problem
    split = ("strategy=fsdp", "strategy.tensor_parallel=2", "train.global_batch=12")
    found = problems(*split, "precision=fp8", "model.bias=true", "model.fused_norm=true", processes=2)
    assert ["nearest: precision=bf16" in found[0], "nearest: model.fused_norm=false" in found[1]] == [True, True]


def test_a_users_model_and_config_folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text(
        "from trainer.config import Plugin\n"
        "class Net:\n    class Config(Plugin):\n        depth: int\n"
    )  # fmt: skip
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("name: my_package:Net\ndepth: 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = load(["model=mine", "run.plugins=[my_package]"], config_dir=str(tmp_path / "conf"))
    assert config.model.depth == 3
    with pytest.raises(ConfigError, match=r"model.depth=x: should be a valid integer"):
        load(["model=mine", "run.plugins=[my_package]", "model.depth=x"], config_dir=str(tmp_path / "conf"))


def test_a_second_model_is_as_the_runs_own_but_for_what_it_says() -> None:
    config = load(
        ["model.layers=3", "optimizer.lr=0.01", "models.trained.critic={model: {width: 64}, optimizer: {lr: 0.1}}"]
    )
    critic = config.models.trained["critic"]
    assert critic.model == config.model.model_copy(update={"width": 64})
    assert (critic.optimizer.lr, critic.schedule) == (0.1, config.schedule)
    assert validate(config.resolved()) == config
    whole = "{name: lion, lr: 0.1, betas: [0.9, 0.99], weight_decay: 0, no_decay: [], ema: null}"
    lion = load([f"models.trained.critic.optimizer={whole}"])
    assert lion.models.trained["critic"].optimizer.name == "lion"
    with pytest.raises(ConfigError) as caught:
        load(["models.trained.a={mode: {}}", "models.trained.b={model: {wide: 3}}", "models.trained.c.model.weights=x"])
    assert caught.value.problems == [
        "models.trained.a: no such key mode: should be a section with the keys model, optimizer, schedule",
        "models.trained.b.model.wide: no such key; did you mean 'models.trained.b.model.width'?",
        "models.trained.c.model.weights: only the run's own model can start with given weights",
    ]
    with pytest.raises(ConfigError) as caught:
        load(["models.trained.d.model=gpt", "models.trained.model={}", "models.trained.e={}", "models.frozen.e=runs/e"])
    other = "should have another name: a word, none of model, optimizer, scaler, nor the name of a frozen model"
    assert caught.value.problems == [
        "models.trained.d.model=gpt: should be a section, such as {name: gpt}",
        f"models.trained.model: {other}",
        f"models.trained.e: {other}",
    ]


def test_a_second_model_is_checked_as_if_it_were_the_runs_own() -> None:
    """Against the strategy, data and precision of the run, with its own keys in the messages; all else is told once."""
    both = ("strategy=fsdp", "strategy.tensor_parallel=2", "model.heads=4", "train.global_batch=7")
    critic = "models.trained.critic={model: {heads: 3, width: 96}, optimizer: {implementation: 8bit}}"
    alone, with_it = (problems(*both, *more, processes=4) for more in ((), (critic,)))
    assert alone == [
        "train.global_batch=7: does not divide by 2 copies of the model (4 processes / 2); nearest: 6 or 8"
    ]
    assert with_it == [
        *alone, "strategy.tensor_parallel=2: does not divide models.trained.critic.model.heads=3; nearest: 1",
    ]  # fmt: skip
    muon = "{name: muon, lr: 0.1, weight_decay: 0, no_decay: [], ema: null, momentum: 0.9, newton_schulz_steps: 5, "
    muon += "newton_schulz_dtype: fp32, adamw_modules: [], betas: [0.9, 0.99], eps: 1e-8}"
    assert problems("strategy=zero", f"models.trained.critic.optimizer={muon}", processes=2) == [
        "models.trained.critic.optimizer=muon: needs whole matrices, and DeepSpeed's stage 2 steps on one flat piece "
        "of all parameters; nearest: strategy=fsdp"
    ]
    own = ("model.width=30", "model.heads=4", "models.trained.a={model: {width: 32}}", "models.trained.b={}")
    assert problems(*own) == [
        "model.width=30: does not divide by model.heads=4; nearest: 28 or 32",
        "models.trained.b.model.width=30: does not divide by models.trained.b.model.heads=4; nearest: 28 or 32",
    ]


def test_no_section_brings_torch_along() -> None:
    code = (
        "import sys; from trainer.registry import OPTIONS; from trainer.config.compose import load;"
        "[option.config for options in OPTIONS.values() for option in options.values()];"
        "load(['strategy=pipeline', 'strategy.stages=2'], 2); assert not {'torch', 'launch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_config_of_an_earlier_version_is_completed() -> None:
    config = load(["strategy=fsdp", "data=webdataset", "data.shards=x.tar", "model.layers=3"])
    old = config.resolved()
    del old["strategy"]["cpu_offload"], old["precision"]["reduce"], old["model"]["fused_norm"]
    del old["models"]  # a section that is new since
    assert validate(complete(old)) == config
    wrong = complete({"model": {"name": "gone"}, "run": None})
    assert (wrong["model"], wrong["run"]) == ({"name": "gone"}, None)  # which the check refuses


def test_every_key_has_help_and_is_in_it() -> None:
    text = reference.help_text()
    schemas = [
        *SECTIONS.items(),
        *((group, option.config) for group, choices in OPTIONS.items() for option in choices.values()),
    ]
    for section, schema in schemas:
        for name, field in keys(schema):
            assert field.description, f"{section}.{name} has no help"
            assert f"{section}.{name}=" in text


def test_reference_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONECURVE_CACHE")
    assert (ROOT / "docs" / "REFERENCE.md").read_text() == reference.markdown(), "run `make docs`"


def test_intervals() -> None:
    assert Interval.parse("100") == Interval(100, "steps")
    assert Interval.parse("30min") == Interval(1800, "seconds")
    assert Interval.parse("2e9tok") == Interval(2_000_000_000, "tokens")
    tokens = Interval.parse("10tok")
    assert tokens.due({"tokens": 9}, {"tokens": 10})
    assert not tokens.due({"tokens": 10}, {"tokens": 19})
    assert not Interval.parse("0").due({"steps": 0}, {"steps": 100})
