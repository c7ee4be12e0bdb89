"""What the text of a shard's place means, and how it is shown: without what is secret in it."""

from __future__ import annotations

import hashlib
import os
import re
from functools import lru_cache
from urllib.parse import unquote, urlsplit

from trainer.errors import ConfigError

PIPE = "pipe:"
OBSTORE = ("http", "https", "s3", "s3a", "gs", "az", "abfs", "abfss")
_SCHEME = re.compile(r"((?:[A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]*)://")  # fsspec's chains are no paths either
_USER = re.compile(r"((?:https?|s3|ftp):/|://)[^/\s'\"]*@")  # also where a slash is missing
_QUERY = re.compile(r"((?:https?:/|://)[^\s?'\"]*)\?[^\s'\"]*")
_SECRET = re.compile(
    r"(?i)(\bauthorization['\"]?\s*[=:]\s*['\"]?(?:\w+\s+)?|\b(?:bearer|basic)\s+"
    r"|(?:^|\s)(?:-u|--user|--password)[=\s]+|(?:^|\s)-u(?=[^\s:]+:)"
    r"|[\w-]*(?:secret|token|password|passwd|api-?_?key|access_?key|signature)[\w-]*['\"]?\s*[=:]\s*)"
    r"(?!\s)(?:\"[^\"]*\"|'[^']*'|[^\s'\"]+)"
)
# What words of a command are shown: what is certainly no secret. The rest of them is masked.
_WORD = re.compile(r"[|;&()<>]+|(?:[^\s'\"|;&()<>]|'[^']*'|\"[^\"]*\")+|['\"]")
_MASKED = re.compile(r"(?:-*\w[\w-]*=)?\*\*\*|\[[0-9a-f]{8}\]")
_PROGRAM = re.compile(r"[\w./~+-]+")
_ASSIGNED = re.compile(r"(-*\w[\w-]*=)")
_OPTION = re.compile(r"-[A-Za-z0-9]{1,4}|--[a-z][a-z0-9-]*")
_FILE = re.compile(r"\w[a-zA-Z0-9+.-]*://.*|[\w./+~=,@%{}*-]*\.(?:tar|tgz|gz|xz|bz2|zst|lz4|zip|enc|gpg)")
_PATH = re.compile(r"(?:\.{0,2}|~)/[\w./+~=,@%{}*-]*|\w{1,3}|-")


def scheme(url: str) -> str | None:
    """`s3` of `s3://bucket/key`; None for a path (and for `pipe:`)."""
    match = _SCHEME.match(url)
    return match[1].lower() if match else None


def is_url(text: str) -> bool:
    """Whether this is no path of a local file: `s3://...`, `file://...`, `pipe:...`."""
    return text.startswith(PIPE) or scheme(text) is not None


def is_remote(text: str) -> bool:
    """Whether its bytes come over the network."""
    return scheme(text) not in (None, "file")


def absolute(url: str) -> str:
    """The path or URL as it reads from any folder: what is kept of a shard is named by it."""
    return url if is_url(url) else os.path.abspath(url)


def local_path(url: str) -> str:
    """The path that a path or `file://` URL means."""
    return unquote(urlsplit(url).path) if scheme(url) == "file" else url


def shown(url: str) -> str:
    """The URL or command as messages may name it: no user, password, query (signatures) or token.

    Of a command only programs, options, paths and URLs are left; a checksum tells those apart that then look the same.
    It is not of what is known to be a secret, which may be another one in another life of a run.
    """
    text = _SECRET.sub(r"\1***", _QUERY.sub(r"\1?***", _USER.sub(r"\1***@", url)))
    if not url.startswith(PIPE):
        return text
    masked = f"{PIPE}{_masked(text[len(PIPE) :])}"
    checksum = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return masked if masked == text else f"{masked} [{checksum}]"


def _masked(command: str) -> str:
    begins, valued = True, False  # whether a program is named next, or the value of an option may be

    def word(match: re.Match[str]) -> str:
        nonlocal begins, valued
        spelt = match[0]
        if spelt[0] in "|;&()<>":
            begins, valued = not set(spelt) & set("<>"), False
            return spelt
        if spelt in "'\"":  # one that has no end
            return spelt
        plain, first, after = spelt.strip("'\""), begins, valued
        begins, valued = first and _ASSIGNED.match(plain) is not None, _OPTION.fullmatch(plain) is not None
        whole = (_PROGRAM,) if first else (_OPTION, _FILE) if after else (_OPTION, _FILE, _PATH)
        if any(kind.fullmatch(plain) for kind in (_MASKED, *whole)):
            return spelt
        assigned = _ASSIGNED.match(plain)
        return f"{assigned[1] if assigned else ''}***"

    return _WORD.sub(word, command)


def check(url: str, allow_pipe: bool) -> None:
    """Raises ConfigError for what could not be opened whatever is behind it."""
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
    if "::" in url or kind not in (*OBSTORE, *_fsspec()):
        raise ConfigError(f"{shown(url)}: cannot be read; {_works()}")
    if kind in OBSTORE and not (_has_obstore() or kind in _fsspec()):
        raise ConfigError(f"{shown(url)}: remote shards need the package obstore: pip install 'onecurve[remote]'")


def _works() -> str:
    here = "what works: local paths, file://, http(s)://, s3://, gs://, az://, pipe:COMMAND"
    if more := sorted(set(_fsspec()) - set(OBSTORE)):
        return f"{here}; by fsspec also {', '.join(f'{kind}://' for kind in more)}"
    return f"{here}; more with the package fsspec"


@lru_cache(maxsize=1)
def _has_obstore() -> bool:
    try:
        import obstore  # noqa: F401
    except ImportError:
        return False
    return True


# Not what reads out of other files, runs code or is only a view of this machine.
_FSSPEC = (
    "abfs", "adl", "box", "dropbox", "ftp", "gcs", "gdrive", "gs", "hdfs", "hf", "http", "https", "lakefs", "memory",
    "oci", "oss", "s3", "s3a", "sftp", "ssh", "webdav", "webhdfs",
)  # fmt: skip


@lru_cache(maxsize=1)
def _fsspec() -> tuple[str, ...]:
    """The schemes that fsspec knows here."""
    try:
        from fsspec import available_protocols
    except ImportError:
        return ()
    known = set(available_protocols())
    return tuple(kind for kind in _FSSPEC if kind in known)
