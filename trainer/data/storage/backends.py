"""Backends: remote objects as streams of bytes, one attempt each, by obstore or else by fsspec. See remote.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from trainer.data.storage.urls import shown
from trainer.errors import ConfigError
from trainer.secrets import without_secrets

GONE = 416  # the answer to a range that begins after the end
_AGAIN = {408, 425, 429}  # answers below 500 after which a retry may succeed


class Failed(Exception):
    """An attempt failed; the text says why. `final`: another attempt would fail, too. `status`: the server's answer."""

    def __init__(self, reason: str, final: bool = False, status: int | None = None):
        super().__init__(without_secrets(reason))
        self.final, self.status = final, status


class NoRanges(Exception):
    """The server sends the whole object, whatever part is requested."""


@dataclass(frozen=True)
class Facts:
    size: int
    version: str  # etag, checksum or time of the last change: never empty, as cached bytes are named by it

    @property
    def stamp(self) -> str:
        return f"{self.size}-{self.version}"


class Backend(Protocol):
    def facts(self) -> Facts:
        """Returns size and version of the object now. Raises Failed, NoRanges."""

    def stream(self, start: int, end: int | None) -> tuple[Facts, Iterator[bytes]]:
        """Returns the object's facts, and its bytes from `start` to `end` (None: all, without a range). Raises what
        `facts` raises; so does the iterator."""


def failure_of(status: int, words: str) -> Failed:
    """Returns the error for an HTTP status that is not a success."""
    final = 400 <= status < 500 and status not in _AGAIN
    advice = "; are there credentials for it in the environment?" if status in (401, 403) else ""
    return Failed(f"the server answered {status} {words}".rstrip() + advice, final, status)


def without_version(url: str) -> ConfigError:
    """Returns the error for an object whose changes could not be noticed."""
    return ConfigError(
        f"{shown(url)}: its server tells neither a version (ETag) nor the time of the last change, so that what is "
        "kept of it could be of a former one; copy it to this machine, or read it by pipe:curl -sSf URL"
    )


def first_line(error: Exception) -> str:
    """Returns the first line of a library's error, without secrets."""
    return without_secrets(str(error).strip().partition("\n")[0].rpartition(" - ")[2]) or type(error).__name__
