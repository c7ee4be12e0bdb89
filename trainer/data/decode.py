"""One member of a sample, decoded as webdataset does; never unpickled, and never larger than its bytes account for.

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
    """What decides about the decoder: the last part, without compression."""
    return extension.removesuffix(".gz").rpartition(".")[2]


def is_known(extension: str) -> bool:
    """Whether it says how the member is to be decoded."""
    from webdataset import autodecode

    return kind(extension) in images.EXTENSIONS or kind(extension) in autodecode.decoders.keys() - PICKLES


def decode(extension: str, content: bytes) -> Any:
    """The value of a member; its bytes where the extension means nothing. Raises whatever the libraries do for what
    cannot be decoded, ImportError for a package that is missing."""
    return _decoder()(extension, content)


def unpacked(extension: str, content: bytes) -> bytes:
    """The content of a member, without compression. Raises ValueError, OSError, EOFError."""
    if not extension.endswith(".gz"):
        return content
    room = _room(content)
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        found = file.read(room + 1)
    if len(found) > room:
        raise ValueError(f"unpacks to more than {room} bytes")
    return found


def array(content: bytes) -> Any:
    """The array of a .npy file. Raises ValueError."""
    file = io.BytesIO(content)
    claimed = _claimed(file)
    if claimed > (rest := len(content) - file.tell()):
        raise ValueError(f"its header tells of {claimed} bytes, but {rest} follow")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def arrays(content: bytes) -> dict[str, Any]:
    """The arrays of a .npz file by name. Raises ValueError, BadZipFile."""
    with np.lib.npyio.NpzFile(io.BytesIO(content), allow_pickle=False) as file:
        parts = file.zip.infolist()
        if (size := sum(part.file_size for part in parts)) > (room := _room(content)):
            raise ValueError(f"unpacks to {size} bytes, more than {room}")
        for part in (part for part in parts if part.filename.endswith(".npy")):
            with file.zip.open(part) as member:
                if _claimed(member) > part.file_size:
                    raise ValueError(f"the header of {part.filename} tells of more bytes than are there")
        return dict(file)


def _room(content: bytes) -> int:
    """How many bytes may come of these."""
    return max(UNPACKED_BYTES, TIMES * len(content))


def _claimed(file: Any) -> int:
    """How many bytes the header of a .npy file announces; it is read up to its end. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    # The third version differs from the second in how names of fields are spelt, which says nothing of the size.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return 0 if dtype.hasobject else math.prod(shape) * dtype.itemsize  # those are refused as pickles


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
    make = {"npy": array, "npz": arrays}.get(kind(key))
    return make(content) if make else None


def _decode_image(key: str, content: bytes) -> Any:
    return images.decode(content, _room(content)) if kind(key) in images.EXTENSIONS else None
