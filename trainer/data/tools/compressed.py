"""Opens compressed text files."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from trainer.errors import ConfigError

_DAMAGE = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error)


@contextmanager
def opened(path: Path, packing: str) -> Iterator[IO[bytes]]:
    """Opens a file unpacked: `packing` is `xz`, `gz`, `zst` or empty. Errors within the block become `ConfigError`."""
    try:
        with _OPENERS[packing](path, "rb") as file:
            yield file
    except _DAMAGE as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # of a package that may not be installed
            raise
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _zst(path: Path, mode: str) -> IO[bytes]:
    """Opens a .zst file with Python's own module (3.14), zstandard or pyarrow, whichever is installed."""
    try:
        from compression import zstd  # type: ignore[import-not-found]

        return zstd.open(path, mode)
    except ImportError:
        pass
    try:
        import zstandard  # type: ignore[import-not-found]

        stream: Any = zstandard.ZstdDecompressor().stream_reader(open(path, mode), read_across_frames=True)  # noqa: SIM115
        return io.BufferedReader(stream)
    except ImportError:
        pass
    try:
        import pyarrow
    except ImportError:
        raise ConfigError(f"{path}: .zst needs the package zstandard: pip install zstandard") from None
    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return io.BufferedReader(stream)


_OPENERS: dict[str, Callable[..., Any]] = {"": open, "xz": lzma.open, "gz": gzip.open, "zst": _zst}
