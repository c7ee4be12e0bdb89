"""An exponential moving average of the weights, often better than the last ones (Polyak & Juditsky 1992).

It is optimizer state, by parameter: so it is sharded, saved and loaded like all of that state, under every strategy.
"""

from __future__ import annotations

from typing import Any

import torch


def track_average(optimizer: torch.optim.Optimizer, decay: float) -> torch.optim.Optimizer:
    """Makes the optimizer track an average of each parameter, and returns it. After each step: `ema` (fp32, shaped like
    the parameter) = decay * `ema` + (1 - decay) * weight. It begins at zero; `ema_weight` is the sum of these factors
    so far, so `ema / ema_weight` is the average (as in Adam, Kingma & Ba 2015, section 3)."""

    @torch.no_grad()
    def average(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            states = [optimizer.state[parameter] for parameter in parameters]
            for state, parameter in zip(states, parameters, strict=True):
                if "ema" not in state:
                    state["ema"] = torch.zeros_like(
                        parameter, dtype=torch.promote_types(parameter.dtype, torch.float32)
                    )
                    state["ema_weight"] = torch.zeros((), device=parameter.device)
                state["ema_weight"].lerp_(torch.ones_like(state["ema_weight"]), 1 - decay)
            averages = [state["ema"] for state in states]
            torch._foreach_lerp_(
                averages, [p.to(a.dtype) for p, a in zip(parameters, averages, strict=True)], 1 - decay
            )

    optimizer.register_step_post_hook(average)
    return optimizer
