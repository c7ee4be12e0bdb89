"""Writes shards: samples as a tar stores them, their indexes, and whole data sets that appear at once or not at all.

The same samples give the same shards, byte for byte.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tarfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trainer.data import tokenizer as tokenization
from trainer.data.index import MEMBER, SIDECAR, ShardIndex, key_and_extension
from trainer.data.shards import Shards
from trainer.data.storage import Storage
from trainer.data.storage.local import stamp
from trainer.data.tar import BLOCK
from trainer.data.tokenizer import JsonTokenizer, Tokenizer
from trainer.data.tools.documents import Document
from trainer.errors import ConfigError, DataError
from trainer.files import move, replace_file, sha256, sync, sync_folder

FORMAT = "onecurve-dataset-1"
_DESCRIPTION = "dataset.json"
SHARD_BYTES = 64 << 20
TOKENIZER_SAMPLE = 256 << 20  # bytes of text that a tokenizer is trained on at most, spread over the documents
TRAINED = re.compile(r"chars|bpe:(\d+)")  # tokenizers that are trained on the texts; all others are loaded
SPLITS = ("train", "validation")
_MODE = 0o444
_EMPTY = tarfile.TarInfo("").tobuf(tarfile.PAX_FORMAT)[:BLOCK]
_LARGEST_OCTAL = 8**11


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """Yields a new folder to write to: it becomes `out` when the block succeeds and is deleted when it fails.

    Raises `ConfigError` if `out` exists (an empty folder may) or cannot be written.
    """
    out = out.expanduser().absolute()
    check_free(out)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        publish(temporary, out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from error
        raise


def check_free(out: Path) -> None:
    """Raises `ConfigError` if `out` exists; an empty folder is allowed if it can be replaced."""
    if out.is_symlink():
        raise ConfigError(f"{out}: is a link; give what it leads to, or another folder")
    if os.path.ismount(out):
        raise ConfigError(f"{out}: is a mount point; give a folder in it")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: exists already; choose another folder, or delete this one")


def publish(folder: Path, out: Path) -> None:
    """Gives a finished folder its name. Raises `ConfigError` if that exists by now, or `OSError`."""
    sync_folder(folder)
    try:
        move(folder, out)
    except OSError:
        check_free(out)
        raise
    sync_folder(out.parent)


class Writable(Protocol):
    def write(self, content: bytes, /) -> int: ...


class Body:
    """Samples one after the other as a tar stores them, and where they lie: a shard without its end.

    `keys`, `starts` and `table` are those of a `ShardIndex`; `extensions` are numbered in order of appearance; `ends`:
    the byte at which each sample ends and the next one begins.
    """

    def __init__(self, file: Writable):
        self._file = file
        self.size = 0
        self.keys: list[str] = []
        self.starts = [0]
        self.ends: list[int] = []
        self.table: list[tuple[int, int, int]] = []
        self.extensions: dict[str, int] = {}
        self._key_set: set[str] = set()

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Appends a sample: payloads by extension. Raises `ConfigError` for names that do not read back, `DataError`
        for a key that was used before."""
        check_names(key, members)
        if key in self._key_set:
            raise DataError(f"key {key!r} comes back: two samples cannot have the same key", key=key)
        pieces, at = [], self.size
        for extension, payload in sorted(members.items()):
            head = header(f"{key}.{extension}", len(payload))
            kind = self.extensions.setdefault(extension, len(self.extensions))
            self.table.append((at + len(head), len(payload), kind))
            padding = bytes(-len(payload) % BLOCK)
            pieces += [head, payload, padding]
            at += len(head) + len(payload) + len(padding)
        for piece in pieces:
            self._file.write(piece)
        self.size = at
        self._key_set.add(key)
        self.keys.append(key)
        self.ends.append(at)
        self.starts.append(len(self.table))

    def index(self, path: str) -> ShardIndex:
        """Returns the index of the finished shard at `path` that holds these samples."""
        starts, table = np.array(self.starts, np.int64), np.array(self.table, MEMBER)
        return ShardIndex(path, os.path.getsize(path), stamp(path, path), self.keys, starts, table, [*self.extensions])


def check_names(key: str, members: Iterable[str]) -> None:
    """Raises `ConfigError` for a sample whose names would not read back."""
    bad_extensions = [ext for ext in members if key_and_extension(f"{key}.{ext}") != (key, ext)]
    if bad_extensions or not members:
        raise ConfigError(f"sample {key!r}: cannot be stored with the members {list(members)}")


def header(name: str, size: int) -> bytes:
    """Returns the tar header of a payload of `size` bytes; without time and owner, so it is always the same."""
    if len(name) > 100 or not name.isascii() or size >= _LARGEST_OCTAL:
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, _MODE
        return info.tobuf(tarfile.PAX_FORMAT)
    head = bytearray(_EMPTY)  # the same as tarfile makes, in a third of the time
    head[: len(name)] = name.encode()
    head[100:107] = b"%07o" % _MODE
    head[124:135] = b"%011o" % size
    head[148:156] = b"%06o\0 " % (8 * ord(" ") + sum(head[:148]) + sum(head[156:]))
    return bytes(head)


def ending(size: int) -> bytes:
    """Returns the end of an archive whose members take `size` bytes."""
    return bytes(2 * BLOCK) + bytes(-(size + 2 * BLOCK) % tarfile.RECORDSIZE)


class ShardWriter:
    """Writes samples to `folder/prefix-000000.tar` and on, each of about `shard_bytes`, with its index."""

    def __init__(self, folder: Path, prefix: str, shard_bytes: int = SHARD_BYTES):
        self.folder, self.prefix, self.shard_bytes = folder, prefix, shard_bytes
        self.paths: list[str] = []
        self.samples = 0
        self._open: tuple[Any, Body] | None = None

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Appends a sample: payloads by extension. Raises as `Body.add` does."""
        if self._open is None:
            check_names(key, members)  # before a file exists
            self.paths.append(str(self.folder / shard_name(self.prefix, len(self.paths))))
            file = open(self.paths[-1], "xb")  # noqa: SIM115  # closed by close()
            self._open = file, Body(file)
        _, body = self._open
        body.add(key, members)
        self.samples += 1
        if body.size >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        """Ends the open shard and saves its index."""
        if self._open is None:
            return
        file, body = self._open
        with file:
            file.write(ending(body.size))
            file.flush()
            sync(file.fileno())
        self._open = None
        body.index(self.paths[-1]).save(Path(self.paths[-1] + SIDECAR))

    def abandon(self) -> None:
        """Closes the file of the open shard, which stays unfinished."""
        if self._open is not None:
            self._open[0].close()


def shard_name(prefix: str, number: int) -> str:
    return f"{prefix}-{number:06d}.tar"


def shards_spec(prefix: str, count: int) -> str | None:
    """Returns the shards of a split as one spec, relative to the data set's folder."""
    numbers = "000000" if count == 1 else f"{{000000..{min(count, 10**6) - 1:06d}}}"
    if count > 10**6:  # a range has numbers of one width
        numbers = f"{{{numbers},{{{10**6}..{count - 1}}}}}"
    return f"{prefix}-{numbers}.tar" if count else None


def pack(
    samples: Iterable[tuple[str, Mapping[str, bytes]]],
    out: Path,
    prefix: str = "train",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Creates the folder `out` with shards of any samples: (key, payload by extension), in their order."""
    with published(out) as folder, _writers(folder, [prefix], shard_bytes) as writers:
        for key, members in samples:
            writers[prefix].add(key, members)
        if not writers[prefix].paths:
            raise ConfigError(f"{out}: there are no samples to pack")


@contextmanager
def _writers(folder: Path, prefixes: Sequence[str], shard_bytes: int) -> Iterator[dict[str, ShardWriter]]:
    """Yields a writer for each prefix, closed at the end."""
    writers = {prefix: ShardWriter(folder, prefix, shard_bytes) for prefix in prefixes}
    try:
        yield writers
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()


def pack_documents(
    documents: Iterable[Document],
    out: Path,
    *,
    tokenizer: str,
    held_out: Callable[[str], bool] | None,
    field: str = "txt",
    shard_bytes: int = SHARD_BYTES,
    source_names: Sequence[str] = (),
) -> None:
    """Creates the dataset folder `out`: train and validation shards, `tokenizer.json`, `dataset.json`.

    A document is a sample, its text the member `field`. `held_out`: whether the document of a key is for
    validation (None: there is none). `tokenizer`: as for `tokenizer_recipe`, trained on the train split.
    `source_names`: for the record. Raises `ConfigError` if a split stays empty.
    """
    make = tokenizer_recipe(tokenizer)
    with published(out) as folder:
        splits = {split: {"samples": 0, "bytes": 0, "chars": 0} for split in SPLITS}
        with _writers(folder, SPLITS, shard_bytes) as writers:
            for key, text in documents:
                split = "validation" if held_out is not None and held_out(key) else "train"
                payload = text.encode()
                writers[split].add(key, {field: payload})
                for name, amount in (("samples", 1), ("bytes", len(payload)), ("chars", len(text))):
                    splits[split][name] += amount
        check_splits({split: writer.samples for split, writer in writers.items()}, held_out is not None)
        tokenizer_info = save_tokenizer(folder, tokenizer, make(_texts(writers["train"].paths, field)))
        counts = {split: len(writer.paths) for split, writer in writers.items()}
        describe(folder, {"field": field}, splits, counts, {"tokenizer": tokenizer_info, "sources": list(source_names)})


def check_splits(samples: Mapping[str, int], divided: bool) -> None:
    """Raises `ConfigError` if a required split is empty. `divided`: whether validation samples are held out."""
    if not samples["train"] or (divided and not samples["validation"]):
        raise ConfigError(
            f"{sum(samples.values())} samples are too few to part into train and validation: give more, cut "
            "texts finer (--split paragraphs, --split lines) or hold nothing out (--validation 0)"
        )


def save_tokenizer(folder: Path, spec: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes tokenizer.json into the folder unless text is bytes, and returns its record for `dataset.json`."""
    tokenizer.save(folder)
    return {
        "made": Path(spec).name,
        "load": "bytes" if tokenizer.content is None else "tokenizer.json",
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
    }


def describe(
    folder: Path,
    head: Mapping[str, Any],
    splits: Mapping[str, Mapping[str, int]],
    shards: Mapping[str, int],
    tail: Mapping[str, Any],
    digests: Mapping[str, str] | None = None,
) -> None:
    """Writes `dataset.json`: `head`, the splits, `tail`. `shards`: number per split; `digests`: sha256 of files."""
    known_digests = digests or {}
    files = sorted(path for path in folder.iterdir() if path.name != _DESCRIPTION and path.suffix != SIDECAR)
    if missing := known_digests.keys() - {path.name for path in files}:
        raise FileNotFoundError(errno.ENOENT, f"{min(missing)} is gone")
    description = {
        "format": FORMAT,
        **head,
        "splits": {split: {**sums, "shards": shards_spec(split, shards[split])} for split, sums in splits.items()},
        **tail,
        "sha256": {path.name: known_digests.get(path.name) or sha256(path) for path in files},
    }
    replace_file(folder / _DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())


def _texts(paths: Sequence[str], field: str) -> Iterator[str]:
    """Yields the packed texts, or evenly spread ones if there are more than a tokenizer needs."""
    shards = Shards.open(paths, field, Storage(Path(paths[0]).parent))
    for v in range(0, shards.n, -(-shards.bytes // TOKENIZER_SAMPLE) or 1):
        yield bytes(shards.read(v)).decode()
    shards.close()


def tokenizer_recipe(spec: str, separator: str | None = None) -> Callable[[Iterable[str]], Tokenizer]:
    """Returns the function that makes the tokenizer from the train texts. Raises `ConfigError`.

    `bpe:SIZE` and `chars` are trained; otherwise `spec` is `bytes` or the path of a tokenizer.json, which is used as it
    is, except for the `separator`.
    """
    match = TRAINED.fullmatch(spec)
    if match is None:
        tokenizer = tokenization.load(spec, separator)
        return lambda texts: tokenizer
    if separator is not None:
        raise ConfigError(f"--separator: {spec} has one of its own, {tokenization.SEPARATOR}")
    if spec == "chars":
        return lambda texts: JsonTokenizer(tokenization.train_chars(texts).to_str(pretty=True))
    size = tokenization.check_bpe_size(int(match[1]))
    return lambda texts: JsonTokenizer(tokenization.train_bpe(texts, size).to_str(pretty=True))
