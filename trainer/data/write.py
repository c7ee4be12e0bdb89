"""Packing: documents or whole samples into tar shards with their indexes, a held-out split and a tokenizer.

A dataset appears whole or not at all. The same input gives the same shards, byte for byte.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from trainer.data import tokenizer as tokenization
from trainer.data.documents import SPLITS, Document, read, sources
from trainer.data.index import SIDECAR, ShardIndex, Shards, key_and_extension
from trainer.data.tar import BLOCK
from trainer.errors import ConfigError
from trainer.files import replace_file, sha256, sync_folder
from trainer.randomness import key as random_key

FORMAT = "onecurve-dataset-1"
SHARD_BYTES = 64 << 20
TOKENIZER_SAMPLE = 256 << 20  # bytes of text that a tokenizer is trained on at most, spread over the documents


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """A new folder to write to: it becomes `out` when the block ends well and vanishes when it does not.

    Raises `ConfigError` if `out` exists (an empty folder may) or cannot be written.
    """
    out = out.expanduser().absolute()
    taken = ConfigError(f"{out}: exists already; choose another folder, or delete this one")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise taken
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_folder(temporary)
        os.replace(temporary, out)
        sync_folder(out.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if out.exists() and isinstance(error, OSError):
            raise taken from error
        if isinstance(error, OSError):
            raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from error
        raise


class ShardWriter:
    """Writes samples to `folder/prefix-000000.tar` and on, each of about `shard_bytes`, with its index."""

    def __init__(self, folder: Path, prefix: str, shard_bytes: int = SHARD_BYTES):
        self.folder, self.prefix, self.shard_bytes = folder, prefix, shard_bytes
        self.paths: list[str] = []
        self.samples = 0
        self._file: BinaryIO | None = None

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Appends a sample: payloads by extension. Raises `ConfigError` for names that do not read back."""
        wrong = [ext for ext in members if key_and_extension(f"{key}.{ext}") != (key, ext)]
        if wrong or not members:
            raise ConfigError(f"sample {key!r}: cannot be stored with the members {list(members)}")
        file = self._file or self._open()
        for extension, payload in sorted(members.items()):
            header = tarfile.TarInfo(f"{key}.{extension}")  # no time, no owner: the same bytes every time
            header.size, header.mode = len(payload), 0o444
            file.write(header.tobuf(tarfile.PAX_FORMAT))
            file.write(payload)
            file.write(bytes(-len(payload) % BLOCK))
        self.samples += 1
        if file.tell() >= self.shard_bytes:
            self.close()

    def _open(self) -> BinaryIO:
        self.paths.append(str(self.folder / f"{self.prefix}-{len(self.paths):06d}.tar"))
        self._file = open(self.paths[-1], "xb")  # noqa: SIM115  # closed by close()
        return self._file

    def close(self) -> None:
        """Ends the open shard, reads it back and indexes it. Raises `DataError` if a key came twice."""
        if self._file is None:
            return
        with self._file as file:
            file.write(bytes(2 * BLOCK))
            file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
            file.flush()
            os.fsync(file.fileno())
        self._file = None
        ShardIndex.build(self.paths[-1]).save(Path(self.paths[-1] + SIDECAR))

    def abandon(self) -> None:
        """Lets go of the open shard, which stays unfinished."""
        if self._file is not None:
            self._file.close()


def pack(
    samples: Iterable[tuple[str, Mapping[str, bytes]]],
    out: Path,
    prefix: str = "train",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Makes the folder `out` of shards of any samples: (key, payload by extension), in their order."""
    with published(out) as folder, _writers(folder, [prefix], shard_bytes) as writers:
        for key, members in samples:
            writers[prefix].add(key, members)
        if not writers[prefix].paths:
            raise ConfigError(f"{out}: there are no samples to pack")


@contextmanager
def _writers(folder: Path, prefixes: Sequence[str], shard_bytes: int) -> Iterator[dict[str, ShardWriter]]:
    """A writer for each prefix, closed at the end."""
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
    """Makes the dataset folder `out`: train and validation shards, `tokenizer.json`, `dataset.json`.

    A document is a sample, its text the member `field`. `held_out`: whether the document of a key is for
    validation (None: there is none). `tokenizer`: `bpe:SIZE` or `chars`, trained on the train split; `bytes`
    (no file); or the path of a tokenizer.json, copied. `source_names`: for the record. Raises `ConfigError`
    if a split stays empty.
    """
    make = tokenizer_recipe(tokenizer)
    with published(out) as folder:
        splits = {split: {"samples": 0, "bytes": 0, "chars": 0} for split in ("train", "validation")}
        with _writers(folder, list(splits), shard_bytes) as writers:
            for key, text in documents:
                split = "validation" if held_out is not None and held_out(key) else "train"
                payload = text.encode()
                writers[split].add(key, {field: payload})
                for what, amount in (("samples", 1), ("bytes", len(payload)), ("chars", len(text))):
                    splits[split][what] += amount
        if not writers["train"].paths or (held_out is not None and not writers["validation"].paths):
            count = sum(writer.samples for writer in writers.values())
            raise ConfigError(
                f"{count} documents are too few to part into train and validation: cut them finer "
                "(split=paragraphs, split=lines) or hold nothing out (validation=0)"
            )
        content = make(_texts(writers["train"].paths, field))
        if content is not None:
            replace_file(folder / "tokenizer.json", content.encode())
        made = tokenization.load("bytes" if content is None else str(folder))
        description = {
            "format": FORMAT,
            "field": field,
            "splits": {split: sums | {"shards": _pattern(writers[split])} for split, sums in splits.items()},
            "tokenizer": {
                "made": Path(tokenizer).name,  # from what
                "load": "bytes" if content is None else "tokenizer.json",
                "vocab_size": made.vocab_size,
                "fingerprint": made.fingerprint,
            },
            "sources": list(source_names),
            "sha256": {p.name: sha256(p) for p in sorted(folder.iterdir()) if not p.name.endswith(SIDECAR)},
        }
        replace_file(folder / "dataset.json", (json.dumps(description, indent=1) + "\n").encode())


def _texts(paths: Sequence[str], field: str) -> Iterator[str]:
    """The packed texts, or evenly spread ones if they are more than a tokenizer needs."""
    shards = Shards(paths, field)
    for v in range(0, shards.n, -(-int(shards.sizes.sum()) // TOKENIZER_SAMPLE) or 1):
        yield shards.read(v).decode()
    shards.close()


def _pattern(writer: ShardWriter) -> str | None:
    """The shards of a split as one spec, relative to the dataset's folder."""
    last = len(writer.paths) - 1
    numbers = "000000" if last == 0 else f"{{000000..{last:06d}}}"
    return f"{writer.prefix}-{numbers}.tar" if writer.paths else None


def tokenizer_recipe(spec: str) -> Callable[[Iterable[str]], str | None]:
    """What makes the tokenizer.json (None: there is none) from the train texts. Raises `ConfigError`."""
    if spec == "chars":
        return lambda texts: tokenization.train_chars(texts).to_str(pretty=True)
    if match := re.fullmatch(r"bpe:(\d+)", spec):
        size = tokenization.check_bpe_size(int(match[1]))
        return lambda texts: tokenization.train_bpe(texts, size).to_str(pretty=True)
    content = tokenization.load(spec).content
    return lambda texts: content


def pack_text(
    inputs: Sequence[Path],
    out: Path,
    *,
    tokenizer: str = "bpe:1024",
    validation: float = 0.05,
    field: str = "txt",
    split: str = "file",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Packs text files, or folders of them, into the dataset folder `out` (see `pack_documents`).

    `split`: what a document is (see `documents.SPLITS`). `validation`: share of the documents that a hash of
    their keys holds out. Raises one `ConfigError` with all that is wrong with the arguments.
    """
    problems: list[str] = []
    if split not in SPLITS:
        problems.append(f"split: {split!r} is none of {', '.join(SPLITS)}")
    if not 0 <= validation < 1:
        problems.append(f"validation: a share from 0 to below 1, not {validation}")
    files = sources(inputs, problems)
    if problems:
        raise ConfigError(problems)
    pack_documents(
        (document for source in files for document in read(source, split)),
        out,
        tokenizer=tokenizer,
        held_out=(lambda key: random_key("validation", key) < validation * 2**63) if validation else None,
        field=field,
        shard_bytes=shard_bytes,
        source_names=[source.path.name for source in files],
    )
