"""Text as documents: .txt and .md (whole, by paragraphs or by lines) and .jsonl, also as .gz, .xz or .zst; .parquet.

A file is read in pieces that know nothing of each other: a document belongs to the piece in which it begins, and its
key is made of the place where it begins. So what comes out does not depend on how the work was parted.
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
)  # C4 and its like call JSON lines .json.gz; plain .json is not text
_BOM = b"\xef\xbb\xbf"
_BACK = 64 << 10  # bytes that are searched at once for where a line begins


class Document(NamedTuple):
    """A text and the key of its sample: unique in the data set, no dots in its last part."""

    key: str
    text: str


class Source(NamedTuple):
    """A text file: key of its documents, kind (`txt`, `md`, `jsonl`, `parquet`), packing (`xz`, `gz`, `zst` or empty),
    and the size and time that it had when it was found."""

    key: str
    path: Path
    kind: str
    packing: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class SplitOptions:
    """What a document is: `split` of .txt and .md (see `CUTS`), `text_field` of JSON objects and rows; `keep_json`:
    with the other fields."""

    split: str = "file"
    text_field: str = "text"
    keep_json: bool = False


Found = tuple[Document, bytes | None]  # and the other fields, as JSON
Skip = Callable[[str], object]  # is told of a document that is left out, and why; None: that is an error


def sources(files: Sequence[tuple[Path, Path]], taken: set[str]) -> list[Source]:
    """Sources of text files, each with the folder that its key begins at; keys are unique, also against `taken`."""
    found = []
    for path, base in files:
        match = NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(path)
        key = unique_key(path.relative_to(base).with_name(match["stem"]).as_posix(), "text", taken)
        kind, about = (match["kind"] or match["table"] or "jsonl").lower(), path.stat()
        packing = (match["packing"] or match["lines"] or "").lower()
        found.append(Source(key, path, kind, packing, about.st_size, about.st_mtime_ns))
    return found


def unique_key(name: str, otherwise: str, taken: set[str]) -> str:
    """A key made of a path without its suffix, added to those that are taken."""
    key = unique = re.sub(r"[^\w/-]+", "-", name).strip("-_/") or otherwise
    while unique in taken:  # a.txt and a.md, or the same name in two folders
        unique = f"{key}~{len(taken)}"
    taken.add(unique)
    return unique


@dataclass(frozen=True)
class Whole:
    """Files that are a document each."""

    sources: tuple[Source, ...]

    @property
    def size(self) -> int:
        return sum(source.size for source in self.sources)

    def documents(self, cut: SplitOptions, skip: Skip | None = None) -> Iterator[Found]:
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

    def documents(self, cut: SplitOptions, skip: Skip | None = None) -> Iterator[Found]:
        """Raises `ConfigError` (file, place) if the file cannot be read."""
        source = self.source
        with _reading(source) as file:
            if source.kind == "jsonl":
                yield from _objects(source, _lines(file, self.begin, self.end), cut, skip)
                return
            parts = _paragraphs(file, self.begin, self.end) if cut.split == "paragraphs" else None
            for at, line in parts or _lines(file, self.begin, self.end):
                text = _text(source, at, line, skip).rstrip("\r\n")
                if text.strip():
                    yield Document(_key(source, at), text), None


@dataclass(frozen=True)
class RowRange:
    """Some row groups of a parquet file; `first`: number of their first row."""

    source: Source
    groups: tuple[int, ...]
    first: int
    size: int

    def documents(self, cut: SplitOptions, skip: Skip | None = None) -> Iterator[Found]:
        import pyarrow
        from pyarrow import parquet

        source, row = self.source, self.first
        columns = None if cut.keep_json else [cut.text_field]
        try:
            with parquet.ParquetFile(source.path) as file:
                for batch in file.iter_batches(1024, row_groups=list(self.groups), columns=columns):
                    for values in batch.to_pylist():
                        try:
                            text, others = _of_row(values, cut, row)
                        except ValueError as error:
                            if skip is None:
                                raise
                            skip(f"{source.path}: {error}")
                        else:
                            if text.strip():
                                yield Document(_key(source, row), text), others
                        row += 1
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise ConfigError(f"{source.path}: cannot be read: {_first_line(error)}") from error
        check_unchanged(source.path, source.size, source.mtime_ns)


def pieces(found: Sequence[Source], cut: SplitOptions, piece_bytes: int) -> Iterator[Whole | FileRange | RowRange]:
    """The documents of some files, parted into pieces of about `piece_bytes`. Raises `ConfigError`."""
    together: list[Source] = []
    for source in found:
        whole = source.kind in ("txt", "md") and cut.split == "file"
        if together and (not whole or sum(other.size for other in together) >= piece_bytes):
            yield Whole(tuple(together))
            together = []
        if whole:
            together.append(source)
        elif source.kind == "parquet":
            yield from _rows(source, cut, piece_bytes)
        elif source.packing:
            yield FileRange(source)
        else:
            for begin in range(0, source.size, piece_bytes):
                end = begin + piece_bytes
                yield FileRange(source, begin, end if end < source.size else float("inf"))
    if together:
        yield Whole(tuple(together))


def check_unchanged(path: Path, size: int, mtime_ns: int) -> None:
    """Raises `ConfigError` if a file is not the one that was found."""
    with suppress(OSError):
        now = os.stat(path)
        if (now.st_size, now.st_mtime_ns) == (size, mtime_ns):
            return
    raise ConfigError(f"{path}: was changed while it was being packed")


@contextmanager
def _reading(source: Source) -> Iterator[IO[bytes]]:
    """The file, unpacked. What goes wrong within is a `ConfigError`."""
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
    """The lines that begin in [begin, end), each with its place."""
    at = begin
    if begin:
        file.seek(begin - 1)
        at += len(file.readline()) - 1  # the end of a line that began before
    while at < end and (line := file.readline()):
        yield at, line if at else line.removeprefix(_BOM)
        at += len(line)


def _paragraphs(file: IO[bytes], begin: int, end: float) -> Iterator[tuple[int, bytes]]:
    """The paragraphs that begin in [begin, end): lines between blank ones."""
    place = 0
    lines: list[bytes] = []
    inside = begin > 0 and not _blank(_line_before(file, begin))  # of one that began before
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
    """The line before the first one that begins at `begin` or later."""
    start = begin
    while start:  # to where the line that byte begin - 1 is part of begins
        back = min(_BACK, start)
        file.seek(start - back)
        found = file.read(back - (start == begin)).rfind(b"\n")
        if found >= 0:
            start += found + 1 - back
            break
        start -= back
    file.seek(start)
    line = file.readline()
    return line if start else line.removeprefix(_BOM)


def _blank(line: bytes) -> bool:
    return not line.decode(errors="replace").strip()


def _objects(
    source: Source, lines: Iterator[tuple[int, bytes]], cut: SplitOptions, skip: Skip | None
) -> Iterator[Found]:
    """The documents of JSON lines."""
    for at, line in lines:
        if not (spelt := _text(source, at, line, skip)).strip():
            continue
        try:
            values = _object(spelt, cut.text_field)
            text = values.pop(cut.text_field)
            others = _others(values, cut, "") if text.strip() else None
        except (ValueError, RecursionError) as error:
            problem = "is nested too deeply" if isinstance(error, RecursionError) else f"{error}".lstrip(" :")
            if skip is None:
                raise ValueError(f"line {_line_number(source, at)}: {problem}") from error
            skip(f"{source.path}: line at byte {at}: {problem}")  # whose number would take a pass for each
            continue
        if text.strip():
            yield Document(_key(source, at), text), others


def _object(spelt: str, field: str) -> dict[str, Any]:
    """The JSON object, which has the text. Raises ValueError."""
    try:
        values = json.loads(spelt)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} (character {error.pos + 1})") from None
    if not isinstance(values, dict):
        raise ValueError(f"is not a JSON object but {_named(values)}")
    if field not in values:
        raise ValueError(f"has no {field!r} (--text-field); it has: {', '.join(values) or 'nothing'}")
    if not isinstance(text := values[field], str):
        raise ValueError(f"{field!r} (--text-field) is {_named(text)}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell it
        raise ValueError(f"{field!r} (--text-field) is not Unicode text") from None
    return values


def _of_row(values: dict[str, Any], cut: SplitOptions, row: int) -> tuple[str, bytes | None]:
    """The text of a row, and its other columns as JSON. Raises ValueError."""
    if (text := values.pop(cut.text_field)) is None:
        raise ValueError(f"row {row}: {cut.text_field!r} (--text-field) is null; leave such rows out (--on-error skip)")
    return text, _others(values, cut, f"row {row}") if text.strip() else None


def _named(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")


def _others(values: dict[str, Any], cut: SplitOptions, where: str) -> bytes | None:
    """The other fields as JSON, if they are to be kept. Raises ValueError."""
    if not cut.keep_json:
        return None
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain).encode()
    except UnicodeEncodeError:
        problem = "a field that is not Unicode text cannot be kept as JSON"
    except (ValueError, TypeError) as error:
        problem = "NaN and Infinity cannot be kept as JSON" if "float" in str(error) else str(error)
    raise ValueError(f"{where}: --keep-json: {problem}")


def _plain(value: Any) -> str:
    if isinstance(value, bytes | bytearray):
        raise TypeError("a field that holds bytes cannot be kept as JSON")
    return str(value)  # dates and decimals of parquet


def _line_number(source: Source, at: int) -> int:
    """Number of the line that begins at byte `at`, from 1 on."""
    number = 1
    with opened(source.path, source.packing) as file:
        while at > 0 and (part := file.read(min(at, 1 << 20))):
            number += part.count(b"\n")
            at -= len(part)
    return number


def _rows(source: Source, cut: SplitOptions, piece_bytes: int) -> Iterator[RowRange]:
    """The pieces of a parquet file: neighboring row groups."""
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError:
        raise ConfigError(f"{source.path}: needs the package pyarrow: pip install 'onecurve[parquet]'") from None
    try:
        with parquet.ParquetFile(source.path) as file:
            about, schema = file.metadata, file.schema_arrow
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{source.path}: cannot be read: {_first_line(error)}") from error
    if cut.text_field not in schema.names:
        have = ", ".join(schema.names)
        raise ConfigError(f"{source.path}: has no column {cut.text_field!r} (--text-field); it has: {have}")
    if twice := [
        n for n, times in Counter(schema.names).items() if times > 1 and (cut.keep_json or n == cut.text_field)
    ]:
        raise ConfigError(f"{source.path}: has two columns {twice[0]!r}: rename one")
    kind = schema.field(cut.text_field).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain)):
        raise ConfigError(f"{source.path}: column {cut.text_field!r} holds {kind}, not strings")
    groups: list[int] = []
    first = rows = size = 0
    for number in range(about.num_row_groups):
        group = about.row_group(number)
        groups, rows, size = [*groups, number], rows + group.num_rows, size + group.total_byte_size
        if size >= piece_bytes or number == about.num_row_groups - 1:
            yield RowRange(source, tuple(groups), first, size)
            groups, first, rows, size = [], first + rows, 0, 0


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
