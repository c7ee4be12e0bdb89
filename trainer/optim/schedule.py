"""Learning rates as pure functions of the step. All begin with a linear warm-up from 0 to the peak."""

from __future__ import annotations

import math
from collections.abc import Callable

from trainer.config import schema

Schedule = Callable[[int], float]


def constant(config: schema.Constant, peak: float, steps: int) -> Schedule:
    """Returns the rate of step 1, 2, ...: after the warm-up always the peak, so that a run can be extended at any
    time."""
    return _with_warmup(config.warmup_steps, peak, lambda step: 1.0)


def linear(config: schema.Linear, peak: float, steps: int) -> Schedule:
    """Returns the rate of step 1..steps: after the warm-up a straight line down to `min_ratio * peak` at the last
    step."""
    return _with_warmup(
        config.warmup_steps,
        peak,
        lambda step: _interpolate(1.0, config.min_ratio, _progress(step, config.warmup_steps, steps)),
    )


def warmup_cosine(config: schema.WarmupCosine, peak: float, steps: int) -> Schedule:
    """Returns the rate of step 1..steps: after the warm-up half a cosine down to `min_ratio * peak` at the last step
    (Loshchilov & Hutter 2017)."""

    def factor(step: int) -> float:
        progress = _progress(step, config.warmup_steps, steps)
        return config.min_ratio + (1 - config.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return _with_warmup(config.warmup_steps, peak, factor)


def wsd(config: schema.WSD, peak: float, steps: int) -> Schedule:
    """Returns the rate of step 1..steps: warm-up, the peak, and in the last `decay_share` of the steps a decay to
    `min_ratio * peak` (Hu et al. 2024, "MiniCPM", section 4). `config.shape` of the decay: linear, or 1 - sqrt (Hägele
    et al. 2024, "Scaling laws and compute-optimal training beyond fixed training durations", section 3)."""
    begin = max(config.warmup_steps, steps - round(config.decay_share * steps))
    bend = math.sqrt if config.shape == "sqrt" else float
    return _with_warmup(
        config.warmup_steps, peak, lambda step: _interpolate(1.0, config.min_ratio, bend(_progress(step, begin, steps)))
    )


def _with_warmup(warmup_steps: int, peak: float, factor: Callable[[int], float]) -> Schedule:
    """Returns the schedule that is `factor` times the peak after the warm-up."""
    return lambda step: peak * step / warmup_steps if step < warmup_steps else peak * factor(step)


def _progress(step: int, begin: int, end: int) -> float:
    """Returns 0 up to step `begin`, 1 from step `end` on, and a straight line between."""
    return min(1.0, max(0, step - begin) / max(1, end - begin))


def _interpolate(first: float, last: float, progress: float) -> float:
    return first + (last - first) * progress
