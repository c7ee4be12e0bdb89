"""`model.weights`: what a run starts with, if it does not draw its initial weights; found and checked before it starts,
then read parameter by parameter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.build import model_factory
from trainer.checkpoint.format import read_manifest
from trainer.checkpoint.retention import candidates
from trainer.config import Config, schema
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.folder import CHECKPOINTS, restarted
from trainer.models import without_values
from trainer.models.family import Family, NoFamily, family_of
from trainer.models.weight_files import Held, Unusable, files, find, fingerprint
from trainer.topology import Topology

HEAD = "lm_head.weight"
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\battn\.(masked_)?bias$")  # that older versions of transformers saved
# Keys of transformers' configs that only matter where shapes differ, and that never do for what is computed.
SIZES = {"vocab_size", "n_positions"}
FREE = re.compile(
    "max_position_embeddings|tie_word_embeddings|.*(dropout|pdrop)|summary_.*|initializer_range|use_cache|"
    "pretraining_tp|(bos|eos|pad)_token_id"
)


@dataclass(frozen=True)
class Given:
    """Weights of Hugging Face's, for a run's model."""

    fingerprint: str
    family: Family
    places: dict[str, tuple[Path, str]]
    """Of each parameter the file, and its name there."""

    def fill(self, name: str, value: Tensor) -> None:
        file, theirs = self.places[name]
        with safe_open(file, "pt") as tensors:
            value.copy_(self.family.ours(name, tensors.get_tensor(theirs)))


def open_given(config: Config, topology: Topology, tokenizer: Tokenizer) -> Given | None:
    """What `model.weights` names, None if it is not set. All ranks call it; each has to find the same.

    Raises ConfigError on all of them if any cannot use it. Where the weights are gone, but the run has a checkpoint,
    the word of that is taken for what they were: they are not needed any more.
    """
    if not isinstance(config.model, schema.Pretrained) or config.model.weights is None:
        return None
    key, path = f"model.weights={config.model.weights}", Path(config.model.weights).expanduser()
    known = None if path.exists() else _known(config)
    if known := topology.broadcast(known):
        return Given(known, Family(None), {})
    given, problem = None, None
    try:
        given = _look_through(path, config, tokenizer)
    except (NoFamily, Unusable, OSError) as error:
        problem = f"{key}: {error}"
    if problems := sorted({found for found in topology.gather(problem) if found}):
        raise ConfigError(problems)
    assert given is not None
    if len(set(topology.gather(given.fingerprint))) > 1:
        raise ConfigError(f"{key}: not the same on all machines")
    return given


def _known(config: Config) -> str | None:
    """The fingerprint of the weights that the run in this folder started with, as its newest checkpoint tells."""
    if config.run.fresh and not restarted():
        return None
    with suppress(Exception):  # whatever is wrong with it is told by who loads it
        newest = candidates(Path(config.run.dir).expanduser() / CHECKPOINTS)[-1]
        return read_manifest(newest)["identity"]["model"]["weights"]
    return None


def _look_through(path: Path, config: Config, tokenizer: Tokenizer) -> Given:
    """Raises Unusable with all that does not fit."""
    family, held = family_of(config, tokenizer), find(path)
    with without_values():
        model = model_factory(config, tokenizer).build()
    embedding = f"{model.embedding_parts[0]}.weight"  # type: ignore[index]
    sources = {name: _source(family.name(name), family.name(embedding), held) for name, _ in model.named_parameters()}
    places = {name: (held[source].file, source) for name, source in sources.items() if source}
    missing = [name for name, source in sources.items() if source is None]
    unfit = [
        f"{places[name][1]} {list(there)}, here {list(here)}"
        for name, parameter in model.named_parameters()
        if name in places
        and (there := held[places[name][1]].shape)
        != (here := tuple(family.theirs(name, torch.empty(parameter.shape, device="meta")).shape))
    ]
    unused = [name for name in sorted(set(held) - set(sources.values())) if not BUFFERS.search(name)]
    if HEAD in unused and (HEAD not in sources) and _same(held, HEAD, sources[embedding]):
        unused.remove(HEAD)
    other = list(_otherwise(path, family.config, bool(missing or unfit or unused), config))
    texts = [
        *_listed(f"{len(missing)} of {len(sources)} parameters are not in it", missing),
        *_listed("of another shape", unfit),
        *_listed(f"{len(unused)} of its tensors have no place in this model", unused),
        *_listed("its config.json is of another model; this one would be it with", other, most=99),
    ]
    if texts:
        raise Unusable("; ".join(texts))
    return Given(fingerprint(files(path)), family, places)


def _source(name: str, embedding: str, held: dict[str, Held]) -> str | None:
    """What a parameter that transformers calls `name` is called in these files, if it is there. A model without its
    head is saved without the first part of the names, a head that is the embedding not at all."""
    wanted = [name, name.partition(".")[2]]
    if name == HEAD:
        wanted = [name, embedding, embedding.partition(".")[2]]
    return next((candidate for candidate in wanted if candidate in held), None)


def _same(held: dict[str, Held], one: str, other: str | None) -> bool:
    """Whether the first rows are."""
    rows = []
    for name in (one, other):
        if name is None:
            return False
        with safe_open(held[name].file, "pt") as tensors:
            rows.append(tensors.get_slice(name)[:8])
    return torch.equal(*rows)


def _otherwise(path: Path, here: Any, sizes: bool, config: Config) -> Iterator[str]:
    """What the weights' own config says that this model's does not, and would have to; it is not all to be seen in
    shapes. `sizes`: some differ."""
    beside = path / "config.json"
    if not beside.is_file():
        return
    try:
        from transformers import PreTrainedConfig  # an extra

        content = json.loads(beside.read_bytes())
        if content.get("model_type") != here.model_type:
            raise Unusable(f"its config.json is of a {content.get('model_type')}, this model is a {here.model_type}")
        there = type(here).from_dict(content)
    except Unusable:
        raise
    except Exception as error:  # transformers raises many kinds
        raise Unusable(f"config.json cannot be read: {str(error).splitlines()[-1]}") from None
    own = {field.name for field in fields(here)} - {field.name for field in fields(PreTrainedConfig)}
    for name in sorted(own):
        ours, theirs = getattr(here, name), getattr(there, name)
        if ours != theirs and (sizes or name not in SIZES) and not FREE.fullmatch(name):
            key = f"model.config.{name}" if isinstance(config.model, schema.HuggingFace) else name
            told = f"{key}={json.dumps(theirs, separators=(',', ':'))}"
            yield f"'{told}'".replace('"', "") if isinstance(theirs, (dict, list)) else told


def _listed(title: str, items: Iterable[str], most: int = 3) -> Iterator[str]:
    """`title: a, b, c and 4 more`, if there is any."""
    items = list(items)
    if items:
        more = f" and {len(items) - most} more" if len(items) > most else ""
        yield f"{title}: {', '.join(items[:most])}{more}"
