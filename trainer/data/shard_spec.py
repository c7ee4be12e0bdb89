"""Which shards are meant: braces, globs and addresses to a list; and what a shard is called wherever it lies."""

from __future__ import annotations

import glob
import os
import posixpath
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from urllib.parse import urlsplit

from braceexpand import braceexpand

from trainer.data.storage import is_url, shown
from trainer.data.storage.urls import PIPE, absolute, check
from trainer.errors import ConfigError
from trainer.files import stat_file
from trainer.outage import Patience, patiently

_TOLD = 20  # problems that are told one by one
_UNPACKED = re.compile(r"\.(?:txt|md|jsonl?|csv|parquet|jpe?g|png|webp)(?:\.(?:gz|xz|zst))?$", re.IGNORECASE)
_PACK = "`onecurve data pack {} --out DIR` makes some of text or images"


def expand(spec: str | Sequence[str], key: str = "data.shards", *, allow_pipe: bool = False) -> list[str]:
    """The shards that `spec` means: paths, `{000000..000007}`, globs of files (sorted), `~`, URLs, or a list of these.

    Raises one ConfigError that names all patterns without a match, missing files, URLs that cannot be read and shards
    listed twice, each under `key`, which `spec` was given for.
    """
    found: list[str] = []
    problems: list[str] = []
    for pattern in [spec] if isinstance(spec, str) else spec:
        try:
            found += [url for piece in _braces(pattern) for url in _matches(piece, key, allow_pipe, problems)]
        except ValueError:
            problems.append(f"{key}: unbalanced braces in {shown(pattern)!r}")
    seen: set[str] = set()
    for url in found:
        if (real := absolute(url)) in seen:
            problems.append(f"{key}: {shown(url)} is listed twice")
        seen.add(real)
    if not found and not problems:
        problems.append(f"{key}: names no shard")
    if problems:
        more = [f"{key}: and {len(problems) - _TOLD} more like these"] if len(problems) > _TOLD else []
        raise ConfigError(problems[:_TOLD] + more)
    return found


def _braces(pattern: str) -> Iterator[str]:
    there = "" if is_url(pattern) else _existing(pattern)
    return (there + rest for rest in braceexpand(pattern[len(there) :]))


def _existing(pattern: str) -> str:
    """The longest part of it that exists as it is spelt: `[2024] set` is a folder before it is a pattern."""
    while pattern and not os.path.exists(pattern):
        pattern = os.path.dirname(pattern)
    return pattern


def _matches(pattern: str, key: str, allow_pipe: bool, problems: list[str]) -> list[str]:
    """The shards that one brace-free pattern means; adds to `problems` if there are none."""
    if is_url(pattern):
        try:
            check(pattern, allow_pipe)
        except ConfigError as error:
            problems += [f"{key}: {problem}" for problem in error.problems]
        if not pattern.startswith(PIPE) and "*" in urlsplit(pattern).path:
            problems.append(
                f"{key}: {shown(pattern)}: addresses know no *; write braces, such as {{000000..000127}}.tar"
            )
        return [pattern]
    path = os.path.expanduser(pattern)
    if _is_file(path) and _UNPACKED.search(path):
        problems.append(f"{key}: {shown(pattern)} is not a shard (a .tar); {_PACK.format(shown(pattern))}")
        return []
    if _is_file(path):
        return [path]
    if os.path.isdir(path):
        problems.append(f"{key}: {shown(pattern)} is a folder{_of_what(path, shown(pattern).rstrip('/'))}")
        return []
    there = _existing(path)
    rest = path[len(there) :]
    found = sorted(filter(_is_file, _listed(glob.escape(there) + rest))) if glob.has_magic(rest) else []
    if not found:
        problems.append(f"{key}: {'no file matches' if glob.has_magic(rest) else 'missing file'} {shown(pattern)}")
    return found


def _of_what(folder: str, name: str) -> str:
    """What to do with a folder that was given for shards."""
    shards = glob.glob(os.path.join(glob.escape(folder), "*.tar*"))
    return f"; name its shards: {name}/*.tar" if shards else f" without shards (.tar); {_PACK.format(name)}"


def _is_file(path: str) -> bool:
    """Whether it is there. Raises Outage where its storage does not say so: that is no other data set."""
    try:
        return stat.S_ISREG(stat_file(path).st_mode)
    except (OSError, ValueError):
        return False


def _listed(pattern: str) -> list[str]:
    """What a pattern means. A folder that cannot be listed for now is not an empty one, as it is to `glob`."""
    base = glob.escape(pattern).partition("[")[0]  # what stands before the first sign with a meaning
    folder = os.path.dirname(base) or "."
    with suppress(OSError):
        patiently(lambda: os.listdir(folder), Patience(folder, folder))
    return glob.glob(pattern, recursive=True)


def file_name(url: str) -> str:
    """What a shard is called wherever it lies: the last part of its path."""
    if url.startswith(PIPE):
        return shown(url)
    return posixpath.basename(urlsplit(url).path if is_url(url) else url)
