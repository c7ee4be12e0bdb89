"""Objects on web servers and in buckets, by the package obstore."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from trainer.data.storage.backends import GONE, Facts, Failed, NoRanges, failure_of, first_line, without_version
from trainer.data.storage.urls import shown
from trainer.errors import ConfigError

_PLAIN = re.compile(r"(?:[\w=+~-][\w.=+~-]*/)*[\w=+~-][\w.=+~-]*", re.ASCII)  # paths that need no quoting
_FOR_EVER_S = 30 * 86400
_CLOUDS = ("AWS_", "GOOGLE_", "AZURE_")


class Obstore:
    """Reads through the package obstore. Credentials, region and endpoint come from AWS_*, GOOGLE_* and AZURE_*."""

    def __init__(self, url: str, timeout_s: float):
        import obstore

        self._url, (root, self._path) = url, _split(url)
        environment = frozenset(item for item in os.environ.items() if item[0].startswith(_CLOUDS))
        self._store, self._timeout_s = _store(root, timeout_s, 10 * timeout_s, environment), timeout_s
        self._whole = partial(_store, root, timeout_s, _FOR_EVER_S, environment)
        self._get, self._head = obstore.get, obstore.head

    def facts(self) -> Facts:
        try:
            facts, body = self.stream(0, 1)
        except Failed as error:
            if error.status != GONE:
                raise
            return self._empty()
        for _ in body:
            pass  # read to the end, so that the connection can be reused
        return facts

    def _empty(self) -> Facts:
        """Returns the facts of an empty object, which has no first byte to ask for."""
        try:
            meta = self._head(self._store, self._path)
        except Exception as error:
            raise self._failed(error) from None
        return _facts(meta, self._url)

    def stream(self, start: int, end: int | None) -> tuple[Facts, Iterator[bytes]]:
        if _Runtime.is_unusable:
            raise Failed(
                "a fork of a process that read remote shards cannot: start it by spawn or forkserver, as by "
                "DataLoader(..., multiprocessing_context='forkserver')",
                final=True,
            )
        _Runtime.is_used = True
        try:
            if end is None:  # without time limit: a retry would begin again at the start
                result = self._get(self._whole(), self._path)
            else:
                result = self._get(self._store, self._path, options={"range": (start, end)})
        except Exception as error:
            raise self._failed(error) from None
        return _facts(result.meta, self._url), self._pieces(result)

    def _pieces(self, result: Any) -> Iterator[bytes]:
        try:
            # As they arrive: held-back bytes would be lost with the connection.
            yield from result.stream(min_chunk_size=1)
        except Exception as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> Exception:
        text = str(error)
        if "Range request not supported" in text:
            return NoRanges()
        if isinstance(error, FileNotFoundError):
            return Failed("does not exist", final=True)
        if "Could not parse path" in text:
            return Failed("S3 and its like are read by keys without empty parts, '.' and '..' only", final=True)
        if answer := re.search(r"status code: (\d{3})([A-Za-z ]*)", text):
            return failure_of(int(answer[1]), answer[2].strip())
        if "169.254.169.254" in text or "metadata.google" in text:
            return Failed("no credentials were found in the environment (AWS_SKIP_SIGNATURE=true: for public data)")
        kind = re.search(r"kind: (Timeout|Connect|Interrupted|Decode|Request)\b", text)
        if kind and kind[1] == "Timeout":
            return Failed(f"no bytes came for {self._timeout_s:g} s")
        if kind and kind[1] == "Connect":
            cause = re.search(r'(?:message|error): "([^"]+)"', text)
            return Failed(f"cannot connect: {cause[1]}" if cause else "cannot connect")
        return Failed("the connection broke" if kind or "SendRequest" in text else first_line(error))


class _Runtime:
    """Tracks obstore's threads, which forks do not inherit: in a fork of a process with them it is `is_unusable`."""

    is_used = is_unusable = False

    @classmethod
    def mark_forked(cls) -> None:
        cls.is_unusable = cls.is_used


os.register_at_fork(after_in_child=_Runtime.mark_forked)


def has_clients() -> bool:
    """Returns whether this process, or the one it was forked from, read remote objects: forks of it cannot."""
    return _Runtime.is_used


def _split(url: str) -> tuple[str, str]:
    """Splits a URL into its bucket or server, whose objects share a store's connections, and the path in it."""
    kind, _, address = url.partition("://")
    root, _, path = address.partition("/")
    if kind.lower() not in ("http", "https") or _PLAIN.fullmatch(path):
        return f"{kind}://{root}", path
    return url.partition("#")[0], ""  # with a query, or with characters that a path would quote differently


@lru_cache(maxsize=256)
def _store(url: str, timeout_s: float, total_s: float, environment: frozenset[tuple[str, str]]) -> Any:
    """Makes obstore's store for an `environment`. `timeout_s`: longest wait for a byte; `total_s`: for a request."""
    from obstore import store

    options: dict[str, Any] = {
        "allow_http": True, "read_timeout": f"{timeout_s}s", "connect_timeout": f"{timeout_s}s",
        "timeout": f"{total_s}s", "pool_max_idle_per_host": "32",
    }  # fmt: skip
    stores: Any = store  # its own types exist for type checkers only
    no_retries = {"max_retries": 0}
    parts = urlsplit(url)
    try:
        if parts.scheme not in ("http", "https"):
            provider = _aws_profile() if parts.scheme in ("s3", "s3a") else {}
            return stores.from_url(url, client_options=options, retry_config=no_retries, **provider)
        if parts.username is not None:  # sent as a header, so that no message with the URL shows it
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            options["default_headers"] = {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}
            url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        return stores.HTTPStore(url, client_options=options, retry_config=no_retries)
    except Exception as error:
        raise ConfigError(f"{shown(url)}: {first_line(error)}") from None


def _facts(meta: Any, url: str) -> Facts:
    changed: datetime = meta["last_modified"]  # 1970 if the server does not say
    if version := (meta["e_tag"] or "").strip('"') or f"{changed.timestamp():.0f}".lstrip("0"):
        return Facts(meta["size"], version)
    raise without_version(url)


def _aws_profile() -> dict[str, Any]:
    """Returns the credentials of `~/.aws`, which obstore does not read, unless the environment has some."""
    variables = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE")
    credentials_file = Path(os.path.expanduser(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")))
    if any(map(os.environ.get, variables)) or not ("AWS_PROFILE" in os.environ or credentials_file.exists()):
        return {}
    with suppress(Exception):  # no boto3, or an empty profile: leave it to obstore
        from obstore.auth.boto3 import Boto3CredentialProvider

        return {"credential_provider": Boto3CredentialProvider()}
    return {}
