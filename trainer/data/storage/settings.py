"""What a shard's bytes are to those who read them, and how its storage is dealt with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.data.storage.urls import shown
from trainer.errors import DataError
from trainer.outage import Patience


class Blob(Protocol):
    """The bytes of one shard, readable at any place by many threads at once."""

    url: str
    """The URL as the user wrote it. Messages use `shown(url)`, as it may hold a password."""
    size: int
    """Bytes; of `.tar.gz` and `pipe:` those of the unpacked tar."""
    stamp: str
    """Another one when the content is another: made of size and time, or of the server's etag."""

    def read(self, at: int, size: int) -> bytes | memoryview:
        """Exactly `size` bytes from byte `at`. DataError (url, byte) where that cannot be had, Outage where its storage
        does not answer."""

    def peek(self, at: int, size: int) -> bytes | memoryview:
        """Reads like `read`, but fetches no more than these bytes: for what lies far from everything else."""

    def prefetch(self, at: int, size: int) -> None:
        """A hint that these bytes will be read soon; returns at once. Nothing for local files."""

    def close(self) -> None:
        """Lets go of files and of what was only prefetched; reading opens them again."""


@dataclass(frozen=True)
class Settings:
    """How shards are opened and read.

    `cache` is a folder; `cache_bytes` is what copies of remote bytes may take of it (0: only a few chunks, in memory).
    What `.tar.gz`, `pipe:` and servers without ranges need is kept there whole, beside that budget.
    A read that failed `retries` times in a row, with growing waits from `wait_s` seconds on, and for at least
    `patience_s`, because server or file system did not answer, is an Outage; `timeout_s` is how long no byte may come.
    `connections` holds for all of a process's storages alike.
    `pipes` names what outputs of `pipe:` commands are shared by: under another name the commands run anew.
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
        """How reads are tried again, but for what is told of them."""
        key, code = "data.patience_s", DataError.exit_code
        return {"retries": self.retries, "first_s": self.wait_s, "key": key, "exit_code": code}

    def patience(self, url: str) -> Patience:
        """Returns the patience for one read of a local file."""
        return Patience(shown(url), shown(url), self.patience_s, **self.waits)
