"""The built-in dataset: Shakespeare's plays, packed on first use from the text in the package.

A sample is a scene or a part of one; whole scenes are held out. scripts/build_shakespeare.py made the text.
"""

from __future__ import annotations

import hashlib
import lzma
import re
from collections.abc import Iterator
from importlib import resources
from itertools import groupby
from pathlib import Path

from trainer import locks
from trainer.data.tools.documents import Document
from trainer.data.tools.write import pack_documents
from trainer.errors import ConfigError
from trainer.randomness import key as random_key

ASSET = "shakespeare.txt.xz"
PART_BYTES = 8192  # longer scenes are cut, between speeches, into parts of about equal size
SHARD_BYTES = 1 << 20


def ensure(cache: Path, tokenizer: str = "bpe:1024") -> Path:
    """Returns the folder of the packed dataset in `cache`; packs it there (seconds) if new. Many processes may call it.

    `tokenizer`: `bpe:SIZE`, `chars` or `bytes`. Raises `ConfigError` if `cache` cannot be written.
    """
    if not re.fullmatch(r"bpe:\d+|chars|bytes", tokenizer):
        raise ConfigError(f"data.tokenizer: {tokenizer!r} is none of bpe:SIZE, chars, bytes")
    asset = resources.files(__package__).joinpath(ASSET).read_bytes()
    name = f"shakespeare-{hashlib.sha256(asset).hexdigest()[:8]}-{tokenizer.replace(':', '')}"
    cache = cache.expanduser()
    folder = cache / name
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locks.hold_when_free(cache / f".{name}.lock"):
            if not folder.is_dir():
                _pack(lzma.decompress(asset).decode(), folder, tokenizer)
    except OSError as error:
        raise ConfigError(f"{cache}: {locks.describe_refusal(error)}") from error
    except ConfigError:
        if not folder.is_dir():  # else another machine was faster: locks may not reach across a network
            raise
    return folder


def scenes(text: str) -> dict[str, str]:
    """Returns the text of each scene by its name, `genre/play/act-1/scene-2`."""
    parts = (scene.partition("\n") for scene in text.split("\f")[1:])
    return {name: speeches.strip("\n") + "\n" for name, _, speeches in parts}


def documents(text: str) -> Iterator[Document]:
    """Yields scenes in parts of at most about `PART_BYTES`: `genre/play/act-1/scene-2/part-1`."""
    for name, scene in scenes(text).items():
        for number, part in enumerate(_parts(scene), 1):
            yield Document(f"{name}/part-{number}", part)


def _parts(scene: str) -> Iterator[str]:
    size = len(scene.encode())
    count, at, numbered = -(-size // PART_BYTES), 0, []
    for speech in scene.split("\n\n"):
        numbered.append((at * count // size, speech))
        at += len(speech.encode()) + 2
    for _, speeches in groupby(numbered, key=lambda pair: pair[0]):
        yield "\n\n".join(speech for _, speech in speeches).strip("\n") + "\n"


def held_out_scenes(text: str) -> set[str]:
    """Returns one scene of each play, drawn by a hash: 38 of 781."""
    scene_of_play: dict[tuple[str, ...], str] = {}
    for name in sorted(scenes(text), key=lambda name: random_key("validation", name)):
        scene_of_play.setdefault(tuple(name.split("/")[:2]), name)
    return set(scene_of_play.values())


def _pack(text: str, folder: Path, tokenizer: str) -> None:
    held_out = held_out_scenes(text)
    pack_documents(
        documents(text),
        folder,
        tokenizer=tokenizer,
        held_out=lambda key: key.rpartition("/")[0] in held_out,
        shard_bytes=SHARD_BYTES,
        source_names=[ASSET],
    )
