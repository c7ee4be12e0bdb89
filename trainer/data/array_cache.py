"""Arrays in a cache: each is a .npy file, followed by a checksum that is verified when the file is opened."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.errors import ConfigError
from trainer.files import replace_file
from trainer.outage import CANNOT_MAP, Patience, retry_during_outage

_DIGEST = hashlib.sha256().digest_size


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Writes the array and its checksum to the file, whole or not at all. Raises OSError."""
    packed = io.BytesIO()
    np.save(packed, array, allow_pickle=False)
    content = packed.getbuffer()
    replace_file(path, [content, hashlib.sha256(content).digest()])


def load_array(path: Path) -> npt.NDArray[Any] | None:
    """Returns the array, mapped into memory; None if it is missing or damaged. Raises Outage or OSError where that
    cannot be known."""
    with suppress(FileNotFoundError, ValueError):
        content = map_array(path, lambda: np.memmap(path, np.uint8, "r"))
        if hashlib.sha256(content[:-_DIGEST].data).digest() == content[-_DIGEST:].tobytes():
            return map_array(path, lambda: np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)))
    return None


def map_array(path: Path, load: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Maps a file of the cache into memory, once its storage answers. Raises ConfigError if its file system cannot."""

    def attempt() -> npt.NDArray[Any]:
        try:
            return load()
        except OSError as error:
            if error.errno in CANNOT_MAP:
                problem = "its file system cannot map files into memory; choose a folder on another one"
                raise ConfigError(f"data.cache: {path}: {problem}") from error
            raise

    return retry_during_outage(attempt, Patience(str(path), str(path)))
