"""Contradictions between keys, each with the arithmetic and the way out. Runs on whatever sections are valid so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config import huggingface, strategy_rules
from trainer.config.interval import Interval
from trainer.config.launch import Launch, Slurm, slurm_seconds
from trainer.config.schema import GPT, CausalLM, Data, HuggingFace, Samples, Section, Train
from trainer.config.strategy import Layout

SMALLEST_SHARE = 2**-14  # of a source in a mixture: one sequence in a cycle (trainer.data.mixture.LONGEST_CYCLE)


def problems(sections: Mapping[str, Section], world_size: int) -> Iterator[str]:
    """Every contradiction of the config on `world_size` processes."""
    has: dict[str, Any] = dict(sections)
    strategy = has.get("strategy")
    if train := has.get("train"):
        yield from _batch(train, world_size, strategy_rules.layout_of(strategy, world_size))
    if isinstance(model := has.get("model"), GPT):
        yield from _gpt(model)
    if isinstance(data := has.get("data"), Data):
        yield from _data(data)
        if getattr(has.get("track"), "by_source", False) and not data.sources:
            yield "track.by_source=true: there are no sources without data.sources"
    if isinstance(model, HuggingFace) and isinstance(data, Data):
        tensor_parallel = getattr(has.get("strategy"), "tensor_parallel", 1)
        yield from huggingface.problems(model, data.sequence_length, tensor_parallel)
    if isinstance(data, Samples):
        yield from _samples(data)
        if "tokens" not in data.fields and not data.maps:  # which could make a text of anything
            built_in: dict[str, Any] = {"model": (GPT, HuggingFace), "objective": CausalLM}
            yield from (
                f"{group}.name={has[group].name}: takes text, which data.fields has none of: call it `tokens`, such as "
                f"data.fields={{tokens: txt}}, or take {group} of your own"
                for group, kind in built_in.items()
                if isinstance(has.get(group), kind)
            )
    if isinstance(launch := has.get("launch"), Launch):
        yield from _launch(launch)
    if strategy:
        yield from strategy_rules.problems(has, world_size)


def _launch(launch: Launch) -> Iterator[str]:
    if launch.time_limit is not None and Interval.parse(launch.time_limit).unit != "seconds":
        yield f"launch.time_limit={launch.time_limit}: should be a time, such as 3h or 90min"
    if isinstance(launch, Slurm):
        yield from _slurm(launch)


def _slurm(launch: Slurm) -> Iterator[str]:
    if launch.lead_s >= (limit := slurm_seconds(launch.time)):
        yield f"launch.lead_s={launch.lead_s}: must be less than launch.time={launch.time}, which is {limit} s"
    if launch.chain > 1 and launch.requeue:
        way = "set launch.requeue=false, or launch.chain=1"
        yield f"launch.chain={launch.chain}: a job that queues itself again needs no other behind it; {way}"
    if launch.health_check and launch.container.runtime:
        yield "launch.health_check=true: looks at nodes, not into containers; set one of them aside"
    if bool(launch.container.runtime) != bool(launch.container.image):
        missing = "image" if launch.container.runtime else "runtime"
        yield f"launch.container.{missing}: missing; a container has both a runtime and an image"


def _batch(train: Train, world_size: int, layout: Layout) -> Iterator[str]:
    copies, who = world_size // layout.processes, f"{world_size} processes"
    if layout.processes > 1:
        who = f"{copies} copies of the model ({world_size} processes / {layout.processes})"
    sizes = {"train.global_batch": train.global_batch}
    sizes |= {f"train.batch_ramp.{step}": size for step, size in sorted(train.batch_ramp.items())}
    unit = (train.micro_batch or 1) * copies
    micro = f" x train.micro_batch={train.micro_batch} = {unit}" if train.micro_batch else ""
    for key, size in sizes.items():
        if size % unit:
            what = f"is no multiple of {who}{micro}" if micro else f"does not divide by {who}"
            yield f"{key}={size}: {what}; nearest: {_nearest(size, unit)}"


def _data(data: Data) -> Iterator[str]:
    if data.shards is None and not data.sources:
        yield "data.shards: missing; name the training shards, or several sources of them in data.sources"
    if data.shards is not None and data.sources:
        yield "data.sources: the run reads these or data.shards, not both; set data.shards=null"
    if data.processes and not data.workers:
        yield "data.processes=true: needs data.workers of 1 or more"
    if data.reweight and not data.sources:
        yield "data.reweight: there is nothing to weigh without data.sources"
    yield from _weights("data.sources", {name: source.weight for name, source in data.sources.items()}, data)
    for step, weights in sorted(data.reweight.items()):
        yield from _weights(f"data.reweight.{step}", weights, data)


def _samples(data: Samples) -> Iterator[str]:
    if not data.fields:
        yield "data.fields: missing; name what to take of each sample, such as {image: 'jpg;png', label: cls}"
    for name, extensions in data.fields.items():
        if name == "draws" or name.startswith("__"):
            yield f"data.fields.{name}: this name is taken; choose another one"
        if not all(extensions.split(";")):
            yield f"data.fields.{name}={extensions}: should be an extension, or several with a semicolon between"
    if data.image.augment and data.image.size is None:
        yield "data.image.augment=true: needs data.image.size"


def _weights(key: str, weights: Mapping[str, float], data: Data) -> Iterator[str]:
    if unknown := sorted(set(weights) - set(data.sources)):
        yield f"{key}: {', '.join(unknown)}: no such source; there are: {', '.join(data.sources)}"
    if missing := sorted(set(data.sources) - set(weights)):
        yield f"{key}: lacks the weight of {', '.join(missing)} (0 leaves a source out)"
    total = sum(weights.values())
    if weights and not total:
        yield f"{key}: all weights are 0"
    for name, weight in weights.items():
        if 0 < weight < SMALLEST_SHARE * total:
            share = f"a share of {weight / total:.2g} is below the smallest, {SMALLEST_SHARE:.2g}"
            yield f"{key}.{name}={weight}: {share}; 0 leaves the source out"


def _gpt(model: GPT) -> Iterator[str]:
    if model.weights is not None and (other := huggingface.unlike_gpt2(model)):
        yield f"model.weights={model.weights}: transformers has no weights for it; it is GPT-2 with {other}"
    if model.fused_norm and not model.bias:
        yield "model.fused_norm=true: Apex's FusedLayerNorm has a bias; set model.bias=true, or model.fused_norm=false"
    if model.width % model.heads:
        near = _nearest(model.width, model.heads)
        yield f"model.width={model.width}: does not divide by model.heads={model.heads}; nearest: {near}"
    elif model.positions == "rotary" and (model.width // model.heads) % 2:
        size = model.width // model.heads
        yield f"model.positions=rotary: needs an even head size, but width {model.width} / heads {model.heads} = {size}"


def _nearest(value: int, unit: int) -> str:
    below, above = value // unit * unit, (value // unit + 1) * unit
    return f"{below} or {above}" if below else f"{above}"
