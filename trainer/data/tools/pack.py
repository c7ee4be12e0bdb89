"""Packs files into a data set: in parallel, resumable, and the same bytes for any number of processes.

Inputs are split into pieces by their bytes alone (`pack_request`); `assemble` makes the shards from them. Everything is
written to a folder `.NAME.partial` next to the data set NAME, from which a killed command resumes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout

from trainer import locks
from trainer.data import tokenizer as tokenization
from trainer.data.tools import assemble, write
from trainer.data.tools.documents import Document
from trainer.data.tools.image_folders import Pictures
from trainer.data.tools.pack_request import FoundFiles, Options, Text, find_files, identity_of
from trainer.data.tools.parallel import Workers, result
from trainer.data.tools.write import SPLITS
from trainer.errors import ConfigError
from trainer.files import replace_file

PIECE_BYTES = 16 << 20
_CAUSES_SHOWN = 5  # causes in dataset.json, of the documents that were left out
_VERSION = 2  # of the layout of a work folder

ReportProgress = Callable[[str, int, int], None]


def pack_inputs(
    inputs: Sequence[Path],
    out: Path,
    options: Options,
    *,
    workers: int = 1,
    restart: bool = False,
    report: ReportProgress = lambda activity, done, total: None,
    piece_bytes: int = PIECE_BYTES,
) -> list[Path]:
    """Creates the data set folder `out`: train and validation shards with their indexes, `dataset.json`, and
    `tokenizer.json` (text) or `classes.json` (images). Returns the files in the given folders that were left out.

    Resumes what a killed call with the same inputs and options left, unless `restart`. `report` is called with the
    activity, the amount done and the total. Raises `ConfigError` if options or inputs are bad (nothing is left then),
    if `out` exists, is being packed by another process, or was begun with other inputs or options.
    """
    out = Path(os.path.abspath(out.expanduser()))
    write.check_free(out)
    if problems := options.problems():
        raise ConfigError(problems)
    files = find_files(inputs, options, piece_bytes)
    make = write.tokenizer_recipe(options.tokenizer, options.separator) if files.texts else None
    tokenizer_identity = (
        options.tokenizer if make is None or write.TRAINED.fullmatch(options.tokenizer) else make([]).fingerprint
    )
    identity = identity_of([_VERSION, piece_bytes, files.identity, asdict(options), tokenizer_identity])
    with _work_folder(out, identity, restart) as work:
        assemble.prepare(work)
        encode, tokenizer_info = None, None
        if make is not None:
            tokenizer_path = work / "tokenizer.json"
            text_tokenizer = (
                tokenization.load(str(tokenizer_path))
                if tokenizer_path.exists()
                else make(_some_texts(files.texts, options, report))
            )
            tokenizer_info = write.save_tokenizer(work, options.tokenizer, text_tokenizer)
            encode = Encode(options, str(tokenizer_path) if tokenizer_path.exists() else "bytes")
        with Workers(workers) as pool:
            splits, counts, digests = _shards(work, files, options, encode, pool, report)
        write.check_splits({split: sums["samples"] for split, sums in splits.items()}, options.validation > 0)
        skipped = [assemble.skipped(work, number) for number in range(len(files.texts))]
        _finish(work, files, encode, tokenizer_info, splits, counts, digests, skipped)
        write.publish(work / assemble.SHARDS, out)
    return files.left_out


def _some_texts(pieces: Sequence[Text], options: Options, report: ReportProgress) -> Iterator[str]:
    """Yields train texts for a tokenizer: all, or from each piece its share of what a tokenizer needs."""
    total, done = sum(piece.size for piece in pieces), 0
    for piece in pieces:
        report("reading for the tokenizer", done, total)
        remaining = write.TOKENIZER_SAMPLE * piece.size // max(total, 1)
        for document, _ in piece.documents(options.split_options, options.skips([])):
            if options.split_of(document.key) == "train":
                yield document.text
                remaining -= len(document.text)
            if remaining < 0:
                break
        done += piece.size
        report("reading for the tokenizer", done, total)


@dataclass(frozen=True)
class Encode:
    """Encodes documents as samples. `tokenizer` is a spec for `tokenizer.load`."""

    options: Options
    tokenizer: str

    @property
    def field(self) -> str:
        """Returns the name of the member that holds the text."""
        if not self.options.tokenize:
            return self.options.field
        return "u16" if _tokenizer(self.tokenizer).vocab_size <= 1 << 16 else "u32"

    def sample(self, document: Document, other_fields: bytes | None) -> assemble.Sample:
        content, field = document.text.encode(), self.field
        counts, members = {"bytes": len(content), "chars": len(document.text)}, {field: content}
        if self.options.tokenize:
            tokenizer = _tokenizer(self.tokenizer)
            ids = np.append(tokenizer.encode(document.text), tokenizer.separator)
            members[field] = ids.astype("<u2" if field == "u16" else "<u4").tobytes()
            counts["tokens"] = len(ids)
        if other_fields is not None:
            members["json"] = other_fields
        return self.options.split_of(document.key), document.key, members, counts


@lru_cache(maxsize=1)
def _tokenizer(spec: str) -> tokenization.Tokenizer:
    return tokenization.load(spec)


def _write_text(work: Path, number: int, piece: Text, encode: Encode) -> None:
    skipped: list[str] = []
    documents = piece.documents(encode.options.split_options, encode.options.skips(skipped))
    assemble.write_piece(
        work, number, (encode.sample(document, other_fields) for document, other_fields in documents), skipped
    )


def _write_pictures(work: Path, number: int, piece: Pictures, options: Options) -> None:
    samples = (
        (options.split_of(key), key, members, {"bytes": sum(map(len, members.values()))})
        for key, members in piece.samples()
    )
    assemble.write_piece(work, number, samples)


def _shards(
    work: Path, files: FoundFiles, options: Options, encode: Encode | None, pool: Workers, report: ReportProgress
) -> tuple[dict[str, dict[str, int]], dict[str, int], dict[str, str]]:
    """Makes all shards. Returns the counts of each split, the number of its shards, and the sha256 of each shard."""
    pieces: Sequence[Text | Pictures] = files.texts or files.pictures
    if encode is not None:
        writes = pool.in_order(_write_text, ((work, n, piece, encode) for n, piece in enumerate(files.texts)))
    else:
        writes = pool.in_order(_write_pictures, ((work, n, piece, options) for n, piece in enumerate(files.pictures)))
    cutters = {split: assemble.Cutter(split, options.shard_bytes) for split in SPLITS}
    names = ("samples", "bytes", "chars", "tokens")[: 2 if encode is None else 4 if options.tokenize else 3]
    splits = {split: dict.fromkeys(names, 0) for split in SPLITS}
    digests: dict[str, str] = {}
    running: list[tuple[assemble.Shard, Future[tuple[str, str]]]] = []
    uses: Counter[tuple[int, str]] = Counter()

    def begin(shard: assemble.Shard | None) -> None:
        if shard is not None:
            running.append((shard, pool.submit(assemble.write_shard, work, shard)))

    def settle(wait: bool) -> None:
        """Collects the shards that are done, and drops the bodies that no other shard needs."""
        while running and (wait or running[0][1].done()):
            shard, future = running.pop(0)
            digests.update([result(future)])
            for span in shard.spans:
                uses[span.piece, shard.split] -= 1
                if not uses[span.piece, shard.split]:
                    assemble.drop_body(work, span.piece, shard.split)

    done = 0
    for number, _ in enumerate(writes):
        summaries, ends = assemble.counted(work, number)
        for split, cutter in cutters.items():
            if split not in summaries:
                continue
            for name, amount in summaries[split]["counts"].items():
                splits[split][name] += amount
            cuts = list(cutter.add(number, ends[split]))
            uses[number, split] += len(cuts)
            for _, shard in cuts:
                begin(shard)
        settle(wait=False)
        done += pieces[number].size
        report("packing", done, files.size)
    for cutter in cutters.values():
        begin(cutter.close_shard())
    settle(wait=True)
    return splits, {split: cutter.number for split, cutter in cutters.items()}, digests


def _finish(
    work: Path,
    files: FoundFiles,
    encode: Encode | None,
    tokenizer_info: dict[str, Any] | None,
    splits: dict[str, dict[str, int]],
    counts: dict[str, int],
    digests: dict[str, str],
    skipped: Sequence[tuple[int, list[str]]],
) -> None:
    """Writes the files that accompany the shards into their folder."""
    folder = work / assemble.SHARDS
    assemble.prepare(work)
    head = {} if encode is None else {"field": encode.field}
    tail: dict[str, Any] = {"sources": files.names}
    if left_out := sum(count for count, _ in skipped):
        causes = [cause for _, some in skipped for cause in some]
        tail |= {"skipped": {"documents": left_out, "such_as": causes[:_CAUSES_SHOWN]}}
    if tokenizer_info is not None:
        tail = {"tokenizer": tokenizer_info, **tail}
        for path in sorted(work.glob("tokenizer*.json")):
            replace_file(folder / path.name, path.read_bytes())
    if files.classes:
        tail = {"classes": len(files.classes), **tail}
        replace_file(folder / "classes.json", (json.dumps(files.classes, indent=1) + "\n").encode())
    write.describe(folder, head, splits, counts, tail, digests)


@contextmanager
def _work_folder(out: Path, identity: str, restart: bool) -> Iterator[Path]:
    """Yields the work folder of this identity, locked for one process. It is deleted at the end unless the work can
    resume from it."""
    place = out.with_name(f".{out.name}.partial")
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _locked(place, out):
            write.check_free(out)
            for old_work in place.iterdir() if restart else ():
                if old_work.is_dir():
                    assemble.discard(old_work)
            if leftovers := [path for path in place.iterdir() if path.is_dir() and path.name != identity]:
                raise ConfigError(
                    f"{leftovers[0].parent}: was left by a command with other arguments or inputs; repeat that one, or "
                    "drop what it left with --restart"
                )
            try:
                yield place / identity
            except ConfigError:
                _remove(place, identity)
                raise
            _remove(place, identity)
    except OSError as error:
        hint = f"; what is finished is kept, run the same command again to go on ({place})" if place.is_dir() else ""
        raise ConfigError(f"{out}: {locks.describe_refusal(error)}{hint}") from error


def _remove(place: Path, identity: str) -> None:
    """Deletes the work folder as far as possible: the data set exists, or an error is being raised."""
    with suppress(OSError):
        assemble.discard(place / identity)
    shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _locked(place: Path, out: Path) -> Iterator[None]:
    try:
        lock = locks.acquire(place / "lock")
    except (Timeout, FileNotFoundError):  # or just deleted
        problem = f"{out}: is being packed by another process ({place}){locks.holder(place / 'lock')}"
        raise ConfigError(problem) from None
    try:
        yield
    finally:
        lock.release()
