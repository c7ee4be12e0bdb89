"""Packing for tests, and reading what was packed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import webdataset

from trainer.data.index import SIDECAR
from trainer.data.shard_spec import expand
from trainer.data.tools.pack import Options, pack_inputs

POEM = "\n\n".join(f"Stanza {i}, line one\r\nand its line two: ü {i * i}" for i in range(60)) + "\n"
CLI = [sys.executable, "-c", "from launch.cli import main; main()", "data"]


def pack(inputs: Path | list[Path], out: Path, piece_bytes: int = 1 << 20, workers: int = 1, **options) -> dict:
    """The description of what was packed."""
    inputs = [inputs] if isinstance(inputs, Path) else inputs
    pack_inputs(inputs, out, Options(**options), workers=workers, piece_bytes=piece_bytes)
    return json.loads((out / "dataset.json").read_text())


def read(out: Path, split: str = "*") -> dict[str, dict[str, bytes]]:
    """Key -> members, read by webdataset."""
    samples = webdataset.WebDataset(expand(str(out / f"{split}-*.tar")), shardshuffle=False)
    return {s["__key__"]: {k: v for k, v in s.items() if not k.startswith("__")} for s in samples}


def contents(out: Path) -> dict[str, bytes]:
    """All files but the indexes, which hold times."""
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.endswith(SIDECAR)}


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def alive(session: int) -> bool:
    """Whether a process of the session is there."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                return True
    return False
