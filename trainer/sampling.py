"""Samples text from a trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from trainer.checkpoint.load import find_newest, read_state
from trainer.config import Config
from trainer.config.compose import complete, with_overrides
from trainer.config.validate import validate
from trainer.data import tokenizer as tokenizers
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.files import read_file
from trainer.models import is_saved
from trainer.models.factory import model_factory
from trainer.patches import without_values
from trainer.pretrained import base_of
from trainer.randomness import key
from trainer.registry import plugin
from trainer.run_directory import CHECKPOINTS
from trainer.secrets import shown_override
from trainer.strategies.base import Strategy
from trainer.topology import Topology


def open_run(folder: Path, plugins: Sequence[str] = (), overrides: Sequence[str] = ()) -> tuple[Config, Tokenizer]:
    """Returns the config and tokenizer of a run directory, which is only read.

    The config is for one process, `strategy=single`: here the model is whole, however it was sharded. Code is imported
    only from the packages in `plugins`, whatever the directory says. `overrides`: changes to the config, such as
    addresses whose secrets the directory does not hold. Raises ConfigError if the directory holds no readable run.
    """
    try:
        raw = yaml.safe_load(read_file(folder / "config.yaml"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{folder}: is not a run's folder (config.yaml: {str(error).splitlines()[0]})") from None
    if isinstance(raw, dict) and isinstance(raw.get("run"), dict):
        raw = with_overrides(raw, overrides)
        raw["run"]["plugins"] = list(plugins)
    config = validate(complete(raw | {"strategy": {"name": "single"}}) if isinstance(raw, dict) else raw)
    tokenizer_file = folder / "tokenizer.json"
    data = config.data
    return config, tokenizers.load(
        str(tokenizer_file) if tokenizer_file.exists() else "bytes", data.separator, data.special_tokens
    )


def load_run(
    folder: Path, plugins: Sequence[str] = (), overrides: Sequence[str] = ()
) -> tuple[Config, nn.Module, Tokenizer]:
    """Opens a run as `open_run` does, with its newest model on the CPU. `overrides`: `model.weights=PATH`, where the
    weights that it began with have been moved. Also raises ConfigError if the run has no checkpoint yet."""
    config, tokenizer = open_run(folder, plugins, where_weights_are(overrides))
    checkpoint, _ = find_newest(folder / CHECKPOINTS, set_aside=False)
    if checkpoint is None:
        raise ConfigError(f"{folder}: has no checkpoint yet")
    model = model_factory(config, tokenizer, pretrained=base_of(config, tokenizer, checkpoint), loaded=True)()
    saved = is_saved(model)
    read_state(checkpoint, {f"model/{name}": tensor for name, tensor in model.state_dict().items() if saved(name)})
    return config, model, tokenizer


def where_weights_are(overrides: Sequence[str]) -> Sequence[str]:
    """Returns the overrides. Raises ConfigError for any key but `model.weights`: it would change the model."""
    if refused := [shown_override(text) for text in overrides if not text.startswith("model.weights=")]:
        raise ConfigError(f"{', '.join(refused)}: of a run that is there only model.weights=PATH can be said anew")
    return overrides


def with_weights(config: Config, tokenizer: Tokenizer, weights: Mapping[str, Tensor]) -> nn.Module:
    """Returns a model on the CPU that holds `weights`."""
    model = _build_without_values(config, tokenizer)
    _assign(model, ((name, tensor.clone()) for name, tensor in weights.items()))
    return model


def trained_model(config: Config, strategy: Strategy, tokenizer: Tokenizer, topology: Topology) -> nn.Module | None:
    """Returns the model of a finished run on the main rank's device, for the samples that the config asks for.

    Every rank calls it. It is the trained model itself, where the main rank holds all of it; a sharded one is gathered
    once, tensor by tensor. None where nothing is sampled, and on all other ranks.
    """
    if not (config.sample.count and continues_text(config)):
        return None
    model = _build_without_values(config, tokenizer)
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > config.sample.max_parameters:
        if topology.is_main and config.track.console:
            limit = f"sample.max_parameters={config.sample.max_parameters:,}"
            print(f"\nno samples of {size:,} parameters ({limit}): onecurve sample {config.run.dir}")
        return None
    trained = getattr(strategy, "model", None)
    if trained is not None and _list_parts(trained) == _list_parts(model):
        return trained if topology.is_main else None
    if not topology.is_main:
        for _ in strategy.full_weights():  # the main rank gathers from all
            pass
        return None
    _assign(model, ((name, tensor.to(topology.device)) for name, tensor in strategy.full_weights()))
    return model.to(topology.device)


def continues_text(config: Config) -> bool:
    """Returns whether the run's objective says that its models continue text: it is CausalLM or one built on it, or has
    the attribute `continues_text`."""
    return bool(getattr(plugin(config, "objective"), "continues_text", False))


def _build_without_values(config: Config, tokenizer: Tokenizer) -> nn.Module:
    """Returns the model with its parameters on the meta device: nothing is drawn that would be overwritten."""
    with without_values():
        return model_factory(config, tokenizer).build()


def _list_parts(model: nn.Module) -> list[tuple[Any, ...]]:
    """Returns the modules and parameters of a model: other ones where a strategy shards, splits or converts it."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return modules + [(name, type(tensor), tensor.shape) for name, tensor in model.named_parameters()]


def _assign(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Makes `tensors` the values of a model without any, in the model's types; of tied parameters one is kept."""
    state = model.state_dict(keep_vars=True)
    values: dict[str, Tensor] = {}
    assigned: dict[int, Tensor] = {}  # by parameter
    for name, tensor in tensors:
        parameter = state.get(name, tensor)
        values[name] = assigned.setdefault(id(parameter), tensor.to(parameter.dtype))
    model.load_state_dict(values, assign=True)


def sample(
    config: Config, model: nn.Module, tokenizer: Tokenizer, should_stop: Callable[[], bool] = lambda: False
) -> list[str]:
    """Returns the samples that the config's `sample` section asks for; the same each time for the same weights.

    The list is empty once `should_stop()`, which is called before each token, is true. Raises ConfigError if the run
    does not learn text."""
    if not continues_text(config):
        raise ConfigError(f"{config.run.name}: is not a run that learns text: there is nothing to sample")
    options = config.sample
    generator = torch.Generator().manual_seed(key(config.run.seed, "sample"))
    # Each token changes the length, for which a compiled model would be compiled again.
    without_compilation = torch.compiler.set_stance("force_eager") if config.train.compile else nullcontext()
    with without_compilation:
        return generate(
            model,
            tokenizer,
            options.prompt,
            count=options.count,
            tokens=options.tokens,
            context=config.data.sequence_length,
            temperature=options.temperature,
            top_k=options.top_k,
            generator=generator,
            should_stop=should_stop,
        )


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    count: int,
    tokens: int,
    context: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Returns `count` continuations of `prompt`, prompt included, each of up to `tokens` tokens; an empty list once
    `should_stop()` is true.

    A continuation ends at the end-of-document token. The model sees the last `context` tokens. It computes on its own
    device; tokens are drawn on the CPU, the same on any machine.
    """
    model.eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    # A command line can have any encoding.
    prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    start = [tokenizer.separator, *tokenizer.encode(prompt).tolist()]
    ids = torch.tensor([start] * count, dtype=torch.int64)
    for _ in range(tokens if count else 0):
        if should_stop():
            return []
        logits = model({"inputs": ids[:, -context:].to(device)})[:, -1].float().cpu()
        if temperature == 0:
            chosen = logits.argmax(dim=-1, keepdim=True)
        else:
            if top_k is not None:
                floor = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < floor, float("-inf"))
            chosen = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
        ids = torch.cat((ids, chosen), dim=1)
    texts = []
    for row in ids[:, 1:].tolist():
        end = row.index(tokenizer.separator) if tokenizer.separator in row else len(row)
        texts.append(tokenizer.decode(row[:end]))
    return texts
