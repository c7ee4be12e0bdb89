"""Objects behind URLs: fetched in cached chunks, retried from the byte that failed, and never mixed of two versions."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from trainer import outage
from trainer.data.storage import cache, fetch
from trainer.data.storage.backends import GONE, Backend, Facts, Failed, NoRanges
from trainer.data.storage.urls import OBSTORE, scheme, shown
from trainer.errors import DataError

if TYPE_CHECKING:
    from trainer.data.storage.settings import Settings

T = TypeVar("T")


class _Patience(outage.Patience):
    """Waits for a server as the storage's settings say, but not after a final answer."""

    def __init__(self, storage: Settings, url: str):
        super().__init__(shown(url), _server(url), storage.patience_s, **storage.waits)
        self._shown = shown(url)

    def wait_after(self, error: Failed, at: int | None, brought: int = 0) -> None:
        """Waits before the next attempt. Raises Outage when patience is used up, DataError for a final answer."""
        if error.final:
            place = self._shown if at is None else f"{self._shown}: byte {at}"
            raise DataError(f"{place}: {error}", shard=self._shown, byte=at)
        self.wait(str(error), at, brought)


def _server(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def backend(url: str, timeout_s: float) -> Backend:
    """Returns the backend for a URL that `urls.check` accepted."""
    from trainer.data.storage.fsspec_backend import Fsspec
    from trainer.data.storage.obstore_backend import Obstore

    if scheme(url) in OBSTORE:
        try:
            return Obstore(url, timeout_s)
        except ImportError:
            pass
    return Fsspec(url, timeout_s)


def _retry(storage: Settings, url: str, attempt: Callable[[], T]) -> T:
    patience = _Patience(storage, url)
    while True:
        try:
            result = attempt()
        except Failed as error:
            patience.wait_after(error, None)
        else:
            patience.note_answer()
            return result


def _facts(storage: Settings, url: str, source: Backend) -> tuple[Facts, bool]:
    """Returns size and version of the object now, and whether its server sends parts of it."""
    try:
        return _retry(storage, url, source.facts), True
    except NoRanges:
        return _retry(storage, url, lambda: source.stream(0, None)[0]), False


def stamp(storage: Settings, url: str) -> str:
    """Returns the present stamp of an object."""
    return _facts(storage, url, backend(url, storage.timeout_s))[0].stamp


class RemoteBlob:
    """Reads an object as a `Blob`. `ranges`: whether the server sends parts; else only `whole` works.

    Its only process-bound state is the connection to the server: it can be pickled, and used after a fork.
    """

    def __init__(self, storage: Settings, url: str, keep: bool = True):
        self.url, self._storage, self._name = url, storage, shown(url)
        self._source = backend(url, storage.timeout_s)
        facts, self.ranges = _facts(storage, url, self._source)
        self.size, self.stamp = facts.size, facts.stamp
        self._chunk = storage.chunk_bytes
        self._key = cache.key(url, self.stamp, self._chunk)
        self._cache_settings = str(storage.cache / "chunks"), storage.cache_bytes if keep else 0

    @property
    def _cache(self) -> cache.Cache:
        return cache.shared(*self._cache_settings)

    @property
    def _pool(self) -> fetch.Pool:
        return fetch.shared(self._storage.connections)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_source"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._source = backend(self.url, self._storage.timeout_s)

    def read(self, at: int, size: int) -> bytes:
        end = at + size
        if not 0 <= at <= end <= self.size:
            missing = end - max(at, self.size)
            raise self._damaged(self.size, f"the file ends here, {missing} bytes are missing")
        store = self._cache
        parts: list[bytes] = []
        pending = []
        for number in self._chunks(at, size):
            first = number * self._chunk
            start, stop = max(at - first, 0), min(end - first, self._chunk)
            cached = store.get(self._key, number, start, stop - start)
            parts.append(cached or b"")
            if cached is None:  # request all missing chunks before waiting for the first
                pending.append((len(parts) - 1, start, stop, self._fetch(number)))
        for index, start, stop, future in pending:
            parts[index] = future.result()[start:stop]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def peek(self, at: int, size: int) -> bytes:
        store = self._cache
        if at + size > self.size or any(store.has(self._key, number) for number in self._chunks(at, size)):
            return self.read(at, size)
        return self._download(at, at + size)

    def _chunks(self, at: int, size: int) -> range:
        return range(at // self._chunk, -(-(at + size) // self._chunk)) if size > 0 else range(0)

    def _fetch(self, number: int) -> Future[bytes]:
        return self._pool.result((*self._cache_settings, self._key, number), partial(self._load_chunk, number))

    def prefetch(self, at: int, size: int) -> None:
        store, pool = self._cache, self._pool
        max_chunks = fetch.WAITING if store.on_disk else max(1, cache.MEMORY_BYTES // self._chunk // 2)
        for number in self._chunks(at, max(0, min(size, self.size - at)))[:max_chunks]:
            if not store.has(self._key, number):
                pool.foresee((*self._cache_settings, self._key, number), partial(self._load_chunk, number), max_chunks)

    def _load_chunk(self, number: int) -> bytes:
        start, store = number * self._chunk, self._cache
        end = min(start + self._chunk, self.size)
        if (cached := store.get(self._key, number, 0, end - start)) is not None:
            return cached  # fetched meanwhile
        chunk = self._download(start, end)
        store.put(self._key, number, chunk)
        return chunk

    def _download(self, start: int, end: int) -> bytes:
        """Downloads the bytes from `start` to `end`, in as many attempts as needed; each resumes where the last
        failed."""
        content, patience = bytearray(), _Patience(self._storage, self.url)
        while len(content) < end - start:
            before = len(content)
            try:
                facts, body = self._source.stream(start + before, end)
                self._check_unchanged(facts, start + before)
                for piece in body:
                    patience.note_answer()
                    content += piece
                    if len(content) > end - start:
                        raise self._damaged(end, "the server sent more than was asked for")
                if len(content) < end - start:
                    raise Failed("the connection broke")
            except NoRanges:
                raise self._damaged(start + before, "the server no longer sends parts of files") from None
            except Failed as error:
                if error.status == GONE:
                    raise self._changed(start + before) from None
                patience.wait_after(error, start + len(content), len(content) - before)
        return bytes(content)

    def whole(self) -> Generator[bytes, None, None]:
        """Yields all bytes in order, from a server that sends no parts: each retry skips the bytes yielded before."""
        done, patience = 0, _Patience(self._storage, self.url)
        while True:
            done_before, at = done, 0
            try:
                facts, body = self._source.stream(0, None)
                self._check_unchanged(facts, done_before)
                for piece in body:
                    patience.note_answer()
                    at += len(piece)
                    if at > self.size:
                        raise self._damaged(self.size, "the server sends more than it said there is")
                    if at > done:
                        yield bytes(piece)[max(0, len(piece) - (at - done)) :]
                        done = at
                if done >= self.size:
                    return
                raise Failed("the connection broke")
            except Failed as error:
                patience.wait_after(error, done, done - done_before)

    def _check_unchanged(self, facts: Facts, at: int) -> None:
        if facts.stamp != self.stamp:
            raise self._changed(at)

    def _changed(self, at: int) -> DataError:
        return self._damaged(at, "was changed after it had been opened")

    def _damaged(self, byte: int, problem: str) -> DataError:
        return DataError(f"{self._name}: byte {byte}: {problem}", shard=self._name, byte=byte)

    def close(self) -> None:
        prefix = (*self._cache_settings, self._key)
        self._pool.forget(lambda name: isinstance(name, tuple) and name[: len(prefix)] == prefix)
