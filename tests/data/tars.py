"""Small shards, written by Python's tarfile; and what webdataset makes of shards."""

from __future__ import annotations

import io
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import webdataset

from trainer.data.storage import Storage


def storage(cache: Path, **options: Any) -> Storage:
    return Storage(cache / "cache", **options)


def write(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return str(path)


def make(folder: Path, shards: int = 3, samples: int = 7) -> list[str]:
    """Shards s-00.tar, ... of samples dir/SHARD-NUMBER with members txt and seg.JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write(
            folder / f"s-{s:02d}.tar",
            [
                (f"dir/{s}-{i}.{ext}", f"{ext} {s} {i} ".encode() * (40 * i))
                for i in range(samples)
                for ext in ("txt", "seg.JSON")
            ],
        )
        for s in range(shards)
    ]


def by_webdataset(paths: list[str]) -> list[dict[str, Any]]:
    return list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))


def open_below(folder: Path) -> int:
    """Files below `folder` that this process holds open now."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the listing's own, gone by now
            count += os.readlink(link).startswith(f"{folder}/")
    return count
