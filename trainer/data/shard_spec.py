"""Shard specifications: braces, globs and URLs to a list of shards; and the file name of a shard."""

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
from trainer.outage import Patience, retry_during_outage

_MAX_PROBLEMS = 20  # problems that are listed one by one
_NOT_SHARDS = re.compile(r"\.(?:txt|md|jsonl?|csv|parquet|jpe?g|png|webp)(?:\.(?:gz|xz|zst))?$", re.IGNORECASE)
_PACK_ADVICE = "`onecurve data pack {} --out DIR` makes some of text or images"


def expand(spec: str | Sequence[str], key: str = "data.shards", *, allow_pipe: bool = False) -> list[str]:
    """Returns the shards that `spec` means: paths, `{000000..000007}`, globs (sorted), `~`, URLs, or a list of these.

    Raises one ConfigError that names all patterns without a match, missing files, URLs that cannot be read and shards
    listed twice, each under `key`, the config key of `spec`.
    """
    urls: list[str] = []
    problems: list[str] = []
    for pattern in [spec] if isinstance(spec, str) else spec:
        try:
            urls += [url for piece in _expand_braces(pattern) for url in _matches(piece, key, allow_pipe, problems)]
        except ValueError:
            problems.append(f"{key}: unbalanced braces in {shown(pattern)!r}")
    real_paths: set[str] = set()
    for url in urls:
        if (real := absolute(url)) in real_paths:
            problems.append(f"{key}: {shown(url)} is listed twice")
        real_paths.add(real)
    if not urls and not problems:
        problems.append(f"{key}: names no shard")
    if problems:
        more = [f"{key}: and {len(problems) - _MAX_PROBLEMS} more like these"] if len(problems) > _MAX_PROBLEMS else []
        raise ConfigError(problems[:_MAX_PROBLEMS] + more)
    return urls


def _expand_braces(pattern: str) -> Iterator[str]:
    existing_part = "" if is_url(pattern) else _longest_existing(pattern)
    return (existing_part + expansion for expansion in braceexpand(pattern[len(existing_part) :]))


def _longest_existing(pattern: str) -> str:
    """Returns the longest leading part that exists as it is spelled: `[2024] set` may be a folder, not a pattern."""
    while pattern and not os.path.exists(pattern):
        pattern = os.path.dirname(pattern)
    return pattern


def _matches(pattern: str, key: str, allow_pipe: bool, problems: list[str]) -> list[str]:
    """Returns the shards that one brace-free pattern means; adds to `problems` if there are none."""
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
    if _is_file(path) and _NOT_SHARDS.search(path):
        problems.append(f"{key}: {shown(pattern)} is not a shard (a .tar); {_PACK_ADVICE.format(shown(pattern))}")
        return []
    if _is_file(path):
        return [path]
    if os.path.isdir(path):
        problems.append(f"{key}: {shown(pattern)} is a folder{_advice_for_folder(path, shown(pattern).rstrip('/'))}")
        return []
    existing_part = _longest_existing(path)
    glob_part = path[len(existing_part) :]
    files = sorted(filter(_is_file, _glob(glob.escape(existing_part) + glob_part))) if glob.has_magic(glob_part) else []
    if not files:
        problems.append(f"{key}: {'no file matches' if glob.has_magic(glob_part) else 'missing file'} {shown(pattern)}")
    return files


def _advice_for_folder(folder: str, name: str) -> str:
    """Returns advice for a folder in place of shards."""
    shards = glob.glob(os.path.join(glob.escape(folder), "*.tar*"))
    return f"; name its shards: {name}/*.tar" if shards else f" without shards (.tar); {_PACK_ADVICE.format(name)}"


def _is_file(path: str) -> bool:
    """Returns whether the path is a file. Raises Outage if storage does not answer: the file must not count as
    missing."""
    try:
        return stat.S_ISREG(stat_file(path).st_mode)
    except (OSError, ValueError):
        return False


def _glob(pattern: str) -> list[str]:
    """Returns the matches of a pattern. Waits for a folder that cannot be listed now, which `glob` would take for
    empty."""
    base = glob.escape(pattern).partition("[")[0]  # the part before the first special character
    folder = os.path.dirname(base) or "."
    with suppress(OSError):
        retry_during_outage(lambda: os.listdir(folder), Patience(folder, folder))
    return glob.glob(pattern, recursive=True)


def file_name(url: str) -> str:
    """Returns the file name of a shard, the same wherever it lies: the last part of its path."""
    if url.startswith(PIPE):
        return shown(url)
    return posixpath.basename(urlsplit(url).path if is_url(url) else url)
