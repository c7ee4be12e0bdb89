"""Reads text as documents: .txt and .md (whole, by paragraphs or by lines) and .jsonl, also .gz, .xz or .zst; .parquet.

A file is read in independent pieces: a document belongs to the piece in which it begins, and its key names the place
where it begins. So the documents do not depend on how the work was divided.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from trainer.data.tools.compressed import opened
from trainer.errors import ConfigError

CUTS = ("file", "paragraphs", "lines")
NAME = re.compile(
    r"(?P<stem>.+)\.(?:(?P<kind>txt|md|jsonl)(?:\.(?P<packing>xz|gz|zst))?|json\.(?P<lines>xz|gz|zst)|(?P<table>parquet))",
    re.IGNORECASE,
)  # C4 and others call JSON lines .json.gz; plain .json is not text
_BOM = b"\xef\xbb\xbf"
_BACK = 64 << 10  # bytes that are searched at once for the start of a line


class Document(NamedTuple):
    """A text and the key of its sample: unique in the data set, no dots in its last part."""

    key: str
    text: str


class Source(NamedTuple):
    """A text file: key of its documents, kind (`txt`, `md`, `jsonl`, `parquet`), packing (`xz`, `gz`, `zst` or empty),
    and its size and modification time when it was listed."""

    key: str
    path: Path
    kind: str
    packing: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class SplitOptions:
    """The rules of what makes a document: `split` of .txt and .md (see `CUTS`), `text_field` of JSON objects and rows;
    `keep_json` keeps the other fields, too."""

    split: str = "file"
    text_field: str = "text"
    keep_json: bool = False


DocumentAndFields = tuple[Document, bytes | None]  # the other fields as JSON
Skip = Callable[[str], object]  # gets the cause for each document that is left out; None: it is an error


def sources(files: Sequence[tuple[Path, Path]], used_keys: set[str]) -> list[Source]:
    """Returns the sources of text files, each with the folder that its key is relative to; adds keys to `used_keys`."""
    text_sources = []
    for path, base in files:
        match = NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(path)
        key = unique_key(path.relative_to(base).with_name(match["stem"]).as_posix(), "text", used_keys)
        kind, stat = (match["kind"] or match["table"] or "jsonl").lower(), path.stat()
        packing = (match["packing"] or match["lines"] or "").lower()
        text_sources.append(Source(key, path, kind, packing, stat.st_size, stat.st_mtime_ns))
    return text_sources


def unique_key(name: str, default: str, used_keys: set[str]) -> str:
    """Returns a key made of a path without its suffix, and adds it to `used_keys`."""
    key = unique = re.sub(r"[^\w/-]+", "-", name).strip("-_/") or default
    while unique in used_keys:  # a.txt and a.md, or the same name in two folders
        unique = f"{key}~{len(used_keys)}"
    used_keys.add(unique)
    return unique


@dataclass(frozen=True)
class Whole:
    """A piece of files that are one document each."""

    sources: tuple[Source, ...]

    @property
    def size(self) -> int:
        return sum(source.size for source in self.sources)

    def documents(self, options: SplitOptions, skip: Skip | None = None) -> Iterator[DocumentAndFields]:
        for source in self.sources:
            with _reading(source) as file:
                text = _text(source, 0, file.read().removeprefix(_BOM), skip)
                if text.strip():
                    yield Document(source.key, text), None


@dataclass(frozen=True)
class FileRange:
    """The documents that begin in bytes [begin, end) of a file, counted as unpacked."""

    source: Source
    begin: int = 0
    end: float = float("inf")

    @property
    def size(self) -> int:
        return int(min(self.end, self.source.size)) - self.begin

    def documents(self, options: SplitOptions, skip: Skip | None = None) -> Iterator[DocumentAndFields]:
        """Yields the documents. Raises `ConfigError` (file, place) if the file cannot be read."""
        source = self.source
        with _reading(source) as file:
            if source.kind == "jsonl":
                yield from _objects(source, _lines(file, self.begin, self.end), options, skip)
                return
            parts = _paragraphs(file, self.begin, self.end) if options.split == "paragraphs" else None
            for at, line in parts or _lines(file, self.begin, self.end):
                text = _text(source, at, line, skip).rstrip("\r\n")
                if text.strip():
                    yield Document(_key(source, at), text), None


@dataclass(frozen=True)
class RowRange:
    """Some row groups of a parquet file; `first` is the number of their first row."""

    source: Source
    groups: tuple[int, ...]
    first: int
    size: int

    def documents(self, options: SplitOptions, skip: Skip | None = None) -> Iterator[DocumentAndFields]:
        import pyarrow
        from pyarrow import parquet

        source, row = self.source, self.first
        columns = None if options.keep_json else [options.text_field]
        try:
            with parquet.ParquetFile(source.path) as file:
                for batch in file.iter_batches(1024, row_groups=list(self.groups), columns=columns):
                    for values in batch.to_pylist():
                        try:
                            text, other_fields = _read_row(values, options, row)
                        except ValueError as error:
                            if skip is None:
                                raise
                            skip(f"{source.path}: {error}")
                        else:
                            if text.strip():
                                yield Document(_key(source, row), text), other_fields
                        row += 1
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise ConfigError(f"{source.path}: cannot be read: {_first_line(error)}") from error
        check_unchanged(source.path, source.size, source.mtime_ns)


def pieces(
    text_sources: Sequence[Source], options: SplitOptions, piece_bytes: int
) -> Iterator[Whole | FileRange | RowRange]:
    """Yields the documents of some files, split into pieces of about `piece_bytes`. Raises `ConfigError`."""
    batch: list[Source] = []
    for source in text_sources:
        is_whole = source.kind in ("txt", "md") and options.split == "file"
        if batch and (not is_whole or sum(member.size for member in batch) >= piece_bytes):
            yield Whole(tuple(batch))
            batch = []
        if is_whole:
            batch.append(source)
        elif source.kind == "parquet":
            yield from _rows(source, options, piece_bytes)
        elif source.packing:
            yield FileRange(source)
        else:
            for begin in range(0, source.size, piece_bytes):
                end = begin + piece_bytes
                yield FileRange(source, begin, end if end < source.size else float("inf"))
    if batch:
        yield Whole(tuple(batch))


def check_unchanged(path: Path, size: int, mtime_ns: int) -> None:
    """Raises `ConfigError` if a file was changed since it was listed."""
    with suppress(OSError):
        now = os.stat(path)
        if (now.st_size, now.st_mtime_ns) == (size, mtime_ns):
            return
    raise ConfigError(f"{path}: was changed while it was being packed")


@contextmanager
def _reading(source: Source) -> Iterator[IO[bytes]]:
    """Opens the file unpacked. Errors within the block become `ConfigError`."""
    with opened(source.path, source.packing) as file:
        yield file
        check_unchanged(source.path, source.size, source.mtime_ns)


def _key(source: Source, place: int) -> str:
    return f"{source.key}/{place:012d}"


def _text(source: Source, at: int, content: bytes, skip: Skip | None) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        problem = f"{source.path}: is not UTF-8 text (at byte {at + error.start})"
        if skip is None:
            raise ConfigError(problem) from error
        skip(problem)
        return ""


def _lines(file: IO[bytes], begin: int, end: float) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that begin in [begin, end), each with its place."""
    at = begin
    if begin:
        file.seek(begin - 1)
        at += len(file.readline()) - 1  # the rest of a line that began before
    while at < end and (line := file.readline()):
        yield at, line if at else line.removeprefix(_BOM)
        at += len(line)


def _paragraphs(file: IO[bytes], begin: int, end: float) -> Iterator[tuple[int, bytes]]:
    """Yields the paragraphs that begin in [begin, end): lines between blank ones."""
    place = 0
    lines: list[bytes] = []
    inside = begin > 0 and not _blank(_line_before(file, begin))  # a paragraph that began before
    for at, line in _lines(file, begin, float("inf")):
        if _blank(line):
            if lines:
                yield place, b"".join(lines)
            lines, inside = [], False
        elif not inside and not lines:
            if at >= end:
                return
            place, lines = at, [line]
        elif lines:
            lines.append(line)
        if at >= end and not lines:
            return
    if lines:
        yield place, b"".join(lines)


def _line_before(file: IO[bytes], begin: int) -> bytes:
    """Returns the line before the first one that begins at `begin` or later."""
    start = begin
    while start:  # back to the start of the line that holds byte begin - 1
        back = min(_BACK, start)
        file.seek(start - back)
        newline = file.read(back - (start == begin)).rfind(b"\n")
        if newline >= 0:
            start += newline + 1 - back
            break
        start -= back
    file.seek(start)
    line = file.readline()
    return line if start else line.removeprefix(_BOM)


def _blank(line: bytes) -> bool:
    return not line.decode(errors="replace").strip()


def _objects(
    source: Source, lines: Iterator[tuple[int, bytes]], options: SplitOptions, skip: Skip | None
) -> Iterator[DocumentAndFields]:
    """Yields the documents of JSON lines."""
    for at, line in lines:
        if not (json_text := _text(source, at, line, skip)).strip():
            continue
        try:
            values = _parse_object(json_text, options.text_field)
            text = values.pop(options.text_field)
            other_fields = _encode_fields(values, options, "") if text.strip() else None
        except (ValueError, RecursionError) as error:
            problem = "is nested too deeply" if isinstance(error, RecursionError) else f"{error}".lstrip(" :")
            if skip is None:
                raise ValueError(f"line {_line_number(source, at)}: {problem}") from error
            skip(f"{source.path}: line at byte {at}: {problem}")  # its number would take a pass over the file
            continue
        if text.strip():
            yield Document(_key(source, at), text), other_fields


def _parse_object(json_text: str, field: str) -> dict[str, Any]:
    """Returns the JSON object. Raises ValueError if it lacks the text."""
    try:
        values = json.loads(json_text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} (character {error.pos + 1})") from None
    if not isinstance(values, dict):
        raise ValueError(f"is not a JSON object but {_type_name(values)}")
    if field not in values:
        raise ValueError(f"has no {field!r} (--text-field); it has: {', '.join(values) or 'nothing'}")
    if not isinstance(text := values[field], str):
        raise ValueError(f"{field!r} (--text-field) is {_type_name(text)}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell it
        raise ValueError(f"{field!r} (--text-field) is not Unicode text") from None
    return values


def _read_row(values: dict[str, Any], options: SplitOptions, row: int) -> tuple[str, bytes | None]:
    """Returns the text of a row, and its other columns as JSON. Raises ValueError."""
    if (text := values.pop(options.text_field)) is None:
        name = options.text_field
        raise ValueError(f"row {row}: {name!r} (--text-field) is null; leave such rows out (--on-error skip)")
    return text, _encode_fields(values, options, f"row {row}") if text.strip() else None


def _type_name(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")


def _encode_fields(values: dict[str, Any], options: SplitOptions, place: str) -> bytes | None:
    """Returns the other fields as JSON, None unless they are to be kept. Raises ValueError."""
    if not options.keep_json:
        return None
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain).encode()
    except UnicodeEncodeError:
        problem = "a field that is not Unicode text cannot be kept as JSON"
    except (ValueError, TypeError) as error:
        problem = "NaN and Infinity cannot be kept as JSON" if "float" in str(error) else str(error)
    raise ValueError(f"{place}: --keep-json: {problem}")


def _plain(value: Any) -> str:
    if isinstance(value, bytes | bytearray):
        raise TypeError("a field that holds bytes cannot be kept as JSON")
    return str(value)  # dates and decimals of parquet


def _line_number(source: Source, at: int) -> int:
    """Returns the number of the line that begins at byte `at`, counted from 1."""
    number = 1
    with opened(source.path, source.packing) as file:
        while at > 0 and (part := file.read(min(at, 1 << 20))):
            number += part.count(b"\n")
            at -= len(part)
    return number


def _rows(source: Source, options: SplitOptions, piece_bytes: int) -> Iterator[RowRange]:
    """Yields the pieces of a parquet file: neighboring row groups."""
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError:
        raise ConfigError(f"{source.path}: needs the package pyarrow: pip install 'onecurve[parquet]'") from None
    try:
        with parquet.ParquetFile(source.path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{source.path}: cannot be read: {_first_line(error)}") from error
    if options.text_field not in schema.names:
        columns = ", ".join(schema.names)
        raise ConfigError(f"{source.path}: has no column {options.text_field!r} (--text-field); it has: {columns}")
    if duplicates := [
        n for n, times in Counter(schema.names).items() if times > 1 and (options.keep_json or n == options.text_field)
    ]:
        raise ConfigError(f"{source.path}: has two columns {duplicates[0]!r}: rename one")
    kind = schema.field(options.text_field).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain)):
        raise ConfigError(f"{source.path}: column {options.text_field!r} holds {kind}, not strings")
    groups: list[int] = []
    first = rows = size = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        groups, rows, size = [*groups, number], rows + group.num_rows, size + group.total_byte_size
        if size >= piece_bytes or number == metadata.num_row_groups - 1:
            yield RowRange(source, tuple(groups), first, size)
            groups, first, rows, size = [], first + rows, 0, 0


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
