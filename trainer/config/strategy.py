"""Keys of strategies and of precision: how a model is spread over processes, and in which data types it is trained."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field

from trainer.config.section import Count, Plugin


class Layout(NamedTuple):
    """Over how many processes one copy of the model is spread, in which way."""

    stages: int = 1
    """Processes in a row, each with a part of the layers."""
    tensor: int = 1
    """Processes that share each layer's matrices."""

    @property
    def processes(self) -> int:
        """Of one copy: they train on the same sequences."""
        return self.stages * self.tensor


WHOLE = Layout()  # every process holds all of the model, or its share of all layers


class Strategy(Plugin):
    def layout(self, world_size: int) -> Layout:
        """How `world_size` processes are used."""
        return WHOLE


class Single(Strategy):
    pass


class FindsUnused(Strategy):
    """What strategies have in common that must agree on what was used."""

    find_unused_parameters: bool = Field(
        description="A step may use a parameter on one process and not on another, or on none, as models with branches "
        "do. Costs a small exchange, which is waited for, in every step. Modules that hold sharded layers must be "
        "called on every process all the same."
    )


class DDP(FindsUnused):
    bucket_mb: Count = Field(description="Size of a gradient bucket in MiB; one all-reduce each.")
    bucket_view: bool = Field(
        description="Gradients are views of the buckets that are sent: one copy of them less in memory."
    )
    static_graph: bool = Field(
        description="The same parameters are used in every step: lets DDP order its work once, and recompute the same "
        "layer several times."
    )


class TensorParallel(Strategy):
    """What is common to strategies that can also split the matrices of each layer."""

    tensor_parallel: Count = Field(
        description="Neighbouring processes that share the matrices of each layer, of models that declare how. 1: off."
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


class Sharded(FindsUnused):
    """What FSDP has in common with and without copies."""

    reshard_after_forward: bool = Field(
        description="Let go of a layer's whole parameters between its forward and backward pass: less memory, one more "
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


class FSDP(Sharded, TensorParallel):
    pass


class HSDP(Sharded):
    shard_size: Count | None = Field(
        description="Processes that share one sharded copy of the model. null: those of a node."
    )


class Zero(Strategy):
    stage: Literal[0, 1, 2, 3] = Field(
        description="What DeepSpeed shards: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."
    )
    offload_optimizer: bool = Field(
        description="Optimizer state stays in host memory and the optimizer steps there. Stages 1 to 3."
    )
    offload_parameters: bool = Field(description="Parameters stay in host memory, too. Stage 3.")
    bucket_mb: Count = Field(description="Size of DeepSpeed's communication buckets in MiB.")


class Pipeline(FindsUnused, TensorParallel):
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
    def parts_a_process(self) -> int:
        return self.virtual_stages or (1 if self.schedule in ("gpipe", "1f1b") else 2)

    def layout(self, world_size: int) -> Layout:
        return Layout(self.stages or max(1, world_size // self.tensor_parallel), self.tensor_parallel)


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
