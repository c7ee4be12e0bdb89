"""Parameters that have no gradient, in a step or ever: not updated, not decayed; their state is there all the same."""

from __future__ import annotations

import pytest
import torch

from tests.runs import assert_same_bits, assert_same_curve
from tests.strategies import ragged
from tests.strategies.test_buffers import zoo
from tests.zoo import models
from tests.zoo.cells import STEPS, Zoo
from trainer.config import schema
from trainer.models import ModelFactory
from trainer.optim.adamw import adamw
from trainer.optim.lion import lion
from trainer.optim.muon import muon

SHARED = {"lr": 0.01, "weight_decay": 0.5, "no_decay": ["bias", "norm"], "ema": None}
OPTIMIZERS = {
    "adamw": (adamw, schema.AdamW(name="adamw", implementation="foreach", betas=(0.9, 0.95), eps=1e-8, **SHARED)),
    "lion": (lion, schema.Lion(name="lion", betas=(0.9, 0.99), **SHARED)),
    "muon": (
        muon,
        schema.Muon(
            name="muon",
            betas=(0.9, 0.95),
            eps=1e-8,
            momentum=0.95,
            newton_schulz_steps=5,
            newton_schulz_dtype="fp32",
            adamw_modules=["head"],
            **SHARED,
        ),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unused_and_frozen(name: str) -> None:
    """The unused one does not decay, and has state before and behind the first step; the frozen one has none."""

    class Model(models.UnusedHead):
        def __init__(self, *arguments: object):
            super().__init__(*arguments)
            self.embedding.requires_grad_(False)

    make, config = OPTIMIZERS[name]
    made = zoo()
    shape = (models.Net.Config(name="net"), ragged.FACTS)
    made.setup(ModelFactory(lambda: Model(*shape), seed=5), lambda model: make(config, model))
    before = {key: tensor.clone() for key, tensor in made.model.state_dict().items()}
    made.train_step([ragged.batch(0)])
    made.update(0.01)
    state = made.state()
    assert torch.equal(state["model/extra.weight"], before["extra.weight"])
    assert not torch.equal(state["model/head.weight"], before["head.weight"])
    kept = {key.split("/", 2)[2] for key in state if key.startswith("optimizer/")}
    assert {"extra.weight", "extra.bias"} <= kept
    assert "embedding.weight" not in kept
    assert all(
        not tensor.any() for key, tensor in state.items() if key.endswith("/extra.weight") and "model" not in key
    )
    assert state.keys() == made.state().keys()


def test_a_step_without_any_gradient_does_nothing() -> None:
    made = zoo(models.Net)
    made.train_step([ragged.batch(0)])
    made.optimizer.zero_grad(set_to_none=True)
    update = made.update(0.01)
    assert (float(update.grad_norm), bool(update.bad)) == (0.0, False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo")).prepare()


FIND = "strategy.find_unused_parameters=true"
PIPELINE = ("strategy=pipeline", "strategy.stages=2")
SOMEWHERE = {
    "ddp": (2, ("strategy=ddp", FIND)),
    "fsdp": (2, ("strategy=fsdp", FIND)),
    "hsdp": (4, ("strategy=hsdp", "strategy.shard_size=2", FIND)),
    "pipeline x ddp": (4, PIPELINE),
    "pipeline x fsdp": (4, (*PIPELINE, "strategy.data_parallel=fsdp", FIND)),
}


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in SOMEWHERE if name != "fsdp"), "fsdp"]
)
def test_used_by_one_process_only(name: str, runs: Zoo) -> None:
    """What one process has a gradient of all of them update; what none has, none. One curve, and resumed to the bit."""
    whole = runs.whole("Alternating", *SOMEWHERE[name])
    single = runs.whole("Alternating", 1, ("strategy=single",))
    assert_same_curve(whole, single, STEPS)
    if name != "fsdp":
        assert_same_bits(runs.killed("Alternating", *SOMEWHERE[name]), whole)


@pytest.mark.slow
def test_zero_does_not_decay_what_is_not_used(runs: Zoo) -> None:
    """Though it steps on flat tensors. (The other stages: tests/zoo.)"""
    pytest.importorskip("deepspeed")
    flat = runs.whole("UnusedHead", 1, ("strategy=zero", "strategy.stage=2"))
    weights, expected = flat.weights(), runs.whole("UnusedHead", 1, ("strategy=single",)).weights()
    assert torch.equal(weights["model/extra.weight"], expected["model/extra.weight"])
    assert not weights["optimizer/exp_avg/extra.weight"].any()


def test_ddp_names_the_key(runs: Zoo) -> None:
    run = runs.run("unused", 2, ("model=UnusedHead", "strategy=ddp"))
    codes, output = runs.train(run)
    assert 0 not in codes
    assert "strategy.find_unused_parameters=true" in output


def test_all_frozen_is_refused(runs: Zoo) -> None:
    codes, output = runs.train(runs.run("frozen", 1, ("model=AllFrozen", "strategy=single")))
    assert codes == [2]
    assert "model=tests.zoo.models:AllFrozen: all of its parameters are frozen" in output


def test_changed_kinds_of_state_begin_anew(runs: Zoo) -> None:
    """Of those parameters only that Muon and AdamW share otherwise now; an event names them."""
    optimizer = ("model=Net", "optimizer=muon", "optimizer.lr=0.002")
    run = runs.run("muon", 1, (*optimizer, "train.steps=3"))
    codes, output = runs.train(run)
    assert codes == [0], output
    run.overrides = (*optimizer, "optimizer.adamw_modules=[head,hidden]")
    codes, output = runs.train(run)
    assert codes == [0], output
    (reset,) = [event for event in run.rows("events.jsonl") if event["kind"] == "optimizer_state_reset"]
    assert reset["parameters"] == [f"blocks.{i}.hidden.weight" for i in range(2)]
    weights = run.weights()
    assert float(weights["optimizer/step/blocks.0.hidden.weight"]) == STEPS - 3
    assert float(weights["optimizer/step/head.weight"]) == STEPS
