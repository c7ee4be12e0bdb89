"""The token line of a data set: all its documents as tokens, in stored order, each ended by the separator.

Text is encoded once, shard by shard, into flat files in the cache folder: known by a checksum of the text, checked by
one of their own. Shards of token ids (`data.field=u16` or `u32`) are read as they are. Either way the length of every
document is known before the first step, which is what lets a sequence be cut out of the line at any place without
reading what lies before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.data import array_cache
from trainer.data.bad_data import BadData
from trainer.data.recent_cache import RecentCache
from trainer.data.shards import Shards
from trainer.data.shared_work import ALONE, WorkSharing
from trainer.data.storage import is_remote, is_url, shown
from trainer.data.storage.urls import PIPE, absolute, local_path, scheme
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError, DataError
from trainer.files import move, read_file, replace_file, stat_file, sync
from trainer.outage import tell

FORMAT = "onecurve-tokens-4"
STORED: dict[str | None, np.dtype[Any]] = {
    "u16": np.dtype("<u2"),
    "u32": np.dtype("<u4"),
}  # fields whose members are token ids already
_FORESEEN = 1024  # samples between two hints
_COPIES = 64  # files of one content that are remembered

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


class _Told(NamedTuple):
    """What all ranks know of a shard's tokens: how many, and the checksums of them and of the texts; empty for ids."""

    tokens: int
    sha256: str
    content: str


class TokenLine:
    """`total` tokens; those of shard s are [`starts`[s], `starts`[s + 1]). `faults`: damaged shards and texts.

    A document that is not UTF-8 raises DataError, or with `tolerant` has no tokens and is among `faults`. Each rank
    of `team` encodes its shards; errors are raised on all. Any thread may read.
    """

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        cache: Path,
        *,
        tolerant: bool = False,
        team: WorkSharing = ALONE,
    ):
        self.shards, self._tokenizer, self._cache, self._tolerant = shards, tokenizer, cache, tolerant
        self._stored = STORED.get(shards.field)
        self._dtype: np.dtype[Any] = self._stored or np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._open: RecentCache[_Shard] = RecentCache()
        self._checked: set[int] = set()  # shards whose kept tokens this process, or the one it comes from, has compared
        summaries = team.share("tokens of shards", list(range(len(shards.urls))), self._prepare)
        self._told = [_Told(*told) for told, *_ in summaries]
        self.starts = np.cumsum([0] + [told.tokens for told in self._told], dtype=np.int64)
        self.total = int(self.starts[-1])
        what = json.dumps([shards.fingerprint, [[told.tokens, told.sha256] for told in self._told]])
        self.fingerprint = hashlib.sha256(what.encode()).hexdigest()
        self.faults = [*shards.faults, *(BadData(**fault) for _, faults, _ in summaries for fault in faults)]
        if team.rank == 0 and (spelt := sum(special for *_, special in summaries)):
            tell(
                f"special tokens are spelt out {spelt:,} times in the texts, and taken for ordinary text; as tokens by "
                "data.special_tokens=true"
            )

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

    def _prepare(self, number: int) -> tuple[_Told, list[dict[str, Any]], int]:
        """What is to be known of a shard's tokens, its faults, and how many special tokens are text in it."""
        if self._stored is not None:
            self._check_tokenizer(self.shards.urls[number])
            sizes = self.shards.sizes(number)
            place, width = shown(self.shards.urls[number]), self._stored.itemsize
            faults = []
            for i in np.flatnonzero(sizes % width).tolist():
                key = self.shards.keys(number)[i]
                cause = f"{place}: sample {key!r}: {sizes[i]} bytes are not a whole number of {width}-byte token ids"
                faults.append(vars(BadData(place, key, None, cause)))
                if not self._tolerant:
                    raise DataError(cause, shard=place, key=key)
            return _Told(int(self._counts(number).sum()), "", ""), faults, 0
        content = self._content(number)
        about = (self._about(number, content) if content is not None else None) or self._encode(number)
        if about["faults"] and not self._tolerant:
            fault = about["faults"][0]
            raise DataError(fault["cause"], **{name: fault[name] for name in ("shard", "key", "byte")})
        return _Told(about["tokens"], about["sha256"], about["content"]), about["faults"], about["special"]

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
        told = self._told[number]
        shard = self._opened(number) if self._about(number, told.content) is not None else None
        if shard is None:  # gone, or another than what was kept: made anew, once
            about = self._encode(number)
            if (about["tokens"], about["sha256"]) != told[:2]:
                place = shown(self.shards.urls[number])
                raise DataError(f"{place}: gives other tokens than when the run began; restore it", shard=place)
            self._told[number] = told._replace(content=about["content"])
            shard = self._opened(number)
        if shard is None:
            raise ConfigError(f"data.cache={self._cache}: does not keep what is written there")
        return shard

    def _opened(self, number: int) -> _Shard | None:
        """The kept tokens of a shard, mapped; None if they are not what all ranks were told of."""
        path, told = self._path(number, self._told[number].content), self._told[number]
        ends = array_cache.load_array(self.beside(number, "ends.npy"))
        with suppress(FileNotFoundError, ValueError):
            flat: npt.NDArray[Any] = np.empty(0, self._dtype)
            if told.tokens:
                flat = array_cache.map_array(path, lambda: np.memmap(path, self._dtype, "r", shape=(told.tokens,)))
            whole = number in self._checked or hashlib.sha256(flat.data).hexdigest() == told.sha256
            if whole and ends is not None:
                self._checked.add(number)
                return _Shard(ends, flat, lambda i: flat)
        tell(f"{path}: the kept tokens of {shown(self.shards.urls[number])} are damaged: encoding it anew")
        return None

    def _counts(self, number: int) -> Numbers:
        """Tokens of each document of a shard of token ids; none of one that is not a whole number of them."""
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
        return self._path(number, self._told[number].content).with_suffix(f".{what}")

    def _path(self, number: int, content: str) -> Path:
        """Where the tokens of a shard are kept: named by all that they depend on."""
        return self._named(number, self._tokenizer.fingerprint, content).with_suffix(".tokens")

    def _named(self, number: int, *more: str) -> Path:
        url, summary = self.shards.urls[number], self.shards.summaries[number]
        what = [FORMAT, absolute(url), summary.stamp, summary.digest, self.shards.field, *more]
        name = hashlib.sha256(json.dumps(what).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self._cache / "tokens" / name

    def _content(self, number: int) -> str | None:
        """The checksum of a shard's texts; None where none of this shard was ever taken.

        It is kept with the file that it was taken of. Size and time do not tell files apart (`cp -p`, archives and
        images of containers keep times), inode and time of change do: of another file it is taken anew.
        """
        file = _file(self.shards.urls[number])
        try:
            about = json.loads(read_file(self._named(number).with_suffix(".texts")))
            content, files = str(about["sha256"]), list(about["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if file is None or file in files or number in self.shards.damaged_since:
            return content
        first, digest = int(self.shards.starts[number]), hashlib.sha256()
        for sample in range(first, int(self.shards.starts[number + 1])):
            digest.update(self.shards.read(sample))
        found = digest.hexdigest()
        with suppress(OSError):  # a cache that is only read
            self._remember(number, found, [*files, file] if found == content else [file])
        return found

    def _remember(self, number: int, content: str, files: list[str]) -> None:
        about = {"sha256": content, "files": files[-_COPIES:]}
        replace_file(self._named(number).with_suffix(".texts"), json.dumps(about).encode())

    def _about(self, number: int, content: str) -> dict[str, Any] | None:
        """What is kept of a shard of this content: {"tokens", "faults", "special", "sha256", "content"}; or None."""
        path = self._path(number, content)
        with suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads(read_file(path.with_suffix(".json")))
            if stat_file(path).st_size == about["tokens"] * self._dtype.itemsize and about["content"] == content:
                return about
        return None

    def _encode(self, number: int) -> dict[str, Any]:
        """Encodes a shard: tokens and where documents end first, what is there last, each whole or not at all.

        What is not text is kept as a fault, for good. What cannot be read now is an error: it may be readable later.
        """
        place, file = shown(self.shards.urls[number]), _file(self.shards.urls[number])
        if number in self.shards.damaged_since:
            gone = "its tokens are no longer in data.cache"
            raise DataError(f"{place}: was damaged since the run began, and {gone}; restore the shard", shard=place)
        lengths, faults, special, texts, digest = [], [], 0, hashlib.sha256(), hashlib.sha256()
        beside = self._cache / "tokens" / f".{uuid.uuid4().hex}.tmp"
        try:
            beside.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "xb") as out:
                first = int(self.shards.starts[number])
                for sample in range(first, int(self.shards.starts[number + 1])):
                    if (sample - first) % _FORESEEN == 0:
                        self.shards.foresee_from(sample)
                    texts.update(content := self.shards.read(sample))
                    if isinstance(text := self._text(sample, content), BadData):
                        faults.append(vars(text))
                        lengths.append(0)
                        continue
                    ids = np.append(self._tokenizer.encode(text), self._tokenizer.separator).astype(self._dtype)
                    digest.update(ids.data)
                    out.write(ids.data)
                    lengths.append(len(ids))
                    special += self._tokenizer.count_special(text)
                out.flush()
                sync(out.fileno())
            content_sha256 = texts.hexdigest()
            about: dict[str, Any] = {"tokens": sum(lengths), "faults": faults, "special": special}
            about |= {"sha256": digest.hexdigest(), "content": content_sha256}
            path = self._path(number, content_sha256)
            move(beside, path)
            array_cache.save_array(path.with_suffix(".ends.npy"), np.cumsum(lengths, dtype=np.int64))
            replace_file(path.with_suffix(".json"), json.dumps(about).encode())
            self._remember(number, content_sha256, [file] if file else [])
            return about
        except OSError as error:
            raise ConfigError(f"data.cache={self._cache}: tokens cannot be kept there: {error.strerror}") from error
        finally:
            with suppress(OSError):
                beside.unlink()

    def _text(self, sample: int, content: bytes | memoryview) -> str | BadData:
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError as error:
            number, i = self.shards.locate(sample)
            shard, key, index = self.shards.path(sample), self.shards.name(sample)[1], self.shards.index(number)
            byte = index.members(i)[self.shards.field or ""][0] + error.start
            cause = f"{shard}: byte {byte}: sample {key!r} is not UTF-8 text"
            return BadData(shard, key, byte, cause)


@lru_cache(maxsize=64)
def _packed_with(folder: str) -> dict[str, str]:
    """Returns by shard the fingerprint of the tokenizer that made its ids, if a dataset.json in the folder says so."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        told = json.loads(read_file(Path(folder, "dataset.json")))
        return dict.fromkeys(told["sha256"], told["tokenizer"]["fingerprint"])
    return {}


def _file(url: str) -> str | None:
    """What no other file of this name ever shares, whatever times were copied with it; None where the stamp is made of
    the content."""
    if is_remote(url) or url.startswith(PIPE):
        return None
    with suppress(OSError, ValueError):
        now = stat_file(local_path(url))
        return f"{now.st_ino}-{now.st_ctime_ns}"
    return None
