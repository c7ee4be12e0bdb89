"""Remote objects as streams of bytes, one attempt each: by obstore where it can, by fsspec the rest. See remote.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from trainer.data.storage.urls import shown
from trainer.errors import ConfigError
from trainer.secrets import said

GONE = 416  # the answer to a range that begins behind the end
_AGAIN = {408, 425, 429}  # answers below 500 that mean: later


class Failed(Exception):
    """An attempt failed; the text says how, `final` that another one would too. `status`: the server's answer."""

    def __init__(self, reason: str, final: bool = False, status: int | None = None):
        super().__init__(said(reason))
        self.final, self.status = final, status


class NoRanges(Exception):
    """The server sends the whole object whatever part was asked for."""


@dataclass(frozen=True)
class Facts:
    size: int
    version: str  # etag, checksum or time of the last change: never nothing, what is kept is known by it

    @property
    def stamp(self) -> str:
        return f"{self.size}-{self.version}"


class Backend(Protocol):
    def facts(self) -> Facts:
        """What the object is now. Raises Failed, NoRanges."""

    def stream(self, start: int, end: int | None) -> tuple[Facts, Iterator[bytes]]:
        """The bytes from `start` to `end`, and what they are of. None: all, without a range. Raises as `facts`; so
        does the iterator."""


def failure_of(status: int, words: str) -> Failed:
    """What an HTTP status that is not a success means."""
    final = 400 <= status < 500 and status not in _AGAIN
    refused = "; are there credentials for it in the environment?" if status in (401, 403) else ""
    return Failed(f"the server answered {status} {words}".rstrip() + refused, final, status)


def without_version(url: str) -> ConfigError:
    """What is told of an object whose change could not be noticed."""
    return ConfigError(
        f"{shown(url)}: its server tells neither a version (ETag) nor the time of the last change, so that what is "
        "kept of it could be of a former one; copy it to this machine, or read it by pipe:curl -sSf URL"
    )


def first_line(error: Exception) -> str:
    """What may be told of an error of somebody else."""
    return said(str(error).strip().partition("\n")[0].rpartition(" - ")[2]) or type(error).__name__
