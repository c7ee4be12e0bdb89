"""Recipes that are more than a loss summed over targets: one curve under every strategy, killed and resumed to the bit,
and what plain torch computes in fp64. Each is one file beside this one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.recipes import contrastive, distillation, dpo, gan, masked, mixture
from tests.runs import Run, assert_same_bits, assert_same_curve
from tests.strategies import ragged
from tests.zoo import models
from tests.zoo.cells import Zoo
from trainer.config import schema
from trainer.loop import mean_metrics
from trainer.models import ModelFactory, cast_parameters
from trainer.objectives import Objective
from trainer.precision import Precision
from trainer.strategies.arithmetic import StepOptions
from trainer.strategies.single import Single
from trainer.topology import ALONE

STEPS, SAVED, KILLED = 9, 3, 8


@dataclass(frozen=True)
class Recipe:
    model: type[nn.Module]
    objective: type[Objective]
    plain: Callable[[nn.Module, dict[str, Tensor], nn.Module], Tensor] | None = None
    """The loss of a global batch, as one would write it without onecurve; of a model, and a frozen one."""
    frozen: str = ""
    """The name of a frozen model that it asks for."""


def plain_contrastive(model: nn.Module, batch: dict[str, Tensor], _: nn.Module) -> Tensor:
    one, other = model(batch).unbind(dim=1)
    return nn.functional.cross_entropy(one @ other.T / contrastive.TEMPERATURE, torch.arange(len(one)))


def plain_masked(model: nn.Module, batch: dict[str, Tensor], _: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(batch).flatten(0, 1), batch["targets"].flatten(), ignore_index=-100)


def plain_mixture(model: nn.Module, batch: dict[str, Tensor], _: nn.Module) -> Tensor:
    outputs = model(batch)
    loss = nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), batch["targets"].flatten(), ignore_index=-100)
    return loss + mixture.Z_LOSS * outputs["router"].logsumexp(dim=-1).square().mean()


def plain_distillation(model: nn.Module, batch: dict[str, Tensor], teacher: nn.Module) -> Tensor:
    ours, theirs = (net(batch)[batch["targets"] != -100] / distillation.TEMPERATURE for net in (model, teacher))
    return nn.functional.cross_entropy(ours, theirs.softmax(dim=-1)) * distillation.TEMPERATURE**2


def plain_dpo(model: nn.Module, batch: dict[str, Tensor], reference: nn.Module) -> Tensor:
    def nats(net: nn.Module, number: int) -> Tensor:
        logits, targets = net(batch)[:, number], batch["targets"][:, number]
        return nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(dim=1)

    margin = nats(model, 1) - nats(model, 0) - nats(reference, 1) + nats(reference, 0)
    return nn.functional.softplus(-dpo.BETA * margin).mean()


RECIPES = {
    "contrastive": Recipe(contrastive.Encoder, contrastive.Contrastive, plain_contrastive),
    "masked": Recipe(models.Net, masked.MaskedLM, plain_masked),
    "distillation": Recipe(models.Net, distillation.Distillation, plain_distillation, frozen="teacher"),
    "dpo": Recipe(models.Net, dpo.DPO, plain_dpo, frozen="reference"),
    "gan": Recipe(gan.Generator, gan.GAN),
    "mixture": Recipe(mixture.Mixture, mixture.WithZLoss, plain_mixture),
}
STRATEGIES = {
    "single, micro-batch 4": (1, ("strategy=single", "train.micro_batch=4")),
    "ddp 2": (2, ("strategy=ddp",)),
    "fsdp 2": (2, ("strategy=fsdp",)),
    "zero2 2": (2, ("strategy=zero", "strategy.stage=2")),
    "pipeline 2": (2, ("strategy=pipeline",)),
}
QUICK = {("masked", "single, micro-batch 4"), ("gan", "fsdp 2")}
REFUSED = {("gan", "pipeline 2"): "the model Generator cannot be cut"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    zoo = Zoo(tmp_path_factory.mktemp("recipes")).prepare()
    (zoo.folder / "objective").mkdir()
    for name, recipe in RECIPES.items():
        for group, kind in {"model": recipe.model, "objective": recipe.objective}.items():
            (zoo.folder / group / f"{name}.yaml").write_text(f"name: {kind.__module__}:{kind.__name__}\n")
    train(zoo, "frozen", 1, "model=Net", "strategy=single", "run.seed=7")
    return zoo


def train(zoo: Zoo, name: str, procs: int, *overrides: str, expect: int = 0) -> Run:
    run = zoo.run(name, procs, overrides)
    codes, output = zoo.train(run)
    assert set(codes) == {expect}, output
    return run


def overrides_of(recipe: str, zoo: Zoo) -> tuple[str, ...]:
    # AdamW multiplies the rounding of a small gradient by up to lr / eps: with 1e-8 that alone, which differs from
    # processor to processor, can be more than 1e-4 of a weight.
    overrides: tuple[str, ...] = (f"model={recipe}", f"objective={recipe}", "optimizer.eps=1e-5")
    if name := RECIPES[recipe].frozen:
        overrides += (f"models.frozen.{name}={zoo.folder}/frozen",)
    if recipe == "gan":
        overrides += (
            f"models.trained.discriminator.model.name={gan.__name__}:Discriminator",
            "models.trained.discriminator.optimizer.lr=0.005",
        )
    return overrides


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_bits_on_any_topology(recipe: str, zoo: Zoo) -> None:
    overrides = (*overrides_of(recipe, zoo), "train.deterministic=topology", "train.micro_batch=2")
    alone = train(zoo, f"{recipe}-bits-alone", 1, *overrides, "strategy=single")
    for strategy in ("ddp 2", "fsdp 2", "pipeline 2"):
        if (recipe, strategy) not in REFUSED:
            procs, where = STRATEGIES[strategy]
            name = f"{recipe}-bits-{strategy.replace(' ', '-')}"
            assert_same_bits(train(zoo, name, procs, *overrides, *where), alone)


@pytest.mark.parametrize(
    ("recipe", "strategy"),
    [
        pytest.param(recipe, strategy, marks=[] if (recipe, strategy) in QUICK else pytest.mark.slow)
        for recipe in RECIPES
        for strategy in STRATEGIES
    ],
)
def test_one_curve_killed_and_resumed(recipe: str, strategy: str, zoo: Zoo) -> None:
    overrides, (procs, where) = overrides_of(recipe, zoo), STRATEGIES[strategy]
    if reason := REFUSED.get((recipe, strategy)):
        codes, output = zoo.train(zoo.run("refused", procs, (*overrides, *where)))
        assert (codes, reason in output) == ([2] * procs, True), output
        return
    name = f"{recipe}-{strategy.replace(' ', '-').replace(',', '')}"
    alone = train(zoo, f"{name}-alone", 1, *overrides, "strategy=single")
    whole = train(zoo, name, procs, *overrides, *where)
    assert_same_curve(whole, alone, STEPS)
    for row, other in zip(whole.metrics(), alone.metrics(), strict=True):  # what an evaluation gathers, too
        assert row.get("eval", {}) == pytest.approx(other.get("eval", {}), rel=1e-5)
    at = 2 * KILLED - 3 if recipe == "gan" else KILLED  # of its steps, which have two updates, between them
    fault = f"debug.faults=[step.after_update:kill:{at}]"
    killed = train(zoo, f"{name}-killed", procs, *overrides, *where, fault, expect=-9)
    assert SAVED < killed.last_step() < KILLED
    assert_same_bits(train(zoo, f"{name}-killed", procs, *overrides, *where), whole)
    last = whole.metrics()[-1]
    assert last["eval"].keys() - {"loss"} == last.keys() & last["eval"].keys() - {"loss"}  # recorded while training


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.plain])
def test_it_is_what_plain_torch_computes(name: str) -> None:
    """Losses, gradient norms and weights in fp64; here in four micro-batches, there in one batch."""
    recipe, steps = RECIPES[name], 4
    config = recipe.model.Config(name="net")
    factory = ModelFactory(lambda: cast_parameters(recipe.model(config, ragged.FACTS), torch.float64), seed=5)
    objective = recipe.objective(recipe.objective.Config(name="goal"), ragged.FACTS)
    options = StepOptions(clip_norm=0.0, activation_checkpointing="none", compile=False, micro_batch=2)
    made = Single(schema.Single(name="single"), ALONE, Precision(ALONE.device), objective, options)
    made.setup(factory, ragged.optimizer)
    others = replace(factory, seed=6, build=lambda: factory.build().requires_grad_(False))
    asked = Single(schema.Single(name="single"), ALONE, Precision(ALONE.device), objective, options)
    asked.setup(others, None)
    model, frozen = factory(), others()
    optimizer = ragged.optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = ragged.LR
    for step in range(steps):
        whole = examples(objective, step)
        micro_batches = [{key: value[i : i + 2] for key, value in whole.items()} for i in range(0, 8, 2)]
        (update,) = objective.updates(micro_batches, {"model": made, recipe.frozen: asked})
        made.train_step(update.batches, update.objective)
        assert recipe.plain is not None
        loss = recipe.plain(model, whole, frozen)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        assert made.update(ragged.LR).grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(model, mixture.Mixture):
            model.after_update({"router.load": model.router.load.double()})
            model.router.load.zero_()
    theirs = model.state_dict()
    for name, ours in made.model.state_dict().items():
        torch.testing.assert_close(ours, theirs[name], rtol=1e-9, atol=1e-12)
    assert "router.favor" not in theirs or theirs["router.favor"].any()


def test_the_gan_is_what_plain_torch_computes() -> None:
    """Two models, two optimizers, two rates; in four micro-batches here, in one batch there."""
    objective, rates = gan.GAN(gan.GAN.Config(name="gan"), ragged.FACTS), (ragged.LR, 0.005)
    options = StepOptions(clip_norm=0.0, activation_checkpointing="none", compile=False, micro_batch=2)
    made, plain = {}, []
    for number, (name, kind) in enumerate({"model": gan.Generator, "discriminator": gan.Discriminator}.items()):
        factory = ModelFactory(partial(double, kind), seed=5 + number)
        made[name] = Single(schema.Single(name="single"), ALONE, Precision(ALONE.device), objective, options)
        made[name].setup(factory, ragged.optimizer)
        plain.append(factory())
    (generator, discriminator), optimizers = plain, [ragged.optimizer(model) for model in plain]
    for optimizer, rate in zip(optimizers, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
    for step in range(4):
        whole = {
            name: value.double() if value.is_floating_point() else value
            for name, value in examples(objective, step).items()
        }
        micro_batches = [{key: value[i : i + 2] for key, value in whole.items()} for i in range(0, 8, 2)]
        for update in objective.updates(micro_batches, made):
            made[update.model].train_step(update.batches, update.objective)
            made[update.model].update(rates[update.model != "model"])
        fake = generator(whole)
        real, other = (discriminator({"points": points[:, None]}) for points in (whole["real"], fake.detach()))
        (nn.functional.softplus(-real) + nn.functional.softplus(other)).mean().backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        nn.functional.softplus(-discriminator({"points": fake[:, None]})).mean().backward()
        optimizers[0].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    for ours, theirs in zip(made.values(), plain, strict=True):
        for one, two in zip(ours.model.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def double(kind: type[gan.Generator]) -> nn.Module:
    return cast_parameters(kind(kind.Config(name="net"), ragged.FACTS), torch.float64)


def examples(objective: Objective, step: int) -> dict[str, Tensor]:
    whole = ragged.batch(step)
    rows = [
        objective.example({"inputs": whole["inputs"][i], "targets": whole["targets"][i]}, 1000 * step + i + 1)
        for i in range(8)
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {"draws": whole["draws"]}


@pytest.mark.slow
def test_examples_made_in_processes_are_the_same(zoo: Zoo) -> None:
    overrides = ("model=masked", "objective=masked", "strategy=single")
    runs = [
        train(zoo, f"masked-{name}", 1, *overrides, *how)
        for name, how in {"threads": (), "processes": ("data.processes=true", "data.workers=2")}.items()
    ]
    assert_same_bits(*runs)


def test_numbers_are_of_the_model_whose_name_they_begin_with() -> None:
    """Unless there is no such model; and a model that a step does not update has none in its row."""
    objective = masked.MaskedLM(masked.MaskedLM.Config(name="goal"), ragged.FACTS)
    sums = {
        "loss": 8.0,
        "top/5": 2.0,
        "num_targets": 4.0,
        "critic/loss": 3.0,
        "critic/top/5": 6.0,
        "critic/num_targets": 3.0,
    }
    objectives = {"model": objective, "critic": objective}
    assert mean_metrics(objectives, sums) == {"loss": 2.0, "top/5": 0.5, "critic/loss": 1.0, "critic/top/5": 2.0}
    assert mean_metrics(objectives, {**sums, "critic/num_targets": 0.0}) == {"loss": 2.0, "top/5": 0.5}


def test_each_is_short() -> None:
    for module in (contrastive, distillation, dpo, gan, masked, mixture):
        assert len(Path(module.__file__ or "").read_text().splitlines()) <= 90, module.__name__
