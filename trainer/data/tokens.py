"""The token line of a data set: all its documents as tokens, in stored order, each ended by the separator.

Text is encoded once, shard by shard, into flat files in the cache folder: named by a checksum of the text, verified by
a checksum of the tokens. Shards of token ids (`data.field=u16` or `u32`) are read as they are. Either way the length of
every document is known before the first step, so that a sequence can be cut out of the line at any place without
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
from trainer.outage import report

FORMAT = "onecurve-tokens-4"
STORED: dict[str | None, np.dtype[Any]] = {
    "u16": np.dtype("<u2"),
    "u32": np.dtype("<u4"),
}  # fields whose members are token ids already
_HINT_INTERVAL = 1024  # samples between two hints
_MAX_FILES = 64  # files of one content that are remembered

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Shard:
    """Holds the tokens of one shard: where each document ends (int64 [documents], rising), and all tokens in a row, or
    a function that reads those of one document."""

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


class _Encoding(NamedTuple):
    """Identifies a shard's tokens on all ranks: their number, and checksums of them and of the texts; empty for ids."""

    tokens: int
    sha256: str
    content: str


class TokenLine:
    """Reads `total` tokens; those of shard s are [`starts`[s], `starts`[s + 1]). `faults`: damaged shards and texts.

    A document that is not UTF-8 raises DataError, or with `tolerant` has no tokens and is among `faults`. Each rank
    of `team` encodes its shards; errors are raised on all ranks. It is thread-safe.
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
        self._checked: set[int] = set()  # shards whose cached tokens this process, or its parent, has verified
        summaries = team.share("tokens of shards", list(range(len(shards.urls))), self._prepare)
        self._encodings = [_Encoding(*encoding) for encoding, *_ in summaries]
        self.starts = np.cumsum([0] + [encoding.tokens for encoding in self._encodings], dtype=np.int64)
        self.total = int(self.starts[-1])
        content = json.dumps([shards.fingerprint, [[encoding.tokens, encoding.sha256] for encoding in self._encodings]])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        self.faults = [*shards.faults, *(BadData(**fault) for _, faults, _ in summaries for fault in faults)]
        if team.rank == 0 and (num_special := sum(special for *_, special in summaries)):
            report(
                f"special tokens are spelled out {num_special:,} times in the texts, and taken for ordinary text; as "
                "tokens by data.special_tokens=true"
            )

    def read(self, first: int, count: int) -> npt.NDArray[Any]:
        """Reads the tokens [first, first + count) of the line, fewer at its end; unsigned [<= count]."""
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
        """Yields the documents within tokens [first, end) of the line: (shard, document, first token, end token)."""
        shard = int(np.searchsorted(self.starts, first, side="right")) - 1
        while first < end:
            base, ends = int(self.starts[shard]), self.shard(shard).ends
            document = int(np.searchsorted(ends, first - base, side="right"))
            while first < end and document < len(ends):
                begin = base + (int(ends[document - 1]) if document else 0)
                stop = min(end, base + int(ends[document]))
                if stop > first:  # skip documents without tokens
                    yield shard, document, first - begin, stop - begin
                first, document = stop, document + 1
            shard += 1

    @property
    def foresees(self) -> bool:
        """Returns whether hints of what will be read soon help."""
        return self._stored is not None and self.shards.remote

    def foresee(self, first: int, end: int) -> None:
        """Hints that these tokens of the line will be read soon."""
        samples = [self.shards.starts[shard] + document for shard, document, _, _ in self.documents(first, end)]
        self.shards.foresee(np.array(samples, np.int64))

    def shard(self, number: int) -> _Shard:
        return self._open.get(number, self._load)

    def _prepare(self, number: int) -> tuple[_Encoding, list[dict[str, Any]], int]:
        """Returns the encoding of a shard, its faults, and how many special tokens are spelled out in its texts."""
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
            return _Encoding(int(self._counts(number).sum()), "", ""), faults, 0
        content = self._content_checksum(number)
        metadata = (self._read_metadata(number, content) if content is not None else None) or self._encode(number)
        if metadata["faults"] and not self._tolerant:
            fault = metadata["faults"][0]
            raise DataError(fault["cause"], **{name: fault[name] for name in ("shard", "key", "byte")})
        return (
            _Encoding(metadata["tokens"], metadata["sha256"], metadata["content"]),
            metadata["faults"],
            metadata["special"],
        )

    def _check_tokenizer(self, url: str) -> None:
        """Raises ConfigError if the shard's token ids were packed with another tokenizer: most would be valid ids, with
        another meaning."""
        if is_url(url) and scheme(url) != "file":
            return
        folder, name = os.path.split(local_path(url))
        if _packing_tokenizers(folder).get(name, self._tokenizer.fingerprint) != self._tokenizer.fingerprint:
            packed_tokenizer = os.path.join(folder, "tokenizer.json")
            remedy = (
                f"set data.tokenizer={packed_tokenizer}"
                if os.path.exists(packed_tokenizer)
                else "give the one it was packed with"
            )
            raise ConfigError(f"data.tokenizer: {folder} holds token ids of another tokenizer; {remedy}")

    def _load(self, number: int) -> _Shard:
        if self._stored is not None:
            first = int(self.shards.starts[number])
            return _Shard(np.cumsum(self._counts(number)), None, lambda i: self._stored_ids(first + i))
        encoding = self._encodings[number]
        shard = self._map_cached(number) if self._read_metadata(number, encoding.content) is not None else None
        if shard is None:  # the cached tokens are missing or different: encode again, once
            metadata = self._encode(number)
            if (metadata["tokens"], metadata["sha256"]) != encoding[:2]:
                place = shown(self.shards.urls[number])
                raise DataError(f"{place}: gives other tokens than when the run began; restore it", shard=place)
            self._encodings[number] = encoding._replace(content=metadata["content"])
            shard = self._map_cached(number)
        if shard is None:
            raise ConfigError(f"data.cache={self._cache}: does not keep what is written there")
        return shard

    def _map_cached(self, number: int) -> _Shard | None:
        """Maps the cached tokens of a shard into memory; returns None if they are not those that all ranks know of."""
        path, encoding = self._path(number, self._encodings[number].content), self._encodings[number]
        ends = array_cache.load_array(self.derived_path(number, "ends.npy"))
        with suppress(FileNotFoundError, ValueError):
            flat: npt.NDArray[Any] = np.empty(0, self._dtype)
            if encoding.tokens:
                flat = array_cache.map_array(path, lambda: np.memmap(path, self._dtype, "r", shape=(encoding.tokens,)))
            is_whole = number in self._checked or hashlib.sha256(flat.data).hexdigest() == encoding.sha256
            if is_whole and ends is not None:
                self._checked.add(number)
                return _Shard(ends, flat, lambda i: flat)
        report(f"{path}: the kept tokens of {shown(self.shards.urls[number])} are damaged: encoding it anew")
        return None

    def _counts(self, number: int) -> Numbers:
        """Returns the number of tokens of each document of a shard of token ids; 0 if it is not a whole number of
        ids."""
        assert self._stored is not None
        sizes = self.shards.sizes(number)
        return np.where(sizes % self._stored.itemsize, 0, sizes // self._stored.itemsize)

    def _stored_ids(self, sample: int) -> npt.NDArray[Any]:
        """Reads the token ids of a sample. Raises DataError for ids that the tokenizer does not have."""
        assert self._stored is not None
        content = self.shards.read(sample)
        if len(content) % self._stored.itemsize:  # among the faults already
            return np.empty(0, self._stored)
        ids = np.frombuffer(content, self._stored)
        if len(ids) and int(ids.max()) >= self._tokenizer.vocab_size:
            place, key = self.shards.path(sample), self.shards.name(sample)[1]
            problem = f"token id {ids.max()}, but data.tokenizer has {self._tokenizer.vocab_size} tokens"
            raise DataError(f"{place}: sample {key!r}: {problem}", shard=place, key=key)
        return ids

    def derived_path(self, number: int, suffix: str) -> Path:
        """Returns the path of a cache file that is derived from the tokens of a shard."""
        return self._path(number, self._encodings[number].content).with_suffix(f".{suffix}")

    def _path(self, number: int, content: str) -> Path:
        """Returns the path of a shard's cached tokens: named by all that they depend on."""
        return self._cache_path(number, self._tokenizer.fingerprint, content).with_suffix(".tokens")

    def _cache_path(self, number: int, *parts: str) -> Path:
        url, summary = self.shards.urls[number], self.shards.summaries[number]
        identity = [FORMAT, absolute(url), summary.stamp, summary.digest, self.shards.field, *parts]
        name = hashlib.sha256(json.dumps(identity).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self._cache / "tokens" / name

    def _content_checksum(self, number: int) -> str | None:
        """Returns the checksum of a shard's texts; None if it was never computed.

        It is cached with the identity of its file. Size and modification time do not tell files apart (`cp -p`,
        archives and container images keep times), inode and change time do: for another file it is computed again.
        """
        file = _file_identity(self.shards.urls[number])
        try:
            metadata = json.loads(read_file(self._cache_path(number).with_suffix(".texts")))
            content, files = str(metadata["sha256"]), list(metadata["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if file is None or file in files or number in self.shards.damaged_since:
            return content
        first, digest = int(self.shards.starts[number]), hashlib.sha256()
        for sample in range(first, int(self.shards.starts[number + 1])):
            digest.update(self.shards.read(sample))
        current = digest.hexdigest()
        with suppress(OSError):  # the cache is read-only
            self._remember(number, current, [*files, file] if current == content else [file])
        return current

    def _remember(self, number: int, content: str, files: list[str]) -> None:
        metadata = {"sha256": content, "files": files[-_MAX_FILES:]}
        replace_file(self._cache_path(number).with_suffix(".texts"), json.dumps(metadata).encode())

    def _read_metadata(self, number: int, content: str) -> dict[str, Any] | None:
        """Reads the cached metadata of a shard of this content: {"tokens", "faults", "special", "sha256", "content"};
        or returns None."""
        path = self._path(number, content)
        with suppress(OSError, ValueError, KeyError, TypeError):
            metadata = json.loads(read_file(path.with_suffix(".json")))
            if stat_file(path).st_size == metadata["tokens"] * self._dtype.itemsize and metadata["content"] == content:
                return metadata
        return None

    def _encode(self, number: int) -> dict[str, Any]:
        """Encodes a shard: writes tokens and ends of documents first, metadata last, each whole or not at all.

        A sample that is not text is cached as a fault. One that cannot be read raises: it may be readable later.
        """
        place, file = shown(self.shards.urls[number]), _file_identity(self.shards.urls[number])
        if number in self.shards.damaged_since:
            problem = "its tokens are no longer in data.cache"
            raise DataError(f"{place}: was damaged since the run began, and {problem}; restore the shard", shard=place)
        lengths, faults, special, content_digest, digest = [], [], 0, hashlib.sha256(), hashlib.sha256()
        temporary = self._cache / "tokens" / f".{uuid.uuid4().hex}.tmp"
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as out:
                first = int(self.shards.starts[number])
                for sample in range(first, int(self.shards.starts[number + 1])):
                    if (sample - first) % _HINT_INTERVAL == 0:
                        self.shards.foresee_from(sample)
                    content_digest.update(content := self.shards.read(sample))
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
            content_sha256 = content_digest.hexdigest()
            metadata: dict[str, Any] = {"tokens": sum(lengths), "faults": faults, "special": special}
            metadata |= {"sha256": digest.hexdigest(), "content": content_sha256}
            path = self._path(number, content_sha256)
            move(temporary, path)
            array_cache.save_array(path.with_suffix(".ends.npy"), np.cumsum(lengths, dtype=np.int64))
            replace_file(path.with_suffix(".json"), json.dumps(metadata).encode())
            self._remember(number, content_sha256, [file] if file else [])
            return metadata
        except OSError as error:
            raise ConfigError(f"data.cache={self._cache}: tokens cannot be kept there: {error.strerror}") from error
        finally:
            with suppress(OSError):
                temporary.unlink()

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
def _packing_tokenizers(folder: str) -> dict[str, str]:
    """Returns the fingerprint of the tokenizer that made each shard's ids, if a dataset.json in the folder says so."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        dataset = json.loads(read_file(Path(folder, "dataset.json")))
        return dict.fromkeys(dataset["sha256"], dataset["tokenizer"]["fingerprint"])
    return {}


def _file_identity(url: str) -> str | None:
    """Returns what no other file of this name has, even with copied times; None where the stamp is made of the
    content."""
    if is_remote(url) or url.startswith(PIPE):
        return None
    with suppress(OSError, ValueError):
        status = stat_file(local_path(url))
        return f"{status.st_ino}-{status.st_ctime_ns}"
    return None
