"""`model.weights`: pretrained weights that a run starts with. They are found and checked before it starts, then read
parameter by parameter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.checkpoint.format import read_manifest
from trainer.checkpoint.load import FoundCheckpoint
from trainer.checkpoint.retention import complete_checkpoints
from trainer.config import Config
from trainer.data.shared_work import team_of
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.facts import NoExample
from trainer.models import Fill
from trainer.models.factory import model_factory, not_saved, reads_weights, without_transforms
from trainer.models.family import Family, UnknownFamily, family_of
from trainer.models.pretrained_files import CONFIG, Files, files_beside, position_matters
from trainer.models.weight_files import TensorRef, UnusableWeights, digest_of_contents, files, find, fingerprint
from trainer.patches import without_values
from trainer.run_directory import CHECKPOINTS, is_restarted
from trainer.topology import ALONE, Topology

HEAD, POSITIONS = "lm_head.weight", "max_position_embeddings"
ROWS = 1024  # of a matrix, read at a time
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\battn\.(masked_)?bias$")  # that older versions of transformers saved
# Keys of transformers' configs that only matter where shapes differ, and (FREE) that never change what is computed.
SIZES = {"vocab_size", "n_positions"}
# tie_word_embeddings: shapes and `missing_head` show it; initializer_range: nothing is drawn; pretraining_tp: the same
# sums; pad_token_id: only which row of the embedding has no gradient. The longest position: see `position_matters`.
FREE = re.compile(
    "tie_word_embeddings|.*(dropout|pdrop)|summary_.*|initializer_range|use_cache|pretraining_tp|(bos|eos|pad)_token_id"
)


@dataclass(frozen=True)
class PretrainedWeights:
    """Pretrained weights in Hugging Face's format, for a run's model."""

    fingerprint: str
    """Fingerprint of a sample of the values; of all values where checkpoints leave some out."""
    family: Family
    places: dict[str, tuple[Path, str]]
    """The file and the tensor's name in it, by parameter."""
    other_files: Files = field(default_factory=dict)
    """The other files of that folder."""

    def fill(self, name: str, value: Tensor) -> None:
        file, stored_name = self.places[name]
        with safe_open(file, "pt") as tensors:
            value.copy_(self.family.from_transformers(name, tensors.get_tensor(stored_name)))


def open_pretrained(config: Config, topology: Topology, tokenizer: Tokenizer) -> PretrainedWeights | None:
    """Returns the weights that `model.weights` names, None if it is not set. All ranks call it; each has to find the
    same.

    Raises ConfigError on all of them if any cannot use the weights. Where they are gone, but the run has a checkpoint
    with all parameters, its fingerprint of them is used: the weights are not needed any more.
    """
    if not reads_weights(config):
        return None
    weights: str = config.model.weights  # type: ignore[attr-defined]
    key, path = f"model.weights={weights}", Path(weights).expanduser()
    recorded = None if path.exists() or not_saved(config, tokenizer) else _recorded_fingerprint(config)
    if recorded := topology.broadcast(recorded):
        return PretrainedWeights(recorded, Family(None), {})
    pretrained, problem = None, None
    try:
        pretrained = _check_weights(path, config, tokenizer, topology)
    except NoExample:
        problem = f"{key}: this model looks at the data while it is made, so it cannot start with given weights"
    except (UnknownFamily, UnusableWeights, OSError) as error:
        problem = f"{key}: {error}"
    if problems := sorted({text for text in topology.gather(problem) if text}):
        raise ConfigError(problems)
    assert pretrained is not None
    if len(set(topology.gather(pretrained.fingerprint))) > 1:
        raise ConfigError(f"{key}: not the same on all machines")
    if not_saved(config, tokenizer):  # read in each attempt: no value may have changed
        team, cache = team_of(config, topology), Path(config.data.cache).expanduser()
        return replace(pretrained, fingerprint=digest_of_contents(files(path), team, cache))
    return pretrained


def base_of(
    config: Config, tokenizer: Tokenizer, checkpoint: FoundCheckpoint, topology: Topology = ALONE, movable: bool = True
) -> Fill | None:
    """Returns the function that fills parameters that a checkpoint leaves out from `model.weights`; None where it
    leaves out none. All ranks of `topology` call it. Raises ConfigError where the weights are gone, or are not those
    that the run began with. `movable`: whether the command accepts another path of the weights."""
    if not not_saved(config, tokenizer):
        return None
    restore = "restore them" + (", or say where they are now with model.weights=PATH" if movable else "")
    try:
        pretrained = open_pretrained(config, topology, tokenizer)
    except ConfigError as error:
        needed = f"{checkpoint.path}: does not hold frozen parameters, which are read from these weights; {restore}"
        raise ConfigError([*error.problems, needed]) from None
    assert pretrained is not None
    recorded = checkpoint.manifest.get("identity", {}).get("model", {}).get("weights", pretrained.fingerprint)
    if recorded != pretrained.fingerprint:
        raise ConfigError(
            f"model.weights={config.model.weights}: not the weights that the run of {checkpoint.path} began with, "
            f"whose frozen parameters its checkpoint does not hold; {restore}"
        )
    return pretrained.fill


def _recorded_fingerprint(config: Config) -> str | None:
    """Returns the fingerprint of the weights that the run in this folder started with, from its newest checkpoint."""
    if config.run.fresh and not is_restarted():
        return None
    with suppress(Exception):  # loading the checkpoint reports whatever is wrong with it
        newest = complete_checkpoints(Path(config.run.dir).expanduser() / CHECKPOINTS)[-1]
        return read_manifest(newest)["identity"]["model"]["weights"]
    return None


def _check_weights(path: Path, config: Config, tokenizer: Tokenizer, topology: Topology) -> PretrainedWeights:
    """Raises UnusableWeights with all that does not fit."""
    family, stored = family_of(config, tokenizer), find(path)
    other_files = files_beside(path) if topology.is_main else files_beside(path, [CONFIG])  # the main rank keeps them
    base_config = _config_of(other_files, family.config)
    with without_values():
        model = model_factory(without_transforms(config), tokenizer).build()
    embedding = f"{model.embedding_parts[0]}.weight"  # type: ignore[index]
    sources = {
        name: _stored_name(family.name(name), family.name(embedding), stored) for name, _ in model.named_parameters()
    }
    places = {name: (stored[source].file, source) for name, source in sources.items() if source}
    missing = [name for name, source in sources.items() if source is None]
    unfit = [
        f"{places[name][1]} {list(their_shape)}, here {list(our_shape)}"
        for name, parameter in model.named_parameters()
        if name in places
        and (their_shape := stored[places[name][1]].shape)
        != (our_shape := tuple(family.to_transformers(name, torch.empty(parameter.shape, device="meta")).shape))
    ]
    unused = [name for name in sorted(set(stored) - set(sources.values())) if not BUFFERS.search(name)]
    if (
        HEAD in unused
        and (HEAD not in sources)
        and (not topology.is_main or _are_equal(stored, HEAD, sources[embedding]))
    ):
        unused.remove(HEAD)  # only the main rank compares them, as two whole matrices are read
    missing_head = (
        [HEAD] if base_config is not None and not base_config.tie_word_embeddings and HEAD not in stored else []
    )
    differences = _differing_keys(base_config, family.config, bool(missing or unfit or unused))
    unsupported = list(family.refused(differences)) if differences else []
    texts = [
        *_list_some(f"{len(missing)} of {len(sources)} parameters are not in it", missing),
        *_list_some("of another shape", unfit),
        *_list_some(f"{len(unused)} of its tensors have no place in this model", unused),
        *_list_some("its config.json says tie_word_embeddings=false, but its head is lost", missing_head),
        *_list_some("its config.json is of a model that is not supported", unsupported),
    ]
    if not unsupported:
        title = "its config.json is of another model; this one would be it with"
        texts += _list_some(
            title, (_as_override(f"{family.prefix}{key}", value) for key, value in differences.items()), most=99
        )
    if texts:
        raise UnusableWeights("; ".join(texts))
    return PretrainedWeights(fingerprint(files(path)), family, places, other_files)


def _stored_name(name: str, embedding: str, stored: dict[str, TensorRef]) -> str | None:
    """Returns the name in these files of the parameter that transformers calls `name`, if it is there. A model without
    its head is saved without the first part of the names; a head that is tied to the embedding is not saved."""
    candidates = [name, name.partition(".")[2]]
    if name == HEAD:
        candidates = [name, embedding, embedding.partition(".")[2]]
    return next((candidate for candidate in candidates if candidate in stored), None)


def _are_equal(stored: dict[str, TensorRef], first: str, second: str | None) -> bool:
    """Returns whether two tensors are equal, reading a few rows at a time."""
    if second is None or stored[first].shape != stored[second].shape:
        return False
    with safe_open(stored[first].file, "pt") as ours, safe_open(stored[second].file, "pt") as theirs:
        parts = ours.get_slice(first), theirs.get_slice(second)
        if len({part.get_dtype() for part in parts}) > 1:
            return False
        rows = range(0, stored[first].shape[0], ROWS)
        return all(torch.equal(*(part[start : start + ROWS] for part in parts)) for start in rows)


def _config_of(other_files: Files, our_config: Any) -> Any:
    """Returns the config beside the weights, if there is one. Raises UnusableWeights."""
    if CONFIG not in other_files:
        return None
    try:
        content = json.loads(other_files[CONFIG])
        if content.get("model_type") != our_config.model_type:
            raise UnusableWeights(
                f"its config.json is of a {content.get('model_type')}, this model is a {our_config.model_type}"
            )
        return type(our_config).from_dict(content)
    except UnusableWeights:
        raise
    except Exception as error:  # transformers raises many kinds
        raise UnusableWeights(f"config.json cannot be read: {str(error).splitlines()[-1]}") from None


def _differing_keys(their_config: Any, our_config: Any, sizes: bool) -> dict[str, Any]:
    """Returns the keys of the weights' config that differ from this model's and matter, with their values; shapes do
    not show all of them. `sizes`: whether some shapes differ."""
    if their_config is None:
        return {}
    from transformers import PreTrainedConfig  # an extra

    differences = {}
    model_keys = {key.name for key in fields(our_config)} - {key.name for key in fields(PreTrainedConfig)}
    for name in sorted(model_keys):
        ours, theirs = getattr(our_config, name), getattr(their_config, name)
        if name == POSITIONS and name not in our_config.attribute_map:
            differs = ours != theirs and position_matters(their_config, ours, length=ours)
        else:
            differs = ours != theirs and (sizes or name not in SIZES) and not FREE.fullmatch(name)
        if differs:
            differences[name] = theirs
    return differences


def _as_override(key: str, value: Any) -> str:
    """Returns a key and value as written on a command line."""
    override = f"{key}={json.dumps(value, separators=(',', ':'))}"
    return f"'{override}'".replace('"', "") if isinstance(value, (dict, list)) else override


def _list_some(title: str, items: Iterable[str], most: int = 3) -> Iterator[str]:
    """Yields `title: a, b, c and 4 more`, if there are items."""
    items = list(items)
    if items:
        more = f" and {len(items) - most} more" if len(items) > most else ""
        yield f"{title}: {', '.join(items[:most])}{more}"
