"""Keys of strategies and of precision: how a model is spread over processes, and in which data types it is trained.

The section of a strategy describes what it can do, so that the checks of other sections and `onecurve plan` need not
know which one it is. Combinations that it cannot do are refused here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from trainer.config.pipeline_schedules import SCHEDULES, allowed_micro_batches
from trainer.config.section import Count, Plugin
from trainer.config.words import divisor


class Layout(NamedTuple):
    """The number of processes that share one replica of the model, by mesh dimension."""

    stages: int = 1
    """Pipeline stages: processes that each hold a part of the layers."""
    tensor: int = 1
    """Processes that share each layer's matrices."""

    @property
    def processes(self) -> int:
        """Returns the number of processes of one replica, which train on the same sequences."""
        return self.stages * self.tensor


ONE_STAGE = Layout()  # every process holds the whole model, or its shard of all layers


class Strategy(Plugin):
    """The base of all strategies; a strategy of a user's overrides what differs."""

    implementations: ClassVar[tuple[str, ...]] = ()
    """The values of `optimizer.implementation`, besides torch's, that can step on its tensors."""
    accountant: ClassVar[str] = "launch.planning.memory:Accountant"
    """The class that counts its memory and traffic for `onecurve plan`, which alone imports it: a subclass of this one,
    or this one itself if each process holds the whole model and all-reduces gradients."""

    leafwise: ClassVar[str] = ""
    """The class that takes its place under `train.deterministic=topology`; empty if there is none."""

    def layout(self, world_size: int) -> Layout:
        """Returns how `world_size` processes are used."""
        return ONE_STAGE

    def why_not_leafwise(self) -> str:
        """Returns why its sums depend on the number of processes under `train.deterministic=topology`, and the way
        out; empty if they do not."""
        if "leafwise" in vars(type(self)):  # a user's strategy does not inherit it
            return ""
        return f"strategy={self.name} adds up gradients in an order of its own; nearest: strategy=fsdp"

    def leafwise_neighbors(self, replicas: int, local_size: int) -> int:
        """Returns how many neighboring replicas sum up gradients together after each micro-batch; 1 if each has those
        of a whole step first."""
        return 1

    def splits_sequences(self) -> bool:
        """Returns whether a process may hold only a part of a sequence between two matrices."""
        return False

    def flat_update(self) -> str:
        """Returns why its optimizer does not step on whole matrices; empty if it does."""
        return ""

    def cut_problems(self, layers: int, world_size: int, tied: bool, key: str = "model.layers") -> Iterator[str]:
        """Yields why it cannot cut a model of so many layers (set by `key`) into stages; `tied`: the embedding is also
        the head. The checks of models call it."""
        return iter(())


class Single(Strategy):
    implementations = ("apex", "8bit")
    accountant = "launch.planning.memory:Single"
    leafwise = "trainer.strategies.leafwise.replicas:LeafwiseReplicas"

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        if world_size > 1:
            yield f"strategy=single: runs one process, but {world_size} were started; use strategy=ddp"


def strategy_of(sections: Mapping[str, Any]) -> Strategy:
    """Returns the strategy for the checks of other sections; if it is not valid, a stand-in that passes all of them."""
    return sections.get("strategy") or Single(name="single")


class UnusedParameters(Strategy):
    """The keys of strategies whose processes must agree on the parameters that were used."""

    find_unused_parameters: bool = Field(
        description="A step may use a parameter on one process and not on another, or on none, as models with branches "
        "do. Costs a small exchange, which is waited for, in every step. Modules that hold sharded layers must be "
        "called on every process all the same."
    )


class DDP(UnusedParameters):
    implementations = ("apex", "8bit")
    accountant = "launch.planning.copies:Copies"
    leafwise = "trainer.strategies.leafwise.replicas:LeafwiseReplicas"

    bucket_mb: Count = Field(description="Size of a gradient bucket in MiB; one all-reduce each.")
    bucket_view: bool = Field(
        description="Gradients are views of the buckets that are sent: one copy of them less in memory."
    )
    static_graph: bool = Field(
        description="The same parameters are used in every step: lets DDP order its work once, and recompute the same "
        "layer several times."
    )


class TensorParallel(Strategy):
    """The keys of strategies that can also split the matrices of each layer."""

    tensor_parallel: Count = Field(
        description="Neighboring processes that share the matrices of each layer, of models that declare how. 1: off."
    )
    sequence_parallel: bool = Field(
        description="Between matrices the processes that share them hold a part of each sequence instead of all of it: "
        "less memory for activations."
    )
    loss_parallel: bool = Field(
        description="They also share the logits: each holds those of its part of the vocabulary, and the loss is "
        "computed on that. For objectives that use torch's cross-entropy."
    )

    def layout(self, world_size: int) -> Layout:
        return Layout(tensor=self.tensor_parallel)

    def why_not_leafwise(self) -> str:
        if self.tensor_parallel > 1:
            key = f"strategy.tensor_parallel={self.tensor_parallel}"
            return f"{key} cuts sums within matrix products; nearest: strategy.tensor_parallel=1"
        return super().why_not_leafwise()

    def splits_sequences(self) -> bool:
        return self.sequence_parallel and self.tensor_parallel > 1

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        yield from super().problems(sections, world_size)
        size, key = self.tensor_parallel, f"strategy.tensor_parallel={self.tensor_parallel}"
        if world_size % size:
            yield f"{key}: does not divide {world_size} processes; nearest: {divisor(world_size, size)}"
        if size > 1 and (precision := sections.get("precision")) and precision.compute == "fp8":
            yield f"{key}: does not go with precision.compute=fp8; nearest: precision=bf16"
        if self.splits_sequences() and (data := sections.get("data")) and (length := data.sequence_length) % size:
            near = f"{length // size * size or size} or {(length // size + 1) * size}"
            reason = f"does not divide by {key} for strategy.sequence_parallel"
            yield f"data.sequence_length={length}: {reason}; nearest: {near}"


class Sharded(UnusedParameters):
    """The keys that FSDP and HSDP share."""

    implementations = ("8bit",)
    accountant = "launch.planning.sharded:Sharded"

    reshard_after_forward: bool = Field(
        description="Free a layer's whole parameters between its forward and backward pass: less memory, one more "
        "gathering."
    )
    gather: Literal["param", "compute"] = Field(
        description="In which of precision's data types parameters are gathered. compute: half the traffic under bf16, "
        "but norms and embeddings then compute in it too, and the curve is no longer quite that of other strategies."
    )
    reduce: Literal["each", "last"] = Field(
        description="After which micro-batch of a step gradients are summed over the processes that share the model. "
        "each: after each one, and a process keeps its shard of the sum. last: once a step, which sends less the more "
        "micro-batches there are, but every process keeps the gradients of the whole model until then."
    )
    cpu_offload: bool = Field(
        description="Parameters, gradients and optimizer state stay in host memory and are copied to the device layer "
        "by layer; the optimizer steps on the CPU."
    )

    def why_not_leafwise(self) -> str:
        if self.gather == "compute":
            return "strategy.gather=compute rounds norms and embeddings, too; nearest: strategy.gather=param"
        return super().why_not_leafwise()

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        yield from super().problems(sections, world_size)
        if (precision := sections.get("precision")) is None:
            return
        shorter = self.gather == "compute" and precision.compute != "fp32"  # auto may become bf16
        sent_short = precision.param == "fp32" and (shorter or precision.reduce == "bf16")
        if self.reduce == "last" and sent_short:
            yield (
                "strategy.reduce=last: not where gradients are sent in bf16 but held in fp32 (precision.reduce=bf16, "
                "or strategy.gather=compute): the sum over micro-batches would be rounded to bf16; nearest: "
                "strategy.reduce=each"
            )
        if self.gather == "compute" and precision.compute == "fp16":
            reason = "not with precision.compute=fp16, whose range weights may leave"
            yield f"strategy.gather=compute: {reason}; nearest: param"


class FSDP(Sharded, TensorParallel):
    leafwise = "trainer.strategies.leafwise.sharded:LeafwiseFSDP"

    def leafwise_neighbors(self, replicas: int, local_size: int) -> int:
        return replicas

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        yield from super().problems(sections, world_size)
        if self.cpu_offload and self.tensor_parallel > 1:
            key = f"strategy.tensor_parallel={self.tensor_parallel}"
            yield f"{key}: does not go with strategy.cpu_offload=true; nearest: strategy.tensor_parallel=1"


class HSDP(Sharded):
    accountant = "launch.planning.sharded:Hybrid"
    leafwise = "trainer.strategies.leafwise.sharded:LeafwiseHSDP"

    shard_size: Count | None = Field(
        description="Processes that share one sharded copy of the model. null: those of a node."
    )

    def leafwise_neighbors(self, replicas: int, local_size: int) -> int:
        return self.shard_size or local_size

    def why_not_leafwise(self) -> str:
        if self.shard_size == 1:
            return "strategy.shard_size=1 shards nothing; nearest: strategy=ddp"
        return super().why_not_leafwise()

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        if self.shard_size and world_size % self.shard_size:
            yield (
                f"strategy.shard_size={self.shard_size}: does not divide {world_size} processes into groups; "
                f"nearest: {divisor(world_size, self.shard_size)}"
            )
        yield from super().problems(sections, world_size)


class Zero(Strategy):
    accountant = "launch.planning.zero:Zero"

    stage: Literal[0, 1, 2, 3] = Field(
        description="What DeepSpeed shards: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."
    )
    offload_optimizer: bool = Field(
        description="Optimizer state stays in host memory and the optimizer steps there. Stages 1 to 3."
    )
    offload_parameters: bool = Field(description="Parameters stay in host memory, too. Stage 3.")
    bucket_mb: Count = Field(description="Size of DeepSpeed's communication buckets in MiB.")

    def flat_update(self) -> str:
        return f"DeepSpeed's stage {self.stage} steps on one flat piece of all parameters" if self.stage else ""

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        if self.offload_optimizer and self.stage == 0:
            reason = "stage 0 steps on the weights that it computes with"
            yield f"strategy.offload_optimizer=true: {reason}; nearest: strategy.stage=1"
        if self.offload_parameters and self.stage < 3:
            reason = f"strategy.stage={self.stage} computes with all of them all the time"
            yield f"strategy.offload_parameters=true: {reason}; nearest: strategy.stage=3"
        if self.stage == 3 and (train := sections.get("train")) and train.compile:
            reason = "the compiler cannot look through DeepSpeed's gathering of parameters inside of layers"
            yield f"train.compile=true: not with strategy.stage=3: {reason}; nearest: strategy.stage=2"
        if precision := sections.get("precision"):
            if precision.compute in ("fp16", "fp8"):
                yield f"precision.compute={precision.compute}: not with strategy=zero; nearest: precision=bf16"
            if precision.param != "fp32":
                reason = "DeepSpeed keeps weights in fp32 here"
                yield f"precision.param={precision.param}: {reason}; nearest: precision.param=fp32"


class Pipeline(UnusedParameters, TensorParallel):
    accountant = "launch.planning.pipeline:Pipeline"
    leafwise = "trainer.strategies.leafwise.pipeline:LeafwisePipeline"

    stages: Count | None = Field(
        description="Processes that a copy of the model is spread over, each with a part of its layers; the more "
        "processes there are, the more copies. null: all processes hold one copy."
    )
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"] = Field(
        description="Who computes which micro-batch when: gpipe (all forward, then all backward), 1f1b (alternating: "
        "less memory), interleaved_1f1b (each process holds several parts: shorter waits), interleaved_zero_bubble, "
        "zbv, dualpipev (gradients of weights fill the waits)."
    )
    virtual_stages: Count | None = Field(
        description="Parts of the model that each process holds. null: 1 for gpipe and 1f1b, 2 for the others."
    )
    micro_batches: Count | None = Field(
        description="Pieces that `train.micro_batch` is cut into, to be under way in the pipeline together. null: the "
        "largest number up to four a part of the model that divides it."
    )
    data_parallel: Literal["ddp", "fsdp"] = Field(
        description="How copies are combined where there are several: ddp (gradients are added up) or fsdp (each part "
        "is sharded over the copies)."
    )

    @property
    def stages_per_rank(self) -> int:
        return self.virtual_stages or (1 if self.schedule in ("gpipe", "1f1b") else 2)

    def layout(self, world_size: int) -> Layout:
        return Layout(self.stages or max(1, world_size // self.tensor_parallel), self.tensor_parallel)

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        yield from super().problems(sections, world_size)
        if problem := self._layout_problem(world_size):
            yield problem
            return
        schedule, name = SCHEDULES[self.schedule], f"strategy.schedule={self.schedule}"
        if self.micro_batches and world_size > 1:
            n, stages = self.micro_batches, self.layout(world_size).stages
            count = stages * self.stages_per_rank
            allowed = allowed_micro_batches(self, stages, 2 * n + 4 * count)
            if n not in allowed:
                nearest = min(allowed, key=lambda number: (abs(number - n), number))
                reason = f"not with {name} on {stages} processes ({count} parts)"
                yield f"strategy.micro_batches={n}: {reason}; nearest: {nearest}"
        if schedule.splits_backward and (train := sections.get("train")) and train.compile:
            yield (
                f"train.compile=true: not with {name}, which computes the gradients of weights apart from those of "
                "activations; nearest: strategy.schedule=interleaved_1f1b"
            )

    def _layout_problem(self, world_size: int) -> str:
        """Returns why it cannot use that many processes, or hold so many stages on each; empty if it can."""
        layout, parts, required_parts = self.layout(world_size), self.stages_per_rank, SCHEDULES[self.schedule].parts
        if world_size % layout.processes:
            setting = f"strategy.stages={layout.stages}"
            setting += f" x strategy.tensor_parallel={layout.tensor} = {layout.processes}" if layout.tensor > 1 else ""
            fits = world_size % layout.tensor == 0
            near = divisor(world_size // layout.tensor, layout.stages) if fits else "null"
            return f"{setting}: does not divide {world_size} processes; nearest: strategy.stages={near}"
        if (required_parts and parts != required_parts) or (not required_parts and parts == 1):
            requirement = f"{required_parts} part{'s' * (required_parts > 1)}" if required_parts else "2 parts or more"
            key, with_schedule = f"strategy.virtual_stages={parts}", f"with strategy.schedule={self.schedule}"
            return f"{key}: {with_schedule} a process holds {requirement}; nearest: {required_parts or 2}"
        return ""

    def cut_problems(self, layers: int, world_size: int, tied: bool, key: str = "model.layers") -> Iterator[str]:
        if self._layout_problem(world_size):  # its own check reports that
            return
        layout, parts, schedule = self.layout(world_size), self.stages_per_rank, SCHEDULES[self.schedule]
        count = layout.stages * parts
        if layers < count and world_size > 1:
            fewer = layers // parts
            yield (
                f"{key}={layers}: cannot be cut into {layout.stages} processes x {parts} parts = {count}; "
                f"nearest: {key}={count}, or strategy.{f'stages={fewer}' if fewer else 'schedule=1f1b'}"
            )
        ends_share_rank, replicas = schedule.v_shaped or layout.stages == 1, world_size // layout.processes
        if tied and self.data_parallel == "fsdp" and replicas > 1 and ends_share_rank:
            name = f"strategy.schedule={self.schedule}"
            reason = f"the two ends of the model, whose embedding is tied, are on one process with {name}"
            reason += f" on {layout.stages} processes" if not schedule.v_shaped else ""
            yield f"strategy.data_parallel=fsdp: {reason}; nearest: strategy.data_parallel=ddp"


class Precision(Plugin):
    param: Literal["fp32", "bf16"] = Field(
        description="Data type in which weights, their gradients and optimizer state are held."
    )
    compute: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        description="Data type of matrix products. auto: bf16 on GPUs that are fast at it, else fp32. fp16 comes with "
        "dynamic loss scaling; fp8 (by torchao, all else in bf16) needs an H100, MI300 or newer."
    )
    reduce: Literal["fp32", "bf16"] = Field(
        description="Data type in which gradients are added up over processes. bf16: half the traffic."
    )

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        if self.param == "bf16" and self.compute in ("fp32", "fp16"):
            yield (
                f"precision.compute={self.compute}: weights that are held in bf16 (precision.param) are computed with "
                "in bf16 or fp8; nearest: precision.compute=bf16"
            )
