"""Other models than GPT under every strategy: saved, killed, resumed to the bit; one curve, where that is promised."""

from __future__ import annotations

import pytest

from tests.runs import assert_same_bits, assert_same_curve
from tests.zoo.cells import BESIDES, MODELS, OF_A_MICRO_BATCH, REFUSED, STEPS, STRATEGIES, Zoo

QUICK = {("BatchNorm", "ddp 2"), ("FrozenTied", "pipeline 2")}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo")).prepare()


@pytest.mark.parametrize(
    ("model", "strategy"),
    [
        pytest.param(model, strategy, marks=[] if (model, strategy) in QUICK else pytest.mark.slow)
        for model in MODELS
        for strategy in STRATEGIES
    ],
)
def test_zoo(model: str, strategy: str, zoo: Zoo) -> None:
    procs, overrides = STRATEGIES[strategy]
    overrides += BESIDES.get((model, strategy), ())
    if reason := REFUSED.get((model, strategy)):
        codes, output = zoo.train(zoo.run("refused", procs, (f"model={model}", *overrides)))
        assert 2 in codes
        assert reason in output
        return
    whole = zoo.whole(model, procs, overrides)
    assert [event["step"] for event in whole.rows("events.jsonl") if event["kind"] == "checkpoint"] == [0, 3, 6, 9]
    assert_same_bits(zoo.killed(model, procs, overrides), whole)
    if model not in OF_A_MICRO_BATCH:
        assert_same_curve(whole, zoo.whole(model, *STRATEGIES["single"]), STEPS)
