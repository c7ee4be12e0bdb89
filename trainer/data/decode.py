"""Decodes one member of a sample as webdataset does; never unpickles, and never makes more of it than its bytes
justify.

What a header claims is compared with what is there before memory is taken for it. What is compressed may unpack to
`UNPACKED_BYTES`, a large one to `TIMES` its own size: more than that is not data but a bomb.
"""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from trainer.data import images

UNPACKED_BYTES, TIMES = 256 << 20, 16
PICKLES = frozenset(("pickle", "pkl", "pth", "pyd"))
INSTEAD = "store it as .npy, .npz or .json"


def kind(extension: str) -> str:
    """Returns the part of an extension that selects the decoder: the last one, without compression."""
    return extension.removesuffix(".gz").rpartition(".")[2]


def is_known(extension: str) -> bool:
    """Returns whether there is a decoder for the extension."""
    from webdataset import autodecode

    return kind(extension) in images.EXTENSIONS or kind(extension) in autodecode.decoders.keys() - PICKLES


def decode(extension: str, content: bytes) -> Any:
    """Returns the value of a member; its bytes if the extension is not known. Raises whatever the libraries raise for
    content that cannot be decoded, and ImportError for a missing package."""
    return _decoder()(extension, content)


def unpacked(extension: str, content: bytes) -> bytes:
    """Returns the content of a member, decompressed. Raises ValueError, OSError, EOFError."""
    if not extension.endswith(".gz"):
        return content
    limit = _unpacked_limit(content)
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        unpacked_content = file.read(limit + 1)
    if len(unpacked_content) > limit:
        raise ValueError(f"unpacks to more than {limit} bytes")
    return unpacked_content


def array(content: bytes) -> Any:
    """Returns the array of a .npy file. Raises ValueError."""
    file = io.BytesIO(content)
    claimed = _claimed_bytes(file)
    if claimed > (available := len(content) - file.tell()):
        raise ValueError(f"its header tells of {claimed} bytes, but {available} follow")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def arrays(content: bytes) -> dict[str, Any]:
    """Returns the arrays of a .npz file by name. Raises ValueError, BadZipFile."""
    with np.lib.npyio.NpzFile(io.BytesIO(content), allow_pickle=False) as file:
        entries = file.zip.infolist()
        if (size := sum(entry.file_size for entry in entries)) > (limit := _unpacked_limit(content)):
            raise ValueError(f"unpacks to {size} bytes, more than {limit}")
        for entry in (entry for entry in entries if entry.filename.endswith(".npy")):
            with file.zip.open(entry) as member:
                if _claimed_bytes(member) > entry.file_size:
                    raise ValueError(f"the header of {entry.filename} tells of more bytes than are there")
        return dict(file)


def _unpacked_limit(content: bytes) -> int:
    """Returns how many bytes these may unpack to."""
    return max(UNPACKED_BYTES, TIMES * len(content))


def _claimed_bytes(file: Any) -> int:
    """Reads the header of a .npy file and returns the number of bytes that it announces. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    # The third version differs from the second in how names of fields are spelled, which does not matter for the size.
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    return 0 if dtype.hasobject else math.prod(shape) * dtype.itemsize  # objects are refused as pickles


@cache
def _decoder() -> Callable[[str, bytes], Any]:
    from webdataset import autodecode

    def unpack(key: str, content: bytes) -> Any:
        return autodecode.Continue(key[:-3], unpacked(key, content)) if key.endswith(".gz") else None

    return autodecode.Decoder([_refuse_pickle, _decode_array, _decode_image], pre=[unpack]).decode1


def _refuse_pickle(key: str, content: bytes) -> None:
    if kind(key) in PICKLES:
        raise ValueError(f"is a pickle, which can run any code; {INSTEAD}")


def _decode_array(key: str, content: bytes) -> Any:
    parse = {"npy": array, "npz": arrays}.get(kind(key))
    return parse(content) if parse else None


def _decode_image(key: str, content: bytes) -> Any:
    return images.decode(content, _unpacked_limit(content)) if kind(key) in images.EXTENSIONS else None
