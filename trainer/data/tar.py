"""Strict reading of tar archives: where every member lies, or one error that says which byte is wrong.

Python's `tarfile` takes a damaged header in mid-archive for the end of it, so samples vanish silently; this module
refuses all that is not a whole, well-formed archive. It does not check payloads: tar has no checksum of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple, NoReturn
from zlib import adler32

from trainer.data.storage import Blob, shown
from trainer.errors import DataError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_SCAN = 1 << 20
_WINDOW, _PEEK = 64 << 10, 2 << 10  # bytes to read at once for headers near each other, and far apart
_NEAR = 16 << 10
_FAR = 256 << 10  # from this distance on only the header is requested, not all that lies between
_LARGEST_EXTENSION = 1 << 20  # bytes of a long name or PAX header; real ones have a few hundred
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7": "xz", b"BZ": "bzip2", b"\x28\xb5": "zstd"}
_REGULAR, _SKIPPED, _EXTENSIONS = b"0\x007", b"5V", b"xXgLK"  # 7: contiguous file; V: volume label
_TIME = re.compile(rb"[0-7]{11}")
_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")
_REFUSED = {
    ord("1"): "hard link",
    ord("2"): "symbolic link",
    ord("3"): "character device",
    ord("4"): "block device",
    ord("6"): "fifo",
    ord("S"): "sparse file",
    ord("M"): "part of a multi-volume file",
}


class Member(NamedTuple):
    """Locates a regular file in an archive: its name, and its payload's first byte and length in the archive file."""

    name: str
    offset: int
    size: int


class Damage(DataError):
    """The archive itself is damaged at `byte`, not the access to it. `key` is a member's whole name."""


def walk(blob: Blob) -> Iterator[Member]:
    """Yields every regular file of a tar archive, in order: ustar, GNU and PAX, of any size.

    Skips directories. Raises `Damage` (shard, byte, member) for a damaged header, a cut archive, a missing
    end block, data after the end, and members that are not plain files (links, devices, sparse).
    """
    yield from _Walker(blob).members()


class _Walker:
    """Walks once over an archive: knows where the next header is, and what extension headers said about its member."""

    def __init__(self, blob: Blob):
        self.blob, self.size = blob, blob.size
        self.offset = 0
        self.window, self.window_start, self.read_last = b"", 0, 0  # bytes read ahead
        self.last: str | None = None  # name of the previous member
        self.global_records: dict[str, str] = {}  # PAX "g" records, for all members that follow
        self.next_records: dict[str, str] = {}  # PAX "x" and GNU "L" records, for the next member

    def fail(self, problem: str, name: str | None = None) -> NoReturn:
        """Raises Damage: names the byte of the present header and the member, or the one before it."""
        member = f"member {name!r}: " if name is not None else ""
        previous = f" (after member {self.last!r})" if name is None and self.last is not None else ""
        shard = shown(self.blob.url)
        text = f"{shard}: byte {self.offset}: {member}{problem}{previous}"
        raise Damage(text, shard=shard, key=name, byte=self.offset)

    def read(self, at: int, size: int) -> bytes:
        """Reads `size` bytes from byte `at`, fewer at the archive's end."""
        size, begin = min(size, max(self.size - at, 0)), at - self.window_start
        if not 0 <= begin <= len(self.window) - size:
            skipped = at - self.read_last
            ahead, read = _WINDOW if skipped < _NEAR else _PEEK, self.blob.peek if skipped >= _FAR else self.blob.read
            self.window_start, begin = at, 0
            self.window = bytes(read(at, min(max(ahead, size), self.size - at))) if size else b""
        self.read_last = at
        return self.window[begin : begin + size]

    def members(self) -> Iterator[Member]:
        while (header := self.header()) is not None:
            kind = header[156]
            if kind in _EXTENSIONS:
                self.extension(header, kind)
                continue
            records = self.global_records | self.next_records
            name = records.get("path") or _name(header)
            sparse = any(record.startswith("GNU.sparse") for record in records)
            if sparse or (kind not in _REGULAR and kind not in _SKIPPED):
                unknown = f"member of unknown type {chr(kind)!r}"
                problem = "sparse file" if sparse else _REFUSED.get(kind, unknown)
                self.fail(f"is a {problem}; repack the shard with plain files", name)
            start, size = self.offset + BLOCK, self.payload(header, records.get("size") or None, kind, name)
            self.offset = start + -(-size // BLOCK) * BLOCK
            self.last, self.next_records = name, {}
            if kind in _REGULAR and not name.endswith("/"):
                yield Member(name, start, size)

    def header(self) -> bytes | None:
        """Reads the header block at `offset` and verifies its checksum; returns None at a proper end of the archive."""
        block = self.read(self.offset, BLOCK)
        if block == _ZEROS:
            self.check_end()
            return None
        if not _is_header(block):
            self.fail(self.diagnosis(block))
        return block

    def diagnosis(self, block: bytes) -> str:
        """Returns why `block` is not a header."""
        if self.size == 0:
            return "the file is empty"
        if self.offset == 0 and (packed := _COMPRESSED.get(block[:2])):
            return f"the file is {packed}-compressed: unpack it, samples are read at random places"
        if len(block) < BLOCK:
            return "the archive is cut off, its end block is missing"
        advice = " (`onecurve data pack` makes one of text or images)" if self.offset == 0 else ""
        return f"damaged header (its checksum does not fit), or not a tar archive{advice}"

    def check_end(self) -> None:
        """Checks that nothing but zeros follows the end block."""
        at = self.offset
        while at < self.size:
            chunk = bytes(self.blob.read(at, min(_SCAN, self.size - at)))
            if data := chunk.lstrip(b"\0"):
                data_start = at + len(chunk) - len(data)
                self.fail(f"zeros where a header should be, but data again at byte {data_start}")
            at += len(chunk)
        if self.next_records:
            self.fail("the archive ends after an extension header: the member that it describes is missing")

    def payload(self, header: bytes, record: str | None, kind: int, name: str) -> int:
        """Returns the size of the payload after the header at `offset` (`record`: the PAX one); checks that it is
        there."""
        size = _octal(header[124:136]) if record is None else int(record) if record.isdecimal() else None
        if size is None:
            self.fail(f"damaged header: size {record or header[124:136]!r}", name)
        if kind in _SKIPPED:
            return 0  # a directory has no payload, whatever its size says
        if size > (available := self.size - self.offset - BLOCK):
            self.fail(f"is {size} bytes long, but the file ends after {available} of them", name)
        return size

    def extension(self, header: bytes, kind: int) -> None:
        """Reads a GNU long name (L; K, the name of a link, is ignored) or PAX records (x, g)."""
        size = self.payload(header, None, kind, _name(header))
        if size > _LARGEST_EXTENSION:
            self.fail(f"an extension header of {size} bytes is not credible")
        payload = self.read(self.offset + BLOCK, size)
        if kind == ord("L"):
            self.next_records["path"] = _text(payload.split(b"\0", 1)[0])
        elif kind == ord("g"):
            self.global_records |= self.records(payload)
        elif kind in b"xX":
            self.next_records |= self.records(payload)
        self.offset += BLOCK + -(-size // BLOCK) * BLOCK

    def records(self, payload: bytes) -> dict[str, str]:
        """Parses PAX records: `LENGTH KEY=VALUE\\n` each, LENGTH counting itself. An empty VALUE cancels an earlier
        one; zeros may fill up the end."""
        values, at = {}, 0
        payload = payload.rstrip(b"\0")
        while at < len(payload):
            match = _RECORD.match(payload, at)
            end = at + int(match[1]) if match else 0
            if match is None or not match.end() < end <= len(payload) or payload[end - 1] != ord("\n"):
                self.fail("malformed PAX header")
            values[_text(match[2])] = _text(payload[match.end() : end - 1])
            at = end
        return values


def described(block: bytes) -> tuple[str, int | None] | None:
    """Returns name and size of the plain file whose header the block is; None if it is not such a header. What does not
    fit, such as a name of more than 100 bytes, is in another header before it."""
    if not _is_header(block) or block[156] not in _REGULAR:
        return None
    return _name(block), _octal(block[124:136])


def _is_header(block: bytes) -> bool:
    """Returns whether the checksum fits: the sum of all bytes, with spaces in place of the checksum."""
    if len(block) < BLOCK:
        return False
    # The low half of an Adler-32 that starts at 0 is the sum itself, as long as that is below 65521: of 256 bytes.
    total = (adler32(block[:256], 0) & 0xFFFF) + (adler32(block[256:], 0) & 0xFFFF)
    stored_checksum, checksum = _octal(block[148:156]), total - sum(block[148:156]) + 8 * ord(" ")
    # Some old writers summed signed bytes.
    return stored_checksum == checksum or stored_checksum == checksum - 256 * sum(
        byte > 127 for byte in block[:148] + block[156:]
    )


def _octal(field: bytes) -> int | None:
    """Parses a numeric header field: octal digits, or the base-256 form of GNU tar; returns None if it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    return int(digits, 8) if not digits.strip(b"01234567") else None


def _name(header: bytes) -> str:
    """Returns the name in a header, with the prefix field if there is one (GNU tar may keep times there)."""
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    times = header[257:263] == b"ustar " and _TIME.fullmatch(prefix)
    return _text(prefix + b"/" + name if prefix and not times else name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
