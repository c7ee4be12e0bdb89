"""Paths and URLs of shards."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from urllib.parse import unquote, urlsplit

from trainer.errors import ConfigError
from trainer.secrets import PIPE, shown

OBSTORE = ("http", "https", "s3", "s3a", "gs", "az", "abfs", "abfss")
_SCHEME = re.compile(r"((?:[A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]*)://")  # fsspec's chains are not paths either


def scheme(url: str) -> str | None:
    """Returns the scheme, `s3` for `s3://bucket/key`; None for a path and for `pipe:`."""
    match = _SCHEME.match(url)
    return match[1].lower() if match else None


def is_url(text: str) -> bool:
    """Returns whether the text is not a local path: `s3://...`, `file://...`, `pipe:...`."""
    return text.startswith(PIPE) or scheme(text) is not None


def is_remote(text: str) -> bool:
    """Returns whether the bytes come over the network."""
    return scheme(text) not in (None, "file")


def absolute(url: str) -> str:
    """Returns the URL, or the absolute path: the same from any folder, so caches of a shard are named by it."""
    return url if is_url(url) else os.path.abspath(url)


def local_path(url: str) -> str:
    """Returns the local path of a path or `file://` URL."""
    return unquote(urlsplit(url).path) if scheme(url) == "file" else url


def check(url: str, allow_pipe: bool) -> None:
    """Raises ConfigError for a URL that this process cannot open, whatever is behind it."""
    if url.startswith(PIPE):
        if not allow_pipe:
            raise ConfigError(
                f"{shown(url)}: runs a command in a shell; allow that with data.allow_pipe=true (--allow-pipe)"
            )
        if not url[len(PIPE) :].strip():
            raise ConfigError("pipe: names no command")
        return
    if (kind := scheme(url)) is None or kind == "file":
        return
    if "::" in url or kind not in (*OBSTORE, *_fsspec_schemes()):
        raise ConfigError(f"{shown(url)}: cannot be read; {_list_supported()}")
    if kind in OBSTORE and not (_has_obstore() or kind in _fsspec_schemes()):
        raise ConfigError(f"{shown(url)}: remote shards need the package obstore: pip install 'onecurve[remote]'")


def _list_supported() -> str:
    text = "what works: local paths, file://, http(s)://, s3://, gs://, az://, pipe:COMMAND"
    if other_schemes := sorted(set(_fsspec_schemes()) - set(OBSTORE)):
        return f"{text}; by fsspec also {', '.join(f'{kind}://' for kind in other_schemes)}"
    return f"{text}; more with the package fsspec"


@lru_cache(maxsize=1)
def _has_obstore() -> bool:
    try:
        import obstore  # noqa: F401
    except ImportError:
        return False
    return True


# Without schemes that read from other files, run code or only show this machine.
_FSSPEC_SCHEMES = (
    "abfs", "adl", "box", "dropbox", "ftp", "gcs", "gdrive", "gs", "hdfs", "hf", "http", "https", "lakefs", "memory",
    "oci", "oss", "s3", "s3a", "sftp", "ssh", "webdav", "webhdfs",
)  # fmt: skip


@lru_cache(maxsize=1)
def _fsspec_schemes() -> tuple[str, ...]:
    """Returns the supported schemes that the installed fsspec knows."""
    try:
        from fsspec import available_protocols
    except ImportError:
        return ()
    protocols = set(available_protocols())
    return tuple(kind for kind in _FSSPEC_SCHEMES if kind in protocols)
