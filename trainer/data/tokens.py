"""The token line of a data set: all its documents as tokens, in stored order, each ended by the separator.

Text is encoded once, shard by shard, into flat files in the cache folder; shards of token ids (`data.field=u16` or
`u32`) are read as they are. Either way the length of every document is known before the first step, which is what lets
a sequence be cut out of the line at any place without reading what lies before it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.faults import Fault
from trainer.data.recent import Recent
from trainer.data.shards import Shards
from trainer.data.storage import is_url, shown
from trainer.data.storage.urls import local_path, scheme
from trainer.data.team import ALONE, Team
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError, DataError
from trainer.files import move, read_file, replace_file, stat_file, sync
from trainer.outage import CANNOT_MAP, Patience, patiently

FORMAT = "onecurve-tokens-3"
STORED: dict[str | None, np.dtype[Any]] = {
    "u16": np.dtype("<u2"),
    "u32": np.dtype("<u4"),
}  # fields whose members are token ids already
OPEN_SHARDS = 1024
_FORESEEN = 1024  # samples between two hints

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Shard:
    """The tokens of one shard: where each document ends (int64 [documents], rising), and all of them in a row, or the
    reader of one document's."""

    ends: Numbers
    flat: npt.NDArray[Any] | None
    document: Callable[[int], npt.NDArray[Any]]

    def read(self, first: int, end: int) -> npt.NDArray[Any]:
        if self.flat is not None:
            return self.flat[first:end]
        parts = []
        document = int(np.searchsorted(self.ends, first, side="right"))
        while first < end:
            begin = int(self.ends[document - 1]) if document else 0
            stop = min(int(self.ends[document]), end)
            parts.append(self.document(document)[first - begin : stop - begin])
            first, document = stop, document + 1
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


class TokenLine:
    """`total` tokens; those of shard s are [`starts`[s], `starts`[s + 1]). `faults`: damaged shards and texts.

    A document that is no UTF-8 raises DataError, or with `tolerant` has no tokens and is among `faults`. Each rank
    of `team` encodes its shards; errors are raised on all. Any thread may read.
    """

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        cache: Path,
        *,
        tolerant: bool = False,
        team: Team = ALONE,
    ):
        self.shards, self._tokenizer, self._cache, self._tolerant = shards, tokenizer, cache, tolerant
        self._stored = STORED.get(shards.field)
        self._dtype: np.dtype[Any] = self._stored or np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._open: Recent[_Shard] = Recent(OPEN_SHARDS)
        summaries = team.share("tokens of shards", list(range(len(shards.urls))), self._prepare)
        self._told = [(tokens, digest) for tokens, _, digest in summaries]
        self.starts = np.cumsum([0] + [tokens for tokens, _, _ in summaries], dtype=np.int64)
        self.total = int(self.starts[-1])
        told = json.dumps([shards.fingerprint, [[tokens, digest] for tokens, _, digest in summaries]])
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()
        self.faults = [*shards.faults, *(Fault(**fault) for _, faults, _ in summaries for fault in faults)]

    def read(self, first: int, count: int) -> npt.NDArray[Any]:
        """The tokens [first, first + count) of the line, fewer at its end; unsigned [<= count]."""
        end, parts = min(first + count, self.total), []
        shard = int(np.searchsorted(self.starts, first, side="right")) - 1
        while first < end:
            stop, base = min(end, int(self.starts[shard + 1])), int(self.starts[shard])
            parts.append(self.shard(shard).read(first - base, stop - base))
            first, shard = stop, shard + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self._dtype)

    def documents(self, first: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """The documents within tokens [first, end) of the line: (shard, document, first token, end token) of each."""
        shard = int(np.searchsorted(self.starts, first, side="right")) - 1
        while first < end:
            base, ends = int(self.starts[shard]), self.shard(shard).ends
            document = int(np.searchsorted(ends, first - base, side="right"))
            while first < end and document < len(ends):
                begin = base + (int(ends[document - 1]) if document else 0)
                stop = min(end, base + int(ends[document]))
                if stop > first:  # not one without tokens
                    yield shard, document, first - begin, stop - begin
                first, document = stop, document + 1
            shard += 1

    @property
    def foresees(self) -> bool:
        """Whether it helps to tell what will be read soon."""
        return self._stored is not None and self.shards.remote

    def foresee(self, first: int, end: int) -> None:
        """A hint that these tokens of the line will be read soon."""
        found = [self.shards.starts[shard] + document for shard, document, _, _ in self.documents(first, end)]
        self.shards.foresee(np.array(found, np.int64))

    def shard(self, number: int) -> _Shard:
        return self._open.get(number, self._load)

    def _prepare(self, number: int) -> tuple[int, list[dict[str, Any]], str]:
        """Number of tokens and faults of a shard, and the checksum of its tokens where it is known."""
        if self._stored is not None:
            self._check_tokenizer(self.shards.urls[number])
            sizes = self.shards.sizes(number)
            place, width = shown(self.shards.urls[number]), self._stored.itemsize
            faults = []
            for i in np.flatnonzero(sizes % width).tolist():
                key = self.shards.keys(number)[i]
                cause = f"{place}: sample {key!r}: {sizes[i]} bytes are no whole number of {width}-byte token ids"
                faults.append(vars(Fault(place, key, None, cause)))
                if not self._tolerant:
                    raise DataError(cause, shard=place, key=key)
            return int(self._counts(number).sum()), faults, ""
        about = self._about(number)
        if about["faults"] and not self._tolerant:
            fault = about["faults"][0]
            raise DataError(fault["cause"], **{name: fault[name] for name in ("shard", "key", "byte")})
        return about["tokens"], about["faults"], about["sha256"]

    def _check_tokenizer(self, url: str) -> None:
        """Raises ConfigError if packing said that the token ids of a shard are another tokenizer's: most would be valid
        ids here, and mean something else."""
        if is_url(url) and scheme(url) != "file":
            return
        folder, name = os.path.split(local_path(url))
        if _packed_with(folder).get(name, self._tokenizer.fingerprint) != self._tokenizer.fingerprint:
            its = os.path.join(folder, "tokenizer.json")
            remedy = f"set data.tokenizer={its}" if os.path.exists(its) else "give the one it was packed with"
            raise ConfigError(f"data.tokenizer: {folder} holds token ids of another tokenizer; {remedy}")

    def _load(self, number: int) -> _Shard:
        if self._stored is not None:
            first = int(self.shards.starts[number])
            return _Shard(np.cumsum(self._counts(number)), None, lambda i: self._stored_ids(first + i))
        about, path, beside = self._about(number), self._path(number), self.beside(number, "ends.npy")
        if (about["tokens"], about["sha256"]) != self._told[number]:  # made anew, elsewhere or by another life
            place = shown(self.shards.urls[number])
            raise DataError(f"{place}: gives other tokens than when the run began; restore it", shard=place)
        ends = _mapped(beside, lambda: np.load(beside, mmap_mode="r", allow_pickle=False))
        flat: npt.NDArray[Any] = np.empty(0, self._dtype)
        if about["tokens"]:
            flat = _mapped(path, lambda: np.memmap(path, self._dtype, "r", shape=(about["tokens"],)))
        return _Shard(np.asarray(ends), flat, lambda i: flat)

    def _counts(self, number: int) -> Numbers:
        """Tokens of each document of a shard of token ids; none of one that is no whole number of them."""
        assert self._stored is not None
        sizes = self.shards.sizes(number)
        return np.where(sizes % self._stored.itemsize, 0, sizes // self._stored.itemsize)

    def _stored_ids(self, sample: int) -> npt.NDArray[Any]:
        """DataError if they are none of the tokenizer's."""
        assert self._stored is not None
        content = self.shards.read(sample)
        if len(content) % self._stored.itemsize:  # among the faults already
            return np.empty(0, self._stored)
        ids = np.frombuffer(content, self._stored)
        if len(ids) and int(ids.max()) >= self._tokenizer.vocab_size:
            place, key = self.shards.path(sample), self.shards.name(sample)[1]
            wrong = f"token id {ids.max()}, but data.tokenizer has {self._tokenizer.vocab_size} tokens"
            raise DataError(f"{place}: sample {key!r}: {wrong}", shard=place, key=key)
        return ids

    def beside(self, number: int, what: str) -> Path:
        """Where something that follows from the tokens of a shard is kept."""
        return self._path(number).with_suffix(f".{what}")

    def _path(self, number: int) -> Path:
        """Where the tokens of a shard are kept: named by all that they depend on."""
        what: list[str | None] = [
            FORMAT,
            self.shards.urls[number],
            self.shards.summaries[number].stamp,
            self.shards.summaries[number].digest,
        ]
        what += [self.shards.field, self._tokenizer.fingerprint]
        name = hashlib.sha256(json.dumps(what).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self._cache / "tokens" / f"{name}.tokens"

    def _about(self, number: int) -> dict[str, Any]:
        """What is kept of a shard: {"tokens", "faults", "sha256"}; made if it is not there."""
        path = self._path(number)
        with suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads(read_file(path.with_suffix(".json")))
            if stat_file(path).st_size == about["tokens"] * self._dtype.itemsize:
                return about
        if number in self.shards.damaged_since:
            place, gone = shown(self.shards.urls[number]), "its tokens are no longer in data.cache"
            raise DataError(f"{place}: was damaged since the run began, and {gone}; restore the shard", shard=place)
        return self._encode(number, path)

    def _encode(self, number: int, path: Path) -> dict[str, Any]:
        """Encodes a shard: tokens and where documents end first, what is there last, each whole or not at all.

        What is no text is kept as a fault, for good. What cannot be read now is an error: it may be readable later.
        """
        lengths, faults, digest = [], [], hashlib.sha256()
        beside = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "xb") as file:
                first = int(self.shards.starts[number])
                for sample in range(first, int(self.shards.starts[number + 1])):
                    if (sample - first) % _FORESEEN == 0:
                        self.shards.foresee_from(sample)
                    if isinstance(ids := self._ids(sample), Fault):
                        faults.append(vars(ids))
                        lengths.append(0)
                        continue
                    content = ids.tobytes()
                    digest.update(content)
                    file.write(content)
                    lengths.append(len(ids))
                file.flush()
                sync(file.fileno())
            move(beside, path)
            packed = io.BytesIO()
            np.save(packed, np.cumsum(lengths, dtype=np.int64), allow_pickle=False)
            replace_file(self.beside(number, "ends.npy"), packed.getbuffer())
            about = {"tokens": sum(lengths), "faults": faults, "sha256": digest.hexdigest()}
            replace_file(path.with_suffix(".json"), json.dumps(about).encode())
            return about
        except OSError as error:
            raise ConfigError(f"data.cache={self._cache}: tokens cannot be kept there: {error.strerror}") from error
        finally:
            with suppress(OSError):
                beside.unlink()

    def _ids(self, sample: int) -> npt.NDArray[Any] | Fault:
        content = self.shards.read(sample)
        try:
            text = str(content, "utf-8")
        except UnicodeDecodeError as error:
            number, i = self.shards.locate(sample)
            shard, key, index = self.shards.path(sample), self.shards.name(sample)[1], self.shards.index(number)
            byte = index.members(i)[self.shards.field or ""][0] + error.start
            cause = f"{shard}: byte {byte}: sample {key!r} is not UTF-8 text"
            return Fault(shard, key, byte, cause)
        return np.append(self._tokenizer.encode(text), self._tokenizer.separator).astype(self._dtype)


def _mapped(path: Path, load: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Returns a file of the cache as memory, once its storage answers. Raises ConfigError where that maps no files."""

    def attempt() -> npt.NDArray[Any]:
        try:
            return load()
        except OSError as error:
            if error.errno in CANNOT_MAP:
                place = "its file system cannot map files into memory; choose a folder on another one"
                raise ConfigError(f"data.cache: {path}: {place}") from error
            raise

    return patiently(attempt, Patience(str(path), str(path)))


@lru_cache(maxsize=64)
def _packed_with(folder: str) -> dict[str, str]:
    """By shard: the fingerprint of the tokenizer whose ids it holds, as far as a dataset.json in the folder tells."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        told = json.loads(read_file(Path(folder, "dataset.json")))
        return dict.fromkeys(told["sha256"], told["tokenizer"]["fingerprint"])
    return {}
