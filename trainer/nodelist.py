"""Slurm's way of writing many names as one: `n[1-3,7],gpu-[01-02]-x`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from trainer.errors import ConfigError

_PARTS = re.compile(r"(?:[^\[\],]|\[[^\[\]]*\])+")  # between the commas outside of brackets
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
MOST = 100_000  # names; more are a mistake


def expand(text: str) -> list[str]:
    """Returns the names in their order. Raises ConfigError where `text` is not a list of nodes.

    >>> expand("n[08-10,x],gpu-[1-2]-[a,b]")
    ['n08', 'n09', 'n10', 'nx', 'gpu-1-a', 'gpu-1-b', 'gpu-2-a', 'gpu-2-b']
    """
    parts = _PARTS.findall(text)
    if ",".join(parts) != text:
        raise ConfigError(f"{text!r}: is not a list of nodes; write it as Slurm does: n[1-3,7],m1")
    names = [name for part in parts for name in _expand_part(part)]
    if len(names) > MOST:
        raise ConfigError(f"{text!r}: names {len(names)} nodes")
    return names


def _expand_part(part: str) -> Iterator[str]:
    """Yields all names of one part, the last bracket counting fastest."""
    if not (brackets := _BRACKETS.search(part)):
        yield part
        return
    suffixes = list(_expand_part(part[brackets.end() :]))
    for middle in _expand_ranges(brackets[1]):
        for suffix in suffixes:
            yield part[: brackets.start()] + middle + suffix


def _expand_ranges(ranges: str) -> Iterator[str]:
    for item in ranges.split(","):
        if not (bounds := re.fullmatch(r"(\d+)-(\d+)", item)):
            yield item
            continue
        first, last = int(bounds[1]), int(bounds[2])
        if not first <= last <= first + MOST:
            raise ConfigError(f"[{ranges}]: {item} is not a range of nodes")
        yield from (str(number).zfill(len(bounds[1])) for number in range(first, last + 1))
