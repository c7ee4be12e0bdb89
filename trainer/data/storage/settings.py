"""The interface to the bytes of a shard, and the settings of its storage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.data.storage.urls import shown
from trainer.errors import DataError
from trainer.outage import Patience


class Blob(Protocol):
    """Gives random access to the bytes of one shard, to many threads at once."""

    url: str
    """The URL as the user wrote it. Messages use `shown(url)`, as it may hold a password."""
    size: int
    """Size in bytes; for `.tar.gz` and `pipe:` that of the unpacked tar."""
    stamp: str
    """Changes with the content: made of size and time, or of the server's etag."""

    def read(self, at: int, size: int) -> bytes | memoryview:
        """Reads exactly `size` bytes from byte `at`. Raises DataError (url, byte), or Outage if its storage does not
        answer."""

    def peek(self, at: int, size: int) -> bytes | memoryview:
        """Reads like `read`, but fetches no more than these bytes: for bytes far from all others."""

    def prefetch(self, at: int, size: int) -> None:
        """Hints that these bytes will be read soon; returns at once. Does nothing for local files."""

    def close(self) -> None:
        """Closes files and drops pending prefetches; reading opens the files again."""


@dataclass(frozen=True)
class Settings:
    """Says how shards are opened and read.

    `cache` is a folder; `cache_bytes` limits the copies of remote bytes in it (0: only a few chunks, in memory). Whole
    copies for `.tar.gz`, `pipe:` and servers without ranges do not count toward that budget.
    A read that failed `retries` times in a row, with growing waits from `wait_s` seconds on, and for at least
    `patience_s`, because server or file system did not answer, is an Outage. `timeout_s`: longest wait for a byte.
    `connections`: limit for all storages of a process together.
    `pipes`: storages with the same name share outputs of `pipe:` commands; under another name the commands run again.
    """

    cache: Path
    cache_bytes: int = 0
    allow_pipe: bool = False
    mmap: bool = False
    retries: int = 10
    patience_s: float = 0
    wait_s: float = 0.25
    timeout_s: float = 30
    chunk_bytes: int = 4 << 20
    connections: int = 8
    pipes: str = ""

    @property
    def waits(self) -> dict[str, Any]:
        """Returns the options of `Patience` that are the same for all reads."""
        key, code = "data.patience_s", DataError.exit_code
        return {"retries": self.retries, "first_s": self.wait_s, "key": key, "exit_code": code}

    def patience(self, url: str) -> Patience:
        """Returns the patience for one read of a local file."""
        return Patience(shown(url), shown(url), self.patience_s, **self.waits)
