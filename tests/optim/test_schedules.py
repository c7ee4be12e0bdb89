"""Schedules at the points that their definitions name."""

from __future__ import annotations

import math

import pytest

from trainer.config import schema
from trainer.optim.schedule import Schedule, constant, linear, warmup_cosine, wsd

WARMUP, STEPS, PEAK = 10, 110, 2.0
SCHEDULES: dict[str, Schedule] = {
    "constant": constant(schema.Constant(name="constant", warmup_steps=WARMUP), PEAK, STEPS),
    "linear": linear(schema.Linear(name="linear", warmup_steps=WARMUP, min_ratio=0.1), PEAK, STEPS),
    "cosine": warmup_cosine(schema.WarmupCosine(name="warmup_cosine", warmup_steps=WARMUP, min_ratio=0.1), PEAK, STEPS),
    "wsd": wsd(schema.WSD(name="wsd", warmup_steps=WARMUP, min_ratio=0.1, decay_share=0.4, shape="sqrt"), PEAK, STEPS),
    "wsd line": wsd(
        schema.WSD(name="wsd", warmup_steps=WARMUP, min_ratio=0, decay_share=0.4, shape="linear"), PEAK, STEPS
    ),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [2, 2, 2, 2]),
        ("linear", [2, 1.1, 1.1 - 0.018 * 17, 0.2]),
        ("cosine", [2, 1.1, 2 * (0.1 + 0.45 * (1 + math.cos(0.67 * math.pi))), 0.2]),
        ("wsd", [2, 2, 2 - 1.8 * math.sqrt(11 / 44), 0.2]),
        ("wsd line", [2, 2, 1.5, 0]),
    ],
)
def test_rates(name: str, expected: list[float]) -> None:
    rate = SCHEDULES[name]
    assert [rate(step) for step in (1, 5)] == pytest.approx([0.2, 1.0])  # warm-up
    assert [rate(step) for step in (10, 60, 77, 110)] == pytest.approx(expected)
    assert rate(500) == pytest.approx(expected[-1])
    rates = [rate(step) for step in range(WARMUP, STEPS + 1)]
    assert rates == sorted(rates, reverse=True)


def test_a_stable_phase_does_not_depend_on_the_length_of_the_run() -> None:
    config = schema.WSD(name="wsd", warmup_steps=WARMUP, min_ratio=0.1, decay_share=0.4, shape="sqrt")
    short, long = wsd(config, PEAK, STEPS), wsd(config, PEAK, 10 * STEPS)
    assert [short(step) for step in range(1, 67)] == [long(step) for step in range(1, 67)]


def test_no_warmup() -> None:
    assert constant(schema.Constant(name="constant", warmup_steps=0), PEAK, STEPS)(1) == PEAK
    assert linear(schema.Linear(name="linear", warmup_steps=0, min_ratio=0), PEAK, 1)(1) == 0
