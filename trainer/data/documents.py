"""Text files as documents: .txt and .md (whole, by paragraphs or by lines), .jsonl; also as .xz or .gz."""

from __future__ import annotations

import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from trainer.errors import ConfigError

_NAME = re.compile(r"(?P<stem>.+)\.(?P<kind>txt|md|jsonl)(\.(?P<packing>xz|gz))?", re.IGNORECASE)
_OPENERS: dict[str, Callable[..., IO[Any]]] = {"": open, "xz": lzma.open, "gz": gzip.open}


class Document(NamedTuple):
    """A text and the key of its sample: unique in the dataset, no dots in its last part."""

    key: str
    text: str


class Source(NamedTuple):
    """A text file: key of its documents, kind (`txt`, `md`, `jsonl`) and packing (`xz`, `gz` or empty)."""

    key: str
    path: Path
    kind: str
    packing: str


def sources(inputs: Sequence[Path], problems: list[str]) -> list[Source]:
    """The text files among `inputs` and in folders there (sorted); adds to `problems` if there are none."""
    found: list[Source] = []
    taken: set[str] = set()
    for given in inputs:
        given = given.expanduser()
        paths = [given] if given.is_file() else sorted(path for path in given.rglob("*") if path.is_file())
        named = [(path, match) for path in paths if (match := _NAME.fullmatch(path.name))]
        if not named:
            problem = "no .txt, .md or .jsonl file (plain, .xz or .gz)" if paths else "missing or empty"
            problems.append(f"{given}: {problem}")
        for path, match in named:
            name = path.relative_to(given.parent).with_name(match["stem"]).as_posix()
            key = unique = re.sub(r"[^\w/-]+", "-", name).strip("-_/") or "text"
            while unique in taken:  # a.txt and a.md, or the same name in two folders
                unique = f"{key}~{len(taken)}"
            taken.add(unique)
            found.append(Source(unique, path, match["kind"].lower(), (match["packing"] or "").lower()))
    return found


def read(source: Source, split: str) -> Iterator[Document]:
    """The documents of a file, blank ones left out; `split`: what a .txt or .md is cut into (see `SPLITS`).

    The text is kept as it is, line ends included. Raises `ConfigError` (file, line) if it cannot be read.
    """
    whole, cut = (False, _json_texts) if source.kind == "jsonl" else (split == "file", SPLITS[split])
    try:
        opener = _OPENERS[source.packing]
        with opener(source.path, "rt", encoding="utf-8-sig", newline="") as file:
            for number, text in enumerate(cut(file)):
                if text.strip():
                    yield Document(source.key if whole else f"{source.key}/{number:08d}", text)
    except UnicodeError as error:
        raise ConfigError(f"{source.path}: is not UTF-8 text ({error})") from error
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise ConfigError(f"{source.path}: cannot be read: {error}") from error


def _whole(file: IO[str]) -> Iterator[str]:
    yield file.read()


def _lines(file: IO[str]) -> Iterator[str]:
    return (line.rstrip("\r\n") for line in file)


def _paragraphs(file: IO[str]) -> Iterator[str]:
    lines: list[str] = []
    for line in chain(file, [""]):
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines).rstrip("\r\n")
            lines = []


def _json_texts(file: IO[str]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            text = json.loads(line)["text"] if line.strip() else ""
            text.encode()  # JSON can spell what is no Unicode text
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} is not a JSON object with a string 'text'") from error
        yield text


# What a document is: the file, what blank lines part, or a line.
SPLITS = {"file": _whole, "paragraphs": _paragraphs, "lines": _lines}
