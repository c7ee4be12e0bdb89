"""Classes of a user's: the code in the documents runs as it stands, and what lacks something is refused beforehand."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import onecurve
from launch.plan import lines
from tests import exported
from tests.docs.pages import blocks, write_files
from trainer.config import Config, schema
from trainer.config.compose import load
from trainer.models.factory import without_transforms
from trainer.plugin_checks import CheckedObjective, check_plugins
from trainer.sampling import with_weights
from trainer.strategies.build import strategy_for
from trainer.strategies.ddp import DDP
from trainer.topology import ALONE

QUICK = [
    "experiment=smoke", "train.steps=3", "eval.every=3", "sample.count=0", "track.report=false", "track.console=false",
    "track.wandb.mode=disabled", "strategy=single", "checkpoint.asynchronous=false", "run.plugins=[my_package]",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:  # another test's
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def test_the_package_of_the_page_trains(folder: Path) -> None:
    write_files("docs/EXTEND.md", folder)
    chosen = ["model=net", "objective=goal", "optimizer=sgd", "schedule=stairs", "schedule.each=2"]
    config = onecurve.load([*QUICK, *chosen], config_dir="my_conf")
    result = onecurve.run(config)
    assert (result.status, result.step) == ("finished", 3)
    assert {"loss", "accuracy"} == result.metrics["eval"].keys()
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == [0.1, 0.1, 0.05]
    longer = onecurve.load([*QUICK, *chosen, "train.steps=4", "eval.every=4"], config_dir="my_conf")
    assert onecurve.run(longer).step == 4  # from its checkpoint, momentum included


def test_the_strategy_of_the_page_trains_and_is_planned(folder: Path) -> None:
    write_files("docs/EXTEND.md", folder)
    chosen = [*[text for text in QUICK if text != "strategy=single"], "strategy=pace"]
    config = onecurve.load([*chosen, "optimizer.lr=0.01"], config_dir="my_conf")
    halved = onecurve.load([*QUICK, "optimizer.lr=0.005", "run.name=halved"])
    assert onecurve.run(config).metrics["loss"] == onecurve.run(halved).metrics["loss"]
    told = dict(lines(config, 1))
    assert " of a process at its fullest: fits " in told["memory"]
    for refused, message in (
        ("optimizer.implementation=apex", "works with strategy=single, ddp, not with my_package.pace:Pace"),
        ("strategy.name=my_package.net:Net", "Net: needs .* `Config`, a subclass of onecurve.Strategy"),
    ):
        with pytest.raises(onecurve.ConfigError, match=message):
            onecurve.load([*chosen, refused], config_dir="my_conf")
    with pytest.raises(onecurve.ConfigError) as caught:
        load(chosen, 2, "my_conf")
    assert caught.value.problems == [
        "strategy=my_package.pace:Pace: runs one process, but 2 were started; nearest: strategy=ddp"
    ]


class OfMany(DDP):
    """A user's, of a strategy that needs other processes."""

    class Config(schema.DDP):
        pass


def test_a_users_strategy_is_never_quietly_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = onecurve.load(
        [*QUICK[:-1], "strategy=ddp", f"strategy.name={__name__}:OfMany", f"run.plugins=[{__name__.partition('.')[0]}]"]
    )
    monkeypatch.setattr("trainer.strategies.build.plugin", lambda config, group: OfMany)
    with pytest.raises(onecurve.ConfigError, match="OfMany: runs on 2 processes and more; nearest: strategy=single"):
        strategy_for(config, ALONE, SimpleNamespace(stream=None))  # type: ignore[arg-type]


class Taken(torch.nn.Module):
    class Config(onecurve.Plugin):
        problems: int


def test_the_config_of_a_users_model_can_be_pickled_and_takes_no_name_of_a_sections_methods(folder: Path) -> None:
    write_files("docs/EXTEND.md", folder)
    config = onecurve.load([*QUICK, "model=net", "model.transforms.freeze.modules=[head]"], config_dir="my_conf")
    again = pickle.loads(pickle.dumps(config.model))
    assert again == config.model
    assert again.transforms["freeze"].modules == ["head"]
    chosen = [
        *QUICK[:-1],
        f"run.plugins=[{__name__.partition('.')[0]}]",
        f"model.name={__name__}:Taken",
        "+model.problems=1",
    ]
    with pytest.raises(onecurve.ConfigError, match="its key problems is a method of every section; rename it"):
        onecurve.load(chosen)


def test_a_config_checks_itself_against_the_others_for_each_model(folder: Path) -> None:
    write_files("docs/EXTEND.md", folder)
    chosen = [*QUICK[:-1], "run.plugins=[my_package]", "model=checked", "strategy=pipeline", "train.global_batch=8"]
    load(chosen, 2, "my_conf")
    cut = "cannot be cut into 4 processes x 1 parts = 4; nearest: {0}=4, or strategy.stages={1}"
    with pytest.raises(onecurve.ConfigError) as caught:
        load([*chosen, "models.trained={critic: {model: {depth: 3}}, other: {model: {depth: 4}}}"], 4, "my_conf")
    critic = "models.trained.critic.model.depth"
    assert caught.value.problems == [
        f"model.depth=2: {cut.format('model.depth', 2)}",
        f"{critic}=3: {cut.format(critic, 3)}",
    ]
    with pytest.raises(onecurve.ConfigError, match="needs text; nearest: data=webdataset"):
        load([*chosen, "data=samples", "data.shards=a.tar", "data.fields={label: cls}", "objective=goal"], 2, "my_conf")


def test_the_transform_of_the_page_trains_and_merges(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files("docs/EXTEND.md", folder)
    gain = "model.transforms.gain={name: 'my_package.gain:Gain', layer: head}"
    config = onecurve.load([*QUICK, "model=net", gain], config_dir="my_conf")
    result = onecurve.run(config)
    _, model, tokenizer = onecurve.load_run(result.folder, ["my_package"])
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["head.gain"]
    assert not model.head.gain.eq(1).all()
    exported.onecurve(monkeypatch, ["export", result.folder, "--plugins", "my_package"])
    plain = with_weights(without_transforms(config), tokenizer, load_file(result.folder / "model.safetensors"))
    batch = {"inputs": torch.arange(16)[None]}
    torch.testing.assert_close(plain(batch), model(batch))


def test_the_model_of_the_readme_and_the_program_of_the_page_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files("README.md", folder)
    (folder / "my_conf" / "model").mkdir(parents=True)
    (folder / "my_conf" / "model" / "net.yaml").write_text("name: my_package.net:Net\nwidth: 64\n")
    assert onecurve.run(onecurve.load([*QUICK, "model=net"], config_dir="my_conf")).step == 3
    monkeypatch.setattr(onecurve, "load", lambda overrides: load([*QUICK, *overrides[1:]]))
    (program,) = [block for block in blocks("docs/EXTEND.md") if block.language == "python" and not block.file]
    exec(compile(program.text, str(program), "exec"), scope := {})
    assert scope["result"].status == "finished"


def test_the_recipes_of_the_page_train(folder: Path) -> None:
    """One makes its own examples, the other asks a frozen teacher: the run of the first one's model."""
    write_files("docs/RECIPES.md", folder)
    first = onecurve.load([*QUICK, "objective=masked", "run.name=first"], config_dir="my_conf")
    result = onecurve.run(first)
    assert result.metrics["eval"].keys() == {"loss", "accuracy"}
    assert "accuracy" in result.metrics
    teacher = f"models.frozen.teacher={result.folder}"
    second = [*QUICK, "objective=distilled", "run.name=second"]
    assert onecurve.run(onecurve.load([*second, teacher], config_dir="my_conf")).step == 3
    for wrong, told in (
        (
            "models.frozen={}",
            "models.frozen.teacher: objective=.* needs it: the directory of a run",
        ),
        ("models.frozen={teacher: runs/none}", "models.frozen.teacher=runs/none: runs/none: is not a run's folder"),
        (
            f"models.frozen={{teacher: {result.folder}, other: a}}",
            "models.frozen.other: .* uses no such model",
        ),
    ):
        with pytest.raises(onecurve.ConfigError, match=told):
            onecurve.run(onecurve.load([*second, wrong, "run.fresh=true"], config_dir="my_conf"))
    longer = onecurve.load([*QUICK, "objective=masked", "run.name=first", "train.steps=4"], config_dir="my_conf")
    onecurve.run(longer)  # the teacher learns on
    with pytest.raises(onecurve.ConfigError, match=r"models\.frozen\.teacher"):
        onecurve.run(onecurve.load([*second, teacher, "train.steps=4"], config_dir="my_conf"))


WRONG = {
    "model": ("model", "def initialise(", "def initialize(", "has no method `initialise(name, parameter, generator)`"),
    "forward": ("model", "def forward(", "def call(", "has no method `forward(batch)` of its own"),
    "made": ("model", "config: Config, facts: onecurve.Facts", "config: Config", "should be made of (config, facts)"),
    "loss": ("objective", "def loss(", "def losses(", "has no method `loss(outputs, batch, normalizers)` of its own"),
    "normalizers": (
        "objective",
        ", normalizers: dict[str, Tensor]",
        "",
        "method `loss` should take (outputs, batch, normalizers)",
    ),
    "base": ("objective", "(onecurve.Objective)", "", "should be a subclass of onecurve.Objective"),
    "optimizer": ("optimizer", "(onecurve.Optimizer)", "(onecurve.Plugin)", "its Config has no `lr`"),
    "schedule": ("schedule", "lr: float, steps: int", "steps: int", "should be made of (config, lr, steps)"),
}
FILES = {"model": "net", "objective": "goal", "optimizer": "sgd", "schedule": "stairs"}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_class_lacks_is_told_before_the_start(what: str, folder: Path) -> None:
    group, text, other, told = WRONG[what]
    write_files("docs/EXTEND.md", folder)
    file = folder / "my_package" / f"{FILES[group]}.py"
    assert text in file.read_text()
    file.write_text(file.read_text().replace(text, other))
    if what == "optimizer":
        (folder / "my_conf" / "optimizer" / "sgd.yaml").write_text("name: my_package.sgd:SGD\nmomentum: 0.9\n")
    config = onecurve.load([*QUICK, f"{group}={FILES[group]}"], config_dir="my_conf")
    with pytest.raises(onecurve.ConfigError) as caught:
        check_plugins(config)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{group}.name=my_package.{FILES[group]}:")
    assert told in problem
    with pytest.raises(onecurve.ConfigError, match=re.escape(told)):
        onecurve.run(config)
    assert not (folder / "runs").exists()


def test_classes_of_a_second_model_are_looked_at_too(folder: Path) -> None:
    write_files("docs/EXTEND.md", folder)
    (folder / "my_package" / "net.py").write_text(
        (folder / "my_package" / "net.py").read_text().replace("def initialise(", "def initialize(")
    )
    critic = "models.trained.critic.model={name: my_package.net:Net, depth: 2, width: 32}"
    with pytest.raises(onecurve.ConfigError) as caught:
        check_plugins(onecurve.load([*QUICK, critic]))
    start = (
        "models.trained.critic.model.name=my_package.net:Net: has no method `initialise(name, parameter, generator)`"
    )
    assert [problem.partition(" (docs")[0] for problem in caught.value.problems] == [start]


@pytest.mark.parametrize(
    ("text", "other", "told"),
    [
        ('"loss": loss, ', "", "`summary` should return numbers by name, `loss` among them"),
        ('"accuracy": right', '"lr": right', "`evaluate` names lr, which every row has; rename it"),
        ('"accuracy": right', '"accuracy": outputs', "`evaluate` should return a dict of scalar tensors, .*accuracy"),
        ('{"loss": loss, "accuracy": right}', "loss", "`evaluate` should return .* not a tensor of shape"),
        ('normalizers["num_targets"]', 'normalizers["num_targets"]["x"]', "IndexError"),
        (
            '"num_targets": int(',
            '"targets": int(',
            "`counts` should return a dict of numbers, `num_targets`",
        ),
    ],
)
def test_an_evaluation_that_would_fail_fails_before_the_first_step(
    folder: Path, text: str, other: str, told: str
) -> None:
    write_files("docs/EXTEND.md", folder)
    file = folder / "my_package" / "goal.py"
    assert text in file.read_text()
    file.write_text(file.read_text().replace(text, other))
    with pytest.raises(onecurve.OnecurveError, match=told) as caught:
        onecurve.run(onecurve.load([*QUICK, "objective=goal", "eval.every=0"], config_dir="my_conf"))
    assert not caught.value.retry
    assert not (folder / "runs/smoke/metrics.jsonl").exists()


def test_the_first_results_of_an_objective_are_looked_at() -> None:
    class Goal:
        given: object = None

        def loss(self, outputs, batch, normalizers):
            return self.given

    goal, zero = Goal(), torch.zeros(())
    for wrong, told in (
        (zero, "`loss` should return a pair: .* not a tensor of shape"),
        ((torch.zeros(2), {}), "`loss` should return a pair"),
        ((zero, {"loss": zero, "accuracy": 0.5}), "which 'accuracy' is not"),
        ((zero, {"loss": torch.zeros(2)}), "which 'loss' is not"),
        ((zero, zero), "a dict of scalar tensors, sums over the batch, not a tensor"),
    ):
        goal.given = wrong
        with pytest.raises(onecurve.ConfigError, match=told):
            CheckedObjective(goal, "mine:Goal").loss(None, {}, {})  # type: ignore[arg-type]
    goal.given, watched = (zero, {"loss": zero}), CheckedObjective(goal, "mine:Goal")  # type: ignore[arg-type]
    assert watched.loss(None, {}, {}) is goal.given
    assert watched.loss == goal.loss  # nothing is between them from then on


def test_classes_that_would_not_be_used_and_folders_that_are_not_there_are_refused() -> None:
    for group in ("data", "precision", "launch"):
        with pytest.raises(onecurve.ConfigError, match=rf"{group}.name=my_package:Mine: should be one of"):
            load([f"{group}.name=my_package:Mine", "run.plugins=[my_package]"])
    with pytest.raises(onecurve.ConfigError, match="--config-dir nowhere: no such folder"):
        load(["experiment=smoke"], config_dir="nowhere")


def test_a_config_without_a_moving_average_needs_none() -> None:
    from types import SimpleNamespace

    from trainer.optim.build import build_optimizer

    config = SimpleNamespace(
        optimizer=SimpleNamespace(name="adamw"),
        train=SimpleNamespace(deterministic="run"),
        run=SimpleNamespace(plugins=[]),
    )
    made = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.optim.build.plugin", lambda config, group: lambda *_: made)
        assert build_optimizer(config, torch.nn.Linear(1, 1)) is made  # type: ignore[arg-type]


def test_the_configs_type_is_public() -> None:
    assert onecurve.Config is Config
