"""The other files of pretrained weights: the config, the tokenizer's settings, how text is generated.

A run keeps its own copy of them, as of its tokenizer, so that an export has them even if the base model has moved.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.files import read_file, replace_file

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
TEXT_FILES = ("generation_config.json", TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja")
FOLDER = "pretrained"  # in the run directory
LARGEST = 64 << 20  # bytes of such a file; a larger one is something else

Files = Mapping[str, bytes]


def files_beside(weights: Path, names: Sequence[str] = (CONFIG, TOKENIZER, *TEXT_FILES)) -> Files:
    """Returns the small files of the folder of pretrained weights; none if the weights are a single file. Raises
    OSError if one cannot be read."""
    contents = {}
    for name in names if weights.is_dir() else ():
        with suppress(FileNotFoundError):
            if (weights / name).stat().st_size <= LARGEST:
                contents[name] = read_file(weights / name)
    return contents


def keep(run: Path, files: Files) -> None:
    """Copies the files into the run directory unless it has one of that name. A failure is ignored, since training does
    not need them."""
    with suppress(OSError):
        for name, content in files.items():
            if not (run / FOLDER / name).exists():
                (run / FOLDER).mkdir(exist_ok=True)
                replace_file(run / FOLDER / name, content)


def read_kept(run: Path, weights: str | None) -> Files:
    """Returns the files that the run directory keeps, or, for the run of an earlier version, those of the folder
    `weights` if it still exists. Raises ConfigError."""
    try:
        return files_beside(run / FOLDER) or (files_beside(Path(weights).expanduser()) if weights else {})
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from None


def export_files(base: Files, config: Any, tokenizer: bytes | None) -> Files:
    """Returns the files of `base` that also hold for weights that were trained from it. Copies into `config`, an object
    of transformers, what else holds: the longest position, and ids of special tokens. `tokenizer`: the run's
    tokenizer.json."""
    base_config = _parse_object(base.get(CONFIG))
    longest, length = base_config.get("max_position_embeddings"), config.max_position_embeddings
    if isinstance(longest, int) and longest > length and not position_matters(config, longest, length):
        config.max_position_embeddings = longest
    if not base or not _is_same_tokenizer(base.get(TOKENIZER), tokenizer):
        return {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name in base_config:
            setattr(config, name, base_config[name])
    return {name: base[name] for name in TEXT_FILES if name in base}


def position_matters(config: Any, longest: int, length: int) -> bool:
    """Returns whether a model of transformers computes something else for sequences up to `length` if `longest` is its
    longest position: there are tables of that size, and ways to scale rotations by it (longrope; dynamic beyond it)."""
    if "max_position_embeddings" in config.attribute_map:
        return True
    longer_config = copy.deepcopy(config)
    longer_config.max_position_embeddings = longest
    return not all(map(torch.equal, _rotations(config, length), _rotations(longer_config, length)))


def _rotations(config: Any, length: int) -> list[Tensor]:
    """Returns frequencies of the rotary embedding and their scale, for short sequences and those of this length."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # an extra

    make = ROPE_INIT_FUNCTIONS.get((config.rope_parameters or {}).get("rope_type", "default"))
    if make is None:  # `default`: they do not depend on the length
        return []
    pairs = [make(config, torch.device("cpu"), seq_len=size) for size in (None, length)]
    return [torch.as_tensor(value) for pair in pairs for value in pair]


def _is_same_tokenizer(base: bytes | None, tokenizer: bytes | None) -> bool:
    """Returns whether ids mean the same, by vocabulary and added tokens. A base without a tokenizer has the run's."""
    return base is None or _vocabulary(_parse_object(base)) == _vocabulary(_parse_object(tokenizer))


def _vocabulary(tokenizer: dict[str, Any]) -> Any:
    added_tokens = [(token.get("id"), token.get("content")) for token in tokenizer.get("added_tokens") or []]
    return (tokenizer.get("model") or {}).get("vocab"), added_tokens


def _parse_object(content: bytes | None) -> dict[str, Any]:
    with suppress(ValueError):
        value = json.loads(content or b"{}")
        return value if isinstance(value, dict) else {}
    return {}
