"""What lies beside pretrained weights: the config, the tokenizer's settings, how text is generated.

A run keeps its own copy of it, as of its tokenizer: an export says what the base model said, wherever that is by then.
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
KEPT = "pretrained"  # in the run directory
LARGEST = 64 << 20  # bytes of such a file; more is something else

Files = Mapping[str, bytes]


def files_beside(weights: Path, names: Sequence[str] = (CONFIG, TOKENIZER, *TEXT_FILES)) -> Files:
    """The small files of the folder that pretrained weights lie in; none beside a single file. Raises OSError: one that
    is there cannot be read."""
    found = {}
    for name in names if weights.is_dir() else ():
        with suppress(FileNotFoundError):
            if (weights / name).stat().st_size <= LARGEST:
                found[name] = read_file(weights / name)
    return found


def keep(run: Path, files: Files) -> None:
    """Copies the files into the run directory where it has none of that name. Training does not need them: what fails
    is not an error."""
    with suppress(OSError):
        for name, content in files.items():
            if not (run / KEPT / name).exists():
                (run / KEPT).mkdir(exist_ok=True)
                replace_file(run / KEPT / name, content)


def read_kept(run: Path, weights: str | None) -> Files:
    """What the run directory has, or, of an earlier version's run, the folder `weights` while it is there. Raises
    ConfigError."""
    try:
        return files_beside(run / KEPT) or (files_beside(Path(weights).expanduser()) if weights else {})
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from None


def export_files(base: Files, config: Any, tokenizer: bytes | None) -> Files:
    """The files of `base` that are true of weights that were trained on from there, too. Gives `config`, transformers'
    own, what else is: the longest position, and ids of special tokens. `tokenizer`: the run's tokenizer.json."""
    there = _object(base.get(CONFIG))
    longest, length = there.get("max_position_embeddings"), config.max_position_embeddings
    if isinstance(longest, int) and longest > length and not position_matters(config, longest, length):
        config.max_position_embeddings = longest
    if not base or not _same_tokenizer(base.get(TOKENIZER), tokenizer):
        return {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name in there:
            setattr(config, name, there[name])
    return {name: base[name] for name in TEXT_FILES if name in base}


def position_matters(config: Any, longest: int, length: int) -> bool:
    """Whether a model of transformers computes something else of sequences up to `length` if `longest` is its longest
    position: there are tables of that size, and ways to scale rotations by it (longrope; dynamic beyond it)."""
    if "max_position_embeddings" in config.attribute_map:
        return True
    other = copy.deepcopy(config)
    other.max_position_embeddings = longest
    return not all(map(torch.equal, _rotations(config, length), _rotations(other, length)))


def _rotations(config: Any, length: int) -> list[Tensor]:
    """Frequencies of the rotary embedding and their scale, for short sequences and those of this length."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # an extra

    make = ROPE_INIT_FUNCTIONS.get((config.rope_parameters or {}).get("rope_type", "default"))
    if make is None:  # `default`: of positions alone
        return []
    found = [make(config, torch.device("cpu"), seq_len=size) for size in (None, length)]
    return [torch.as_tensor(value) for pair in found for value in pair]


def _same_tokenizer(base: bytes | None, ours: bytes | None) -> bool:
    """Whether ids mean the same: by vocabulary and added tokens. A base without a tokenizer has the run's."""
    return base is None or _vocabulary(_object(base)) == _vocabulary(_object(ours))


def _vocabulary(tokenizer: dict[str, Any]) -> Any:
    added = [(token.get("id"), token.get("content")) for token in tokenizer.get("added_tokens") or []]
    return (tokenizer.get("model") or {}).get("vocab"), added


def _object(content: bytes | None) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(content or b"{}")
        return found if isinstance(found, dict) else {}
    return {}
