"""Keys of resilience: guards, the watchdog, injected faults."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.config.section import FaultText, Float, Int, Positive, Section


class Guard(Section):
    bad_step: Literal["rollback", "skip", "stop"] = Field(
        description="What follows a step whose loss or gradient is not finite, or a spike; its update is never done. "
        "rollback: go back to the checkpoint before it (with `checkpoint.every`, the initial state is one) and repeat "
        "the steps; one that is bad once more is its batch's fault and left out. skip: leave it out at once. stop: end "
        "the run."
    )
    limit: Int = Field(
        ge=0, description="How many of the last `guard.window` steps may be bad before the run ends with exit code 4."
    )
    norm_spike: Positive | None = Field(
        description="A gradient norm that lies further above the median of the last `guard.window` steps than so many "
        "standard deviations (estimated from the median deviation) is a spike, such as 10. null: none is."
    )
    loss_spike: Positive | None = Field(
        description="The same for the loss. Costs a sum over all processes a step before the update. null: none is."
    )
    window: Int = Field(ge=8, description="Steps that spikes are judged by; a quarter of them must have been done.")
    replicas_every: Int = Field(
        ge=0,
        description="Steps between two comparisons of weights that several processes hold, by fingerprint: where one "
        "has others, the run goes back to the last checkpoint; by a new start, if that leaves out weights that "
        "transforms have frozen. 0: none.",
    )


class Watchdog(Section):
    grace_s: Float = Field(
        ge=0,
        description="Seconds that a step, wait for data, save or evaluation may take beyond 5 s or three times what 99 "
        "of 100 took so far, before it is a hang: all processes tell where they are, and the run ends to be restarted.",
    )
    first_s: Positive = Field(
        description="The same for what was never timed before: the start, and the first step (which compiles), wait "
        "for data, save and evaluation of each attempt, and after a rollback. An evaluation counts from its last batch."
    )
    enabled: bool = Field(description="Look for hangs.")


class Debug(Section):
    faults: list[FaultText] = Field(
        description="What goes wrong on purpose, to rehearse: `point:action:n:rank`, such as "
        "`[step.after_backward:kill:3:1]`; docs/SURVIVAL.md lists points and actions."
    )
