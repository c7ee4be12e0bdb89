"""tar.walk against Python's tarfile on sound archives, and its refusal of every kind of damaged one."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.data.storage.local import LocalBlob
from trainer.data.tar import BLOCK, Member
from trainer.data.tar import walk as walk_blob
from trainer.errors import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "deep/" + "d" * 80 + "/" + "n" * 60  # > 100 characters: ustar's prefix, GNU's L, PAX's path


def walk(path: str | Path) -> Iterator[Member]:
    return walk_blob(LocalBlob(str(path)))


def write(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return path


def by_tarfile(path: Path) -> list[Member]:
    with tarfile.open(path) as archive:
        return [Member(info.name, info.offset_data, info.size) for info in archive if info.isreg()]


MEMBERS = [(f"s/{i:03d}.txt", bytes([i]) * size) for i, size in enumerate([0, 1, 511, 512, 513, 5000, 0, 10])]


@pytest.mark.parametrize("format", FORMATS)
def test_members_are_those_of_tarfile(tmp_path: Path, format: str) -> None:
    names = [(f"{LONG}-{i}.txt", b"x" * 700 * i) for i in range(4)]
    if format != "ustar":
        names += [("ü" * 90 + ".txt", b"umlaut"), ("x" * 300 + ".bin", b"longest")]
    path = write(tmp_path / "a.tar", MEMBERS + names + MEMBERS[:2], FORMATS[format])
    found = list(walk(path))
    assert found == by_tarfile(path)
    content = path.read_bytes()
    assert [content[m.offset : m.offset + m.size] for m in found] == [
        payload for _, payload in MEMBERS + names + MEMBERS[:2]
    ]


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_members_are_those_of_gnu_tar(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "in"
    for i in range(5):
        (folder / f"sub{i}").mkdir(parents=True)
        (folder / f"sub{i}" / f"{'n' * (60 if format == 'v7' else 90)}{i}.txt").write_bytes(b"y" * 333 * i)
    path = tmp_path / "a.tar"
    subprocess.run(["tar", "-C", folder, f"--format={format}", "-cf", path, "."], check=True)
    found = list(walk(path))
    assert len(found) == 5
    assert found == by_tarfile(path)


def test_pax_global_header_and_size_record(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "hello = world"}) as archive:
        info = tarfile.TarInfo("a.txt")
        info.size, info.pax_headers = 600, {"size": "600", "mtime": "1.5"}
        archive.addfile(info, io.BytesIO(b"z" * 600))
        archive.addfile(tarfile.TarInfo("b.txt"))
    assert list(walk(path)) == by_tarfile(path)
    assert [member.size for member in walk(path)] == [600, 0]


def test_base_256_size_beyond_eight_gigabytes(tmp_path: Path) -> None:
    path, size = tmp_path / "a.tar", 9 << 30
    info = tarfile.TarInfo("big.bin")
    info.size = size
    with open(path, "wb") as file:  # sparse on disk
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(BLOCK + size)
        file.seek(0, io.SEEK_END)
        file.write(tarfile.TarInfo("next.txt").tobuf() + bytes(2 * BLOCK))
    assert list(walk(path)) == [Member("big.bin", BLOCK, size), Member("next.txt", 2 * BLOCK + size, 0)]


def test_directories_are_skipped_and_long_zero_tails_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("folder/a.txt"))
    with open(path, "ab") as file:
        file.write(bytes(3 << 20))
    assert [member.name for member in walk(path)] == ["folder/a.txt"]


def test_every_flipped_bit_of_a_header_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", MEMBERS)
    content, target = bytearray(path.read_bytes()), by_tarfile(path)[5]
    header = target.offset - BLOCK
    for byte in [*range(0, 260, 7), 148, 156, 257, 345, 511]:
        damaged = bytearray(content)
        damaged[header + byte] ^= 0x04
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.tar: byte {header}: .*after member 's/004\.txt'"):
            list(walk(path))


@pytest.mark.parametrize("cut", [1, 100, BLOCK, BLOCK + 10, 5 * BLOCK])
def test_cut_at_and_inside_members(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "a.tar", MEMBERS)
    content, header = path.read_bytes(), by_tarfile(path)[5].offset - BLOCK
    path.write_bytes(content[: header + cut])
    with pytest.raises(DataError, match=rf"a\.tar: byte {header}: .*('s/005\.txt'|after member 's/004\.txt')"):
        list(walk(path))


def test_missing_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", MEMBERS)
    end = by_tarfile(path)[-1].offset + BLOCK
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(DataError, match=rf"byte {end}: .*end block is missing \(after member 's/007\.txt'\)"):
        list(walk(path))


def test_zeroed_page_in_the_middle(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", MEMBERS)
    content, header = bytearray(path.read_bytes()), by_tarfile(path)[2].offset - BLOCK
    content[header : header + 4096] = bytes(4096)
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"byte {header}: zeros .* data again at byte {header + 4096}"):
        list(walk(path))


def test_garbage_after_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", MEMBERS)
    size = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=f"data again at byte {size}"):
        list(walk(path))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.CHRTYPE, "character device"),
        (tarfile.FIFOTYPE, "fifo"),
        (tarfile.GNUTYPE_SPARSE, "sparse file"),
        (b"Q", "unknown type 'Q'"),
    ],
)
def test_what_is_no_plain_file_is_refused(tmp_path: Path, kind: bytes, words: str) -> None:
    special = tarfile.TarInfo("odd.txt")
    special.type, special.linkname = kind, "s/001.txt"
    path = write(tmp_path / "a.tar", MEMBERS)
    end = by_tarfile(path)[-1].offset + BLOCK
    path.write_bytes(path.read_bytes()[:end] + special.tobuf() + bytes(2 * BLOCK))
    with pytest.raises(DataError, match=rf"byte {end}: member 'odd\.txt': is a .*{words}"):
        list(walk(path))


def test_gnu_sparse_file_in_pax_form(tmp_path: Path) -> None:
    with open(tmp_path / "hole.bin", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x" * 4096)
    path = tmp_path / "a.tar"
    subprocess.run(["tar", "-C", tmp_path, "--format=posix", "-Scf", path, "hole.bin"], check=True)
    with pytest.raises(DataError, match=r"is a sparse file"):
        list(walk(path))


@pytest.mark.parametrize("payload", [b"30 path\n", b"999 path=a\n", b"x", b"12 path=abc"])
def test_malformed_pax_header(tmp_path: Path, payload: bytes) -> None:
    header = tarfile.TarInfo("PaxHeaders/a")
    header.type, header.size = tarfile.XHDTYPE, len(payload)
    path = tmp_path / "a.tar"
    block = header.tobuf(tarfile.USTAR_FORMAT) + payload.ljust(BLOCK, b"\0")
    path.write_bytes(block + tarfile.TarInfo("a.txt").tobuf() + bytes(2 * BLOCK))
    with pytest.raises(DataError, match="byte 0: malformed PAX header"):
        list(walk(path))


def test_pax_records_with_zeros_behind_them_and_without_a_value(tmp_path: Path) -> None:
    path, member = tmp_path / "a.tar", tarfile.TarInfo("y.txt")
    member.size = 2
    for size, records, name in ((BLOCK, b"20 path=a/bcdef.txt\n", "a/bcdef.txt"), (16, b"8 size=\n8 path=\n", "y.txt")):
        head = tarfile.TarInfo("PaxHeaders/a")
        head.type, head.size = tarfile.XHDTYPE, size
        blocks = [
            head.tobuf(tarfile.USTAR_FORMAT),
            records.ljust(BLOCK, b"\0"),
            member.tobuf(),
            b"hi".ljust(BLOCK, b"\0"),
        ]
        path.write_bytes(b"".join(blocks) + bytes(2 * BLOCK))
        assert list(walk(path)) == [Member(name, 3 * BLOCK, 2)]
        assert size == 16 or list(walk(path)) == by_tarfile(path)  # tarfile takes `size=` for 0


@pytest.mark.parametrize("magic", [b"ustar\x0000", b"ustar  \0", b"ustar00\0", bytes(8)])
def test_a_prefix_is_part_of_the_name_whatever_the_magic(tmp_path: Path, magic: bytes) -> None:
    for prefix, name in ((b"dir/p", "dir/p/y.txt"), (b"14716341234", "y.txt")):  # the time of GNU tar --incremental
        block = bytearray(tarfile.TarInfo("y.txt").tobuf(tarfile.USTAR_FORMAT))
        block[257:265], block[345 : 345 + len(prefix)] = magic, prefix
        block[148:156] = b"%06o\0 " % (8 * ord(" ") + sum(block[:148]) + sum(block[156:]))
        (tmp_path / "a.tar").write_bytes(bytes(block) + bytes(2 * BLOCK))
        found = list(walk(tmp_path / "a.tar"))
        gnu = magic[:6] == b"ustar "
        assert found == (by_tarfile(tmp_path / "a.tar") if prefix == b"dir/p" or not gnu else [Member(name, BLOCK, 0)])


def test_extension_header_without_its_member(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("n" * 200, b"")], tarfile.GNU_FORMAT)
    path.write_bytes(path.read_bytes()[: 2 * BLOCK] + bytes(2 * BLOCK))
    with pytest.raises(DataError, match="after an extension header"):
        list(walk(path))


@pytest.mark.parametrize("mode", ["gz", "xz", "bz2"])
def test_compressed_archives_are_named(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, f"w:{mode}") as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match="-compressed: unpack it"):
        list(walk(path))


@pytest.mark.parametrize(("content", "words"), [(b"", "empty"), (b"text " * 300, "not a tar archive"), (b"a", "cut")])
def test_other_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(walk(path))
