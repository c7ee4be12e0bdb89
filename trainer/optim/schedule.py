"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from trainer.config import schema

Schedule = Callable[[int], float]


def warmup_cosine(config: schema.WarmupCosine, peak: float, steps: int) -> Schedule:
    """The rate of step 1..steps: linear from 0 to `peak` at `warmup_steps`, then half a cosine down to
    `min_ratio * peak` at the last step (Loshchilov & Hutter 2017)."""

    def rate(step: int) -> float:
        if step < config.warmup_steps:
            return peak * step / config.warmup_steps
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return peak * (config.min_ratio + (1 - config.min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    return rate
