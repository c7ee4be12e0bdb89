"""Objects of any scheme that the installed fsspec knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.data.storage.backends import Facts, Failed, NoRanges, failure_of, first_line, without_version
from trainer.data.storage.urls import scheme, shown
from trainer.errors import ConfigError

PIECE = 1 << 20  # bytes of a request: a failed one yields nothing
# Names of what changes with the content, in different file systems, best first. `created` is memory://'s.
_VERSIONS = (
    "ETag", "etag", "checksum", "Content-MD5", "Digest", "generation", "md5Hash", "md5Checksum", "content_hash",
    "blob_id", "oid", "LastModified", "last_modified", "Last-Modified", "mtime", "modified", "modificationTime",
    "modifiedTime", "modified_at", "timeModified", "updated", "modify", "created",
)  # fmt: skip


class Fsspec:
    """Reads through fsspec's file system for the scheme, with the credentials that it finds, in small requests."""

    def __init__(self, url: str, timeout_s: float):
        from fsspec.core import url_to_fs

        self._url = url
        options: dict[str, Any] = {}
        if (kind := scheme(url)) in ("http", "https"):
            import aiohttp

            limit = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
            options["client_kwargs"] = {"timeout": limit}
        elif kind in ("s3", "s3a"):
            limits = {"read_timeout": timeout_s, "connect_timeout": timeout_s, "retries": {"max_attempts": 0}}
            options["config_kwargs"] = limits
        try:
            self._fs, self._path = url_to_fs(url, **options)
        except ImportError as error:
            raise ConfigError(f"{shown(url)}: {first_line(error)}") from None
        except Exception as error:
            raise ConfigError(f"{shown(url)}: cannot be opened: {first_line(error)}") from None

    def facts(self) -> Facts:
        facts = self._facts()
        if facts.size > 1 and len(self._cat(0, 1)) != 1:
            raise NoRanges
        return facts

    def _facts(self) -> Facts:
        try:
            self._fs.invalidate_cache()
            info = self._fs.info(self._path)
        except Exception as error:
            raise self._failed(error) from None
        if info.get("size") is None:
            raise NoRanges
        tags = (str(info.get(name) or "").strip('"') for name in _VERSIONS)
        if not (version := next(filter(None, tags), "")):
            raise without_version(self._url)
        return Facts(int(info["size"]), version)

    def _cat(self, start: int, end: int) -> bytes:
        try:
            return self._fs.cat_file(self._path, start=start, end=end)
        except Exception as error:
            raise self._failed(error) from None

    def stream(self, start: int, end: int | None) -> tuple[Facts, Iterator[bytes]]:
        if end is None:
            raise Failed("the server does not send parts of files; with the package obstore it can be read", final=True)
        return self._facts(), self._pieces(start, end)

    def _pieces(self, start: int, end: int) -> Iterator[bytes]:
        for at in range(start, end, PIECE):
            stop = min(at + PIECE, end)
            if len(piece := self._cat(at, stop)) > stop - at:
                raise NoRanges
            yield piece
            if len(piece) < stop - at:  # the next piece would not continue this one
                raise Failed("the connection broke")

    def _failed(self, error: Exception) -> Failed:
        cause = error.__cause__
        if isinstance(cause, Exception) and type(cause).__module__.startswith("aiohttp"):
            return self._failed(cause)  # fsspec reports any such error as a missing file
        if isinstance(error, FileNotFoundError) or (status := getattr(error, "status", None)) in (404, 410):
            return Failed("does not exist", final=True)
        if isinstance(error, PermissionError):
            return failure_of(403, "access was refused")
        return failure_of(status, "") if isinstance(status, int) else Failed(first_line(error))
