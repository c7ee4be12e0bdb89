"""Packing files into a data set: in parallel, resumable, and the same bytes whatever the number of processes.

Inputs are parted into pieces by their bytes alone (`pack_request`); `assemble` makes the shards of them.
All is written to a folder `.NAME.partial` beside the data set NAME, from which a killed command goes on.
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
_TOLD = 5  # documents that were left out, of which is told why
_VERSION = 2  # of what is in a work folder

ReportProgress = Callable[[str, int, int], None]


def pack_inputs(
    inputs: Sequence[Path],
    out: Path,
    options: Options,
    *,
    workers: int = 1,
    restart: bool = False,
    report: ReportProgress = lambda what, done, total: None,
    piece_bytes: int = PIECE_BYTES,
) -> list[Path]:
    """Makes the data set folder `out`: train and validation shards with their indexes, `dataset.json`, and
    `tokenizer.json` (text) or `classes.json` (images). Returns the files in the given folders that were left out.

    Goes on from what a killed call with the same inputs and options left; with `restart`, anew. `report`: is told what
    is being done, how much of it is done, and how much there is. Raises `ConfigError`: bad options and inputs, of which
    nothing is left; `out` exists, is being packed by another process, or was begun with other inputs or options.
    """
    out = Path(os.path.abspath(out.expanduser()))
    write.check_free(out)
    if problems := options.problems():
        raise ConfigError(problems)
    found = find_files(inputs, options, piece_bytes)
    make = write.tokenizer_recipe(options.tokenizer, options.separator) if found.texts else None
    described = (
        options.tokenizer if make is None or write.TRAINED.fullmatch(options.tokenizer) else make([]).fingerprint
    )
    identity = identity_of([_VERSION, piece_bytes, found.identity, asdict(options), described])
    with _work_folder(out, identity, restart) as work:
        assemble.prepare(work)
        encode, tokenizer = None, None
        if make is not None:
            kept = work / "tokenizer.json"
            made = tokenization.load(str(kept)) if kept.exists() else make(_some_texts(found.texts, options, report))
            tokenizer = write.save_tokenizer(work, options.tokenizer, made)
            encode = Encode(options, str(kept) if kept.exists() else "bytes")
        with Workers(workers) as pool:
            splits, counts, digests = _shards(work, found, options, encode, pool, report)
        write.check_splits({split: sums["samples"] for split, sums in splits.items()}, options.validation > 0)
        skipped = [assemble.skipped(work, number) for number in range(len(found.texts))]
        _finish(work, found, encode, tokenizer, splits, counts, digests, skipped)
        write.publish(work / assemble.SHARDS, out)
    return found.left_out


def _some_texts(pieces: Sequence[Text], options: Options, report: ReportProgress) -> Iterator[str]:
    """Train texts for a tokenizer: all, or of each piece its share of what a tokenizer needs."""
    total, done = sum(piece.size for piece in pieces), 0
    for piece in pieces:
        report("reading for the tokenizer", done, total)
        left = write.TOKENIZER_SAMPLE * piece.size // max(total, 1)
        for document, _ in piece.documents(options.cut, options.skips([])):
            if options.split_of(document.key) == "train":
                yield document.text
                left -= len(document.text)
            if left < 0:
                break
        done += piece.size
        report("reading for the tokenizer", done, total)


@dataclass(frozen=True)
class Encode:
    """Documents to samples. `tokenizer`: what `tokenizer.load` takes."""

    options: Options
    tokenizer: str

    @property
    def field(self) -> str:
        """Name of the member."""
        if not self.options.tokenize:
            return self.options.field
        return "u16" if _tokenizer(self.tokenizer).vocab_size <= 1 << 16 else "u32"

    def sample(self, document: Document, others: bytes | None) -> assemble.Sample:
        content, field = document.text.encode(), self.field
        counts, members = {"bytes": len(content), "chars": len(document.text)}, {field: content}
        if self.options.tokenize:
            tokenizer = _tokenizer(self.tokenizer)
            ids = np.append(tokenizer.encode(document.text), tokenizer.separator)
            members[field] = ids.astype("<u2" if field == "u16" else "<u4").tobytes()
            counts["tokens"] = len(ids)
        if others is not None:
            members["json"] = others
        return self.options.split_of(document.key), document.key, members, counts


@lru_cache(maxsize=1)
def _tokenizer(spec: str) -> tokenization.Tokenizer:
    return tokenization.load(spec)


def _write_text(work: Path, number: int, piece: Text, encode: Encode) -> None:
    skipped: list[str] = []
    found = piece.documents(encode.options.cut, encode.options.skips(skipped))
    assemble.write_piece(work, number, (encode.sample(document, others) for document, others in found), skipped)


def _write_pictures(work: Path, number: int, piece: Pictures, options: Options) -> None:
    samples = (
        (options.split_of(key), key, members, {"bytes": sum(map(len, members.values()))})
        for key, members in piece.samples()
    )
    assemble.write_piece(work, number, samples)


def _shards(
    work: Path, found: FoundFiles, options: Options, encode: Encode | None, pool: Workers, report: ReportProgress
) -> tuple[dict[str, dict[str, int]], dict[str, int], dict[str, str]]:
    """Makes all shards. What is counted of each split, how many shards it has, and the sha256 of each."""
    pieces: Sequence[Text | Pictures] = found.texts or found.pictures
    if encode is not None:
        made = pool.in_order(_write_text, ((work, n, piece, encode) for n, piece in enumerate(found.texts)))
    else:
        made = pool.in_order(_write_pictures, ((work, n, piece, options) for n, piece in enumerate(found.pictures)))
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
        """Takes in the shards that are done, and drops the bodies that no other shard needs."""
        while running and (wait or running[0][1].done()):
            shard, future = running.pop(0)
            digests.update([result(future)])
            for span in shard.spans:
                uses[span.piece, shard.split] -= 1
                if not uses[span.piece, shard.split]:
                    assemble.drop_body(work, span.piece, shard.split)

    done = 0
    for number, _ in enumerate(made):
        about, ends = assemble.counted(work, number)
        for split, cutter in cutters.items():
            if split not in about:
                continue
            for what, amount in about[split]["counts"].items():
                splits[split][what] += amount
            cuts = list(cutter.add(number, ends[split]))
            uses[number, split] += len(cuts)
            for _, shard in cuts:
                begin(shard)
        settle(wait=False)
        done += pieces[number].size
        report("packing", done, found.size)
    for cutter in cutters.values():
        begin(cutter.rest())
    settle(wait=True)
    return splits, {split: cutter.number for split, cutter in cutters.items()}, digests


def _finish(
    work: Path,
    found: FoundFiles,
    encode: Encode | None,
    tokenizer: dict[str, Any] | None,
    splits: dict[str, dict[str, int]],
    counts: dict[str, int],
    digests: dict[str, str],
    skipped: Sequence[tuple[int, list[str]]],
) -> None:
    """Puts what goes beside the shards into their folder."""
    folder = work / assemble.SHARDS
    assemble.prepare(work)
    first = {} if encode is None else {"field": encode.field}
    more: dict[str, Any] = {"sources": found.names}
    if left_out := sum(count for count, _ in skipped):
        causes = [cause for _, some in skipped for cause in some]
        more |= {"skipped": {"documents": left_out, "such_as": causes[:_TOLD]}}
    if tokenizer is not None:
        more = {"tokenizer": tokenizer, **more}
        for path in sorted(work.glob("tokenizer*.json")):
            replace_file(folder / path.name, path.read_bytes())
    if found.classes:
        more = {"classes": len(found.classes), **more}
        replace_file(folder / "classes.json", (json.dumps(found.classes, indent=1) + "\n").encode())
    write.describe(folder, first, splits, counts, more, digests)


@contextmanager
def _work_folder(out: Path, identity: str, restart: bool) -> Iterator[Path]:
    """The folder that work of this identity is done in, for one process at a time. It is gone at the end, unless the
    work can go on from what is in it."""
    place = out.with_name(f".{out.name}.partial")
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _locked(place, out):
            write.check_free(out)
            for other in place.iterdir() if restart else ():
                if other.is_dir():
                    assemble.discard(other)
            if others := [path for path in place.iterdir() if path.is_dir() and path.name != identity]:
                raise ConfigError(
                    f"{others[0].parent}: was left by a command with other arguments or inputs; repeat that one, or "
                    "drop what it left with --restart"
                )
            try:
                yield place / identity
            except ConfigError:
                _remove(place, identity)
                raise
            _remove(place, identity)
    except OSError as error:
        kept = f"; what is finished is kept, run the same command again to go on ({place})" if place.is_dir() else ""
        raise ConfigError(f"{out}: {locks.refused(error)}{kept}") from error


def _remove(place: Path, identity: str) -> None:
    """Deletes the work as far as that goes: the data set is there, or why there is none is being told."""
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
