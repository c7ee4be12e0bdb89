"""The typed schema: every key with its type, bounds and help. Values live in conf/*.yaml, and only there.

A section of the config is one class. Where a Hydra group offers a choice (model, strategy, ...), each option has a
class of its own, found by the section's `name`; `OPTIONS` lists them. Nothing heavy is imported here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.config.launch import Local, Slurm
from trainer.config.section import Count, Float, Int, IntervalText, Plugin, Positive, Section, Share
from trainer.config.strategy import DDP, FSDP, HSDP, WHOLE, Layout, Pipeline, Precision, Single, Strategy, Zero
from trainer.config.survival import Debug, Guard, Watchdog
from trainer.config.track import Track
from trainer.config.transforms import Transformed
from trainer.config.vocabulary import Vocabulary
from trainer.secrets import masked


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


class Pretrained(Transformed):
    """A model that may start with weights of Hugging Face's."""

    # With a default, unlike all others: sections of users' own models, and of earlier runs, do not have it.
    weights: str | None = Field(
        default=None,
        description="Start with these weights: a folder as `save_pretrained` of transformers writes it, or a "
        "`.safetensors` file, on every machine. A run that goes on has its own, and no longer needs them, "
        "unless `model.transforms` have frozen some. null: draw them.",
    )


class GPT(Pretrained):
    layers: Count = Field(description="Number of transformer blocks.")
    width: Count = Field(description="Width of the residual stream.")
    heads: Count = Field(description="Attention heads; they divide the width.")
    dropout: Share = Field(description="Dropout on embeddings and on every residual branch.")
    positions: Literal["learned", "rotary"] = Field(
        description="learned (GPT-2) or rotary (RoPE) position information."
    )
    activation: Literal["gelu", "relu2"] = Field(
        description="Inside the MLP: gelu (tanh form, GPT-2) or relu2 (squared ReLU, Primer)."
    )
    bias: bool = Field(description="Biases in linear layers and norms, as in GPT-2.")
    fused_norm: bool = Field(
        description="Norms by NVIDIA Apex's FusedLayerNorm, which has a bias: for `model.bias=true`. A run may change "
        "it at any time."
    )


class HuggingFace(Pretrained):
    """What models of transformers have in common."""

    architecture: str = Field(description="The class in transformers.")
    config: dict[str, Any] = Field(
        description="Keys of its config in transformers, such as `model.config.hidden_size=512`; the others are as "
        "there. The size of the vocabulary (of `data.tokenizer`) and the longest position (`data.sequence_length`) "
        "need not be given. Leave dropout at 0 for one curve: transformers draws it from torch's generator, so its "
        "masks depend on the number of processes and on `train.micro_batch`."
    )


class Llama(HuggingFace):
    architecture: Literal["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"] = Field(
        description="The class in transformers."
    )


class GPT2(HuggingFace):
    architecture: Literal["GPT2LMHeadModel"] = Field(description="The class in transformers.")


class CausalLM(Plugin):
    pass


class DataSource(Section):
    shards: str | list[str] = Field(description="Its training shards, as `data.shards`.")
    weight: Float = Field(ge=0, description="Its share of the sequences is its weight over the sum of all.")


class Data(Vocabulary):
    """What text and decoded samples have in common: where the shards are, their order, faults, reading."""

    shards: str | list[str] | None = Field(
        description="Training shards: paths of WebDataset tars or `http(s)://`, `s3://`, `gs://` addresses; braces "
        "`{000000..000099}`, globs of local files, `.tar.gz`; `pipe:COMMAND` with `data.allow_pipe=true`. null: "
        "`data.sources` names them."
    )
    sources: dict[str, DataSource] = Field(
        description="A mixture instead of `data.shards`: `{web: {shards: ..., weight: 3}, code: {shards: ..., "
        "weight: 1}}`. At every point of the run each source has had its share, to within one sequence (weights that "
        "need more than four or five digits are rounded to 16,384ths of their sum); each has its own epochs."
    )
    reweight: dict[Count, dict[str, Annotated[Float, Field(ge=0)]]] = Field(
        description="Other weights after that many steps: `{1000: {web: 1, code: 1}}`."
    )
    validation: str | list[str] | None = Field(description="Validation shards, likewise. null: no evaluation.")
    sequence_length: Count = Field(description="Tokens of a sequence.")
    workers: Int = Field(ge=0, description="Threads that read ahead. 0: read in the training thread.")
    processes: bool = Field(description="The workers are processes instead: for decoding that keeps a core busy.")
    lanes: Count = Field(
        description="Parallel streams the data is dealt to, fixed at the run's birth. Best a multiple of the "
        "number of processes: each then reads only its own lanes."
    )
    window: Count = Field(description="Blocks of samples that a lane shuffles among each other.")
    on_error: Literal["fail", "quarantine"] = Field(
        description="What data that cannot be read does: fail (exit code 3), or quarantine: it is left out and named "
        "in `events.jsonl` and `quarantine.jsonl`; what a damaged shard holds before the damage is used. Validation "
        "data must be whole."
    )
    error_budget: Int = Field(
        ge=0, description="How many samples and shards may be quarantined in the whole run; more end it (exit code 3)."
    )
    ledger: bool = Field(description="Write `ledger.jsonl`: which samples, or pieces of them, each step consumed.")
    cache: str = Field(
        min_length=1,
        description="Folder for prepared data sets, tokens, indexes of read-only shards, copies of remote ones.",
    )
    cache_gb: Float = Field(
        ge=0, description="Most that copies of remote shards may take of `data.cache`, GB. 0: none."
    )
    patience_s: Float = Field(
        ge=0,
        description="How long a server or file system with shards may not answer during the run before that ends the "
        "run (exit code 3, tried again from the last checkpoint), seconds. Never a reason to quarantine a sample. At "
        "the start half a minute has to do; with several processes `launch.timeout_s` is a limit, too.",
    )
    mmap: bool = Field(
        description="Map local shards into memory instead of reading them: fewer copies, but a shard that is cut short "
        "during the run kills the process, and so does storage that fails then."
    )
    allow_pipe: bool = Field(description="Allow `pipe:COMMAND` among the shards: it runs COMMAND in a shell.")


class Text(Data):
    field: str = Field(
        description="Which member of a sample is the text, by its extension, such as `txt`; `u16` or `u32`: token ids "
        "that `onecurve data pack --tokenize` stored."
    )
    packing: Literal["concat", "best_fit"] = Field(
        description="How documents become sequences: concat (one after the other, cut every `data.sequence_length` "
        "tokens) or best_fit (whole documents of a shard, as tightly as they fit; only longer ones are cut)."
    )
    document_mask: bool = Field(
        description="Documents of a sequence do not see each other: attention, positions and targets end with each."
    )


class Image(Section):
    size: Count | None = Field(
        description="Height and width that images are brought to: the shorter side is scaled to it, the centre cut "
        "out. null: as large as they are, which must then be the same for all."
    )
    augment: bool = Field(
        description="In training take a random part of each image instead (8 % to 100 % of its area), scaled to "
        "`data.image.size`, and flip half of them from left to right."
    )
    mean: tuple[Float, Float, Float] = Field(
        description="Subtracted from red, green and blue, which are from 0 to 1; the default is that of ImageNet."
    )
    std: tuple[Positive, Positive, Positive] = Field(description="What they are divided by then.")


class Samples(Data):
    fields: dict[str, str] = Field(
        description="What is taken of each sample, by extension, and what it is called in a batch: `{image: 'jpg;png', "
        "label: cls}`; of several extensions the first that is there. They are decoded as webdataset does (numbers, "
        "JSON, text, NumPy arrays, images); pickles are refused. The text of a field called `tokens` becomes `inputs` "
        "and `targets` of `data.sequence_length` tokens."
    )
    maps: list[str] = Field(
        description="Functions of yours that change a decoded sample, in this order, such as `[my_package.data:crop]`, "
        "of packages in `run.plugins`. Each is called with the sample (a dict; images are Pillow's) and a random "
        "63-bit integer that depends on seed and position only (0 in an evaluation), and returns the sample."
    )
    image: Image = Field(description="What images become: float32 [3, height, width].")


class Optimizer(Plugin):
    lr: Float = Field(gt=0, description="Peak learning rate.")
    weight_decay: Float = Field(ge=0, description="Decoupled weight decay (times the learning rate).")
    no_decay: list[Literal["bias", "norm", "vector", "embedding"]] = Field(
        description="Kinds of parameters left without decay: bias, norm, vector (all else of one dimension or none: "
        "scales of layers, gates, temperatures, class tokens), embedding (tables of tokens and positions)."
    )
    ema: Share | None = Field(
        description="Decay (such as 0.999) of a moving average of the weights, kept with the optimizer's state in fp32 "
        "and exported by `onecurve export --ema`. null: none. It may be switched on or off between lives."
    )


class AdamW(Optimizer):
    implementation: Literal["auto", "fused", "foreach", "apex", "8bit"] = Field(
        description="Who computes the step: fused (torch; auto is this), foreach (torch, in more and simpler kernels), "
        "apex (FusedAdam of NVIDIA Apex, built from source; strategies single and ddp), 8bit (torchao: state of a "
        "quarter; on GPUs the first step compiles it, which may take a minute). A run continues with any other."
    )
    betas: tuple[Share, Share] = Field(description="Decay rates of the two moments.")
    eps: Float = Field(gt=0, description="Added to the denominator.")


class Lion(Optimizer):
    betas: tuple[Share, Share] = Field(
        description="Decay rates: of the momentum whose sign is the step, and of the momentum that is kept."
    )


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


class Trained(Section):
    """A second model that is trained, with an optimizer and a schedule of its own."""

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

OPTIONS: dict[str, dict[str, type[Plugin]]] = {
    "model": {"gpt": GPT, "llama": Llama, "gpt2": GPT2},
    "objective": {"causal_lm": CausalLM},
    "data": {"shakespeare": Text, "webdataset": Text, "samples": Samples},
    "strategy": {"single": Single, "ddp": DDP, "fsdp": FSDP, "hsdp": HSDP, "zero": Zero, "pipeline": Pipeline},
    "precision": dict.fromkeys(("auto", "fp32", "bf16", "fp16", "fp8"), Precision),
    "optimizer": {"adamw": AdamW, "lion": Lion, "muon": Muon},
    "schedule": {"warmup_cosine": WarmupCosine, "linear": Linear, "constant": Constant, "wsd": WSD},
    "launch": {"local": Local, "slurm": Slurm},
}


class Config(BaseModel):
    """The whole config, checked. Plugin sections hold the class of their option."""

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
        """How the strategy uses that many processes."""
        return self.strategy.layout(world_size) if isinstance(self.strategy, Strategy) else WHOLE

    def resolved(self) -> dict[str, Any]:
        """Plain, JSON-able values of every key, as others may see them: without secrets."""
        return masked(self.with_secrets())

    def with_secrets(self) -> dict[str, Any]:
        """Plain, JSON-able values of every key, for who starts the run or reads its data: to be shown to nobody."""
        return {name: getattr(self, name).model_dump(mode="json") for name in type(self).model_fields}
