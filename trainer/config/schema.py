"""The typed schema: every key with its type, bounds and help. Values live in conf/*.yaml, and only there.

A section of the config is one class, which also refuses combinations with other keys (`problems`). Where a Hydra group
offers a choice (model, strategy, ...), each option has a class of its own, which `trainer.registry` finds by the
section's `name`. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.config import leafwise
from trainer.config.data import Data, Samples, Text
from trainer.config.huggingface import GPT2, HuggingFace, Llama
from trainer.config.launch import Local, Slurm
from trainer.config.models import GPT, Pretrained
from trainer.config.objectives import CausalLM
from trainer.config.optim import WSD, AdamW, Constant, Linear, Lion, Muon, Optimizer, Schedule, WarmupCosine
from trainer.config.section import Count, Float, Int, IntervalText, Plugin, Section
from trainer.config.strategy import (
    DDP,
    FSDP,
    HSDP,
    ONE_STAGE,
    Layout,
    Pipeline,
    Precision,
    Sharded,
    Single,
    Strategy,
    Zero,
    strategy_of,
)  # fmt: skip
from trainer.config.survival import Debug, Guard, Watchdog
from trainer.config.track import Track
from trainer.config.words import multiples
from trainer.secrets import masked

__all__ = [
    "DDP", "FSDP", "GPT", "GPT2", "HSDP", "SECTIONS", "WSD", "AdamW", "CausalLM", "Checkpoint", "Config", "Constant",
    "Data", "Debug", "Eval", "Guard", "HuggingFace", "Layout", "Linear", "Lion", "Llama", "Local", "Models", "Muon",
    "Optimizer", "Pipeline", "Plugin", "Precision", "Pretrained", "Run", "Sample", "Samples", "Schedule", "Section",
    "Sharded", "Single", "Slurm", "Strategy", "Text", "Track", "Train", "Trained", "WarmupCosine", "Watchdog", "Zero",
]  # fmt: skip


class Run(Section):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the run: letters, digits, dot, dash, underscore.",
    )
    dir: str = Field(min_length=1, description="The run's folder. The same folder again continues the run.")
    seed: Int = Field(ge=0, description="Seed of everything drawn: initial weights, data order, dropout, samples.")
    fresh: bool = Field(description="Start over; what is in the folder is kept beside it as `<dir>.old-<n>`.")
    plugins: list[str] = Field(
        description="Packages whose classes a section's `name` may point at, such as `[my_package]`."
    )


class Train(Section):
    steps: Count = Field(description="Optimizer steps of the whole run.")
    global_batch: Count = Field(description="Sequences of one optimizer step, over all processes together.")
    batch_ramp: dict[Count, Count] = Field(
        description="Smaller global batches at first: `{100: 16, 200: 32}` takes 16 sequences up to step 100, then 32 "
        "up to step 200, then `train.global_batch`."
    )
    micro_batch: Count | None = Field(
        description="Sequences of one forward pass of one process; accumulation follows from it. "
        "null: the process's whole share at once."
    )
    clip_norm: Float = Field(
        ge=0, description="Largest global gradient norm; larger gradients are scaled down. 0: off."
    )
    log_every: Count = Field(description="Steps between two readings of the device's numbers (each step is recorded).")
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        description="Recompute activations in the backward pass: none, full (whole layers), "
        "selective (everything but matrix products and attention)."
    )
    compile: bool = Field(description="Compile the model's layers with torch.compile.")
    deterministic: Literal["run", "topology"] = Field(
        default="run",  # sections of earlier runs do not have it
        description="What does not change a single bit: run (interruptions do not) or topology (nor does the number "
        "of processes, or which of single, ddp, fsdp, hsdp and pipeline is used, also in the middle of the run). "
        "topology needs `train.micro_batch`, which then is part of what the run is, and computes with one thread a "
        "process on CPUs.",
    )

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        if self.deterministic == "topology":
            yield from leafwise.problems(self, sections, world_size)
        layout = strategy_of(sections).layout(world_size)
        if world_size % layout.processes:  # the strategy reports that
            layout = ONE_STAGE
        replicas, sharers = world_size // layout.processes, f"{world_size} processes"
        if layout.processes > 1:
            sharers = f"{replicas} copies of the model ({world_size} processes / {layout.processes})"
        sizes = {"train.global_batch": self.global_batch}
        sizes |= {f"train.batch_ramp.{step}": size for step, size in sorted(self.batch_ramp.items())}
        unit = (self.micro_batch or 1) * replicas
        micro = f" x train.micro_batch={self.micro_batch} = {unit}" if self.micro_batch else ""
        for key, size in sizes.items():
            if size % unit:
                reason = f"is not a multiple of {sharers}{micro}" if micro else f"does not divide by {sharers}"
                yield f"{key}={size}: {reason}; nearest: {multiples(size, unit)}"


class Eval(Section):
    every: Int = Field(ge=0, description="Steps between two evaluations; the end is always evaluated. 0: only there.")
    steps: Count | None = Field(
        description="Batches (of `train.global_batch` sequences) of an evaluation. null: the whole validation split."
    )


class Checkpoint(Section):
    every: IntervalText = Field(
        description="How often to save: `100` (steps), `30min`, `2e9tok`. The end is always saved. 0: only there."
    )
    keep: Int = Field(ge=2, description="How many of the newest checkpoints are kept.")
    keep_every: Count | None = Field(description="Checkpoints whose step is a multiple of this are kept for good.")
    keep_best: str | None = Field(
        description="A number of the evaluation, such as `loss`: of the checkpoints at whose step it was measured, the "
        "one with the lowest is kept, too."
    )
    asynchronous: bool = Field(description="Write in the background; the step waits only for the copy to host memory.")
    overrun: Literal["wait", "skip"] = Field(
        description="What a save does when the one before is still being written: wait for it, or skip this one."
    )
    mirror: Annotated[str, Field(pattern="^(s3a?|gs|az|abfss?|file)://.+")] | None = Field(
        description="Where each checkpoint is also copied to in the background, such as `s3://bucket/run-7`: a run on "
        "a new disk goes on from there. Its folder is the run's own. Credentials come from the environment."
    )
    verify: Literal["full", "sizes"] = Field(
        description="What a resume checks before it uses a checkpoint: full (the checksum of every byte, each process "
        "its share of the files) or sizes (that all files are there, of their sizes)."
    )


class Sample(Section):
    prompt: str = Field(description="Text that the samples at the end of the run continue. Empty: a document's begin.")
    count: Int = Field(
        ge=0,
        description="Samples to write at the end of the run, where its objective learns to continue text. 0: none.",
    )
    max_parameters: Int = Field(
        ge=0,
        description="A model with more parameters is not sampled at the end of the run, while all its processes are "
        "held: `onecurve sample RUN_DIR` does it later, on one.",
    )
    tokens: Count = Field(description="Tokens of a sample.")
    temperature: Float = Field(ge=0, description="Divides the logits; 0 takes the likeliest token.")
    top_k: Count | None = Field(description="Draw only from the k likeliest tokens. null: from all.")


class Trained(Section):
    """A second model that is trained, with its own optimizer and schedule."""

    model: Any
    optimizer: Any
    schedule: Any


class Models(Section):
    trained: dict[str, Any] = Field(
        description="Models that the objective trains beside the run's own, by the names it asks for, such as critic "
        "or discriminator: `{model: {...}, optimizer: {...}, schedule: {...}}`, of each the keys that are not as in "
        "the run's own section. They are saved with it."
    )
    frozen: dict[str, str] = Field(
        description="Frozen models that the objective asks for by name, such as its teacher or reference: directories "
        "of runs, of which the newest checkpoint is taken. They are sharded as the model is, and not saved."
    )


SECTIONS: dict[str, type[Section]] = {
    "run": Run,
    "train": Train,
    "eval": Eval,
    "checkpoint": Checkpoint,
    "track": Track,
    "sample": Sample,
    "guard": Guard,
    "watchdog": Watchdog,
    "debug": Debug,
    "models": Models,
}


class Config(BaseModel):
    """The whole config, checked. Sections with options are objects of the option's class."""

    model_config = ConfigDict(frozen=True)

    run: Run
    train: Train
    eval: Eval
    checkpoint: Checkpoint
    track: Track
    sample: Sample
    guard: Guard
    watchdog: Watchdog
    debug: Debug
    models: Models
    model: Any
    objective: Any
    data: Any
    strategy: Any
    precision: Any
    optimizer: Any
    schedule: Any
    launch: Any

    def layout(self, world_size: int) -> Layout:
        """Returns how the strategy uses that many processes."""
        return self.strategy.layout(world_size)

    def resolved(self) -> dict[str, Any]:
        """Returns plain, JSON-able values of every key, with secrets masked."""
        return masked(self.with_secrets())

    def with_secrets(self) -> dict[str, Any]:
        """Returns plain, JSON-able values of every key with their secrets, to start the run: never show them."""
        return {name: getattr(self, name).model_dump(mode="json") for name in type(self).model_fields}
