"""Keys of optimizers and schedules, and refused combinations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from trainer.config.section import Count, Float, Int, Plugin, Share
from trainer.config.strategy import strategy_of

BUILT_IN_STRATEGIES = {"apex": "single, ddp", "8bit": "single, ddp, fsdp, hsdp"}  # these list them in `implementations`


class Optimizer(Plugin):
    lr: Float = Field(gt=0, description="Peak learning rate.")
    weight_decay: Float = Field(ge=0, description="Decoupled weight decay (times the learning rate).")
    no_decay: list[Literal["bias", "norm", "vector", "embedding"]] = Field(
        description="Kinds of parameters left without decay: bias, norm, vector (all else of one dimension or none: "
        "scales of layers, gates, temperatures, class tokens), embedding (tables of tokens and positions)."
    )
    ema: Share | None = Field(
        description="Decay (such as 0.999) of a moving average of the weights, kept with the optimizer's state in fp32 "
        "and exported by `onecurve export --ema`. null: none. It may be switched on or off between attempts."
    )

    def elementwise(self) -> Optimizer | None:
        """Returns the section with which its step on an element does not depend on how parameters are sharded, to the
        last bit: what `train.deterministic=topology` needs. None if there is none, or nobody knows."""
        return None


class AdamW(Optimizer):
    implementation: Literal["auto", "fused", "foreach", "apex", "8bit"] = Field(
        description="Who computes the step: fused (torch), foreach (torch, in more and simpler kernels), auto (fused; "
        "foreach under `train.deterministic=topology`), apex (FusedAdam of NVIDIA Apex, built from source; strategies "
        "single and ddp), 8bit (torchao: state of a quarter; on GPUs the first step compiles it, which may take a "
        "minute). A run continues with any other."
    )
    betas: tuple[Share, Share] = Field(description="Decay rates of the two moments.")
    eps: Float = Field(gt=0, description="Added to the denominator.")

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        strategy, supported = strategy_of(sections), BUILT_IN_STRATEGIES.get(self.implementation)
        if supported and self.implementation not in strategy.implementations:
            yield (
                f"optimizer.implementation={self.implementation}: works with strategy={supported}, not with "
                f"{strategy.name}; nearest: optimizer.implementation=fused"
            )

    def elementwise(self) -> Optimizer | None:
        if self.implementation in ("auto", "foreach"):  # fused kernels round the last elements of a shard differently
            return self.model_copy(update={"implementation": "foreach"})
        return None


class Lion(Optimizer):
    betas: tuple[Share, Share] = Field(
        description="Decay rates: of the momentum whose sign is the step, and of the momentum that is kept."
    )

    def elementwise(self) -> Optimizer | None:
        return self


class Muon(Optimizer):
    momentum: Share = Field(description="Decay rate of the momentum of hidden matrices.")
    newton_schulz_steps: Count = Field(description="Steps that make the momentum of a matrix orthogonal.")
    newton_schulz_dtype: Literal["fp32", "bf16"] = Field(
        description="What they compute in. bf16 is faster on GPUs, but its rounding parts the curves of different "
        "numbers of processes."
    )
    adamw_modules: list[str] = Field(
        description="Names of modules whose matrices AdamW updates, as it does embeddings, norms and biases: an output "
        "layer that is not tied to the embedding."
    )
    betas: tuple[Share, Share] = Field(description="AdamW's decay rates of the two moments.")
    eps: Float = Field(gt=0, description="Added to AdamW's denominator.")

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        if flat := strategy_of(sections).flat_update():
            yield f"optimizer=muon: needs whole matrices, and {flat}; nearest: strategy=fsdp"


class Schedule(Plugin):
    warmup_steps: Int = Field(ge=0, description="Steps of linear warm-up from 0 to the peak.")


class Constant(Schedule):
    pass


class Decaying(Schedule):
    min_ratio: Float = Field(ge=0, le=1, description="Learning rate at the last step, as a share of the peak.")


class Linear(Decaying):
    pass


class WarmupCosine(Decaying):
    pass


class WSD(Decaying):
    decay_share: Float = Field(gt=0, le=1, description="Share of `train.steps`, at the end, in which the rate decays.")
    shape: Literal["sqrt", "linear"] = Field(description="How it decays: 1 - sqrt (steep at first), or a line.")
