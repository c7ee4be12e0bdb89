"""Files that are whole or not there: against the old content, full disks, and many writers at once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainer.files import replace_file, sha256


@pytest.mark.parametrize("content", [b"", b"new", memoryview(b"a new one")[2:]])
def test_a_file_is_made_or_replaced(tmp_path: Path, content: bytes | memoryview) -> None:
    (tmp_path / "old").write_bytes(b"old" * 100)
    for name in ("old", "none"):
        replace_file(tmp_path / name, content)
        assert (tmp_path / name).read_bytes() == bytes(content)
    assert sorted(os.listdir(tmp_path)) == ["none", "old"]


def test_who_reads_the_old_file_goes_on_reading_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with (tmp_path / "file").open("rb") as reader:
        replace_file(tmp_path / "file", b"new")
        assert reader.read() == b"old"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    code = """
import resource, sys
from pathlib import Path
from trainer.files import replace_file
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    replace_file(Path(sys.argv[1]), bytes(2000))
except OSError as error:
    print(error.strerror)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "File too large\n"
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_many_writers_at_once_leave_the_file_of_one(tmp_path: Path) -> None:
    contents = [bytes([number]) * 100_000 for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: replace_file(tmp_path / "file", content), contents))
    assert (tmp_path / "file").read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("size", [0, 5, 1 << 20, (2 << 20) + 3])
def test_sha256_is_hashlibs(tmp_path: Path, size: int) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()
