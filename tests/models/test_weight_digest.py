"""The digest of weights that checkpoints leave out: by every byte, over several ranks, kept until a file changes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from trainer.data.shared_work import ALONE
from trainer.models.weight_files import digest_of_contents, fingerprint


def test_a_number_in_the_middle_counts_though_times_are_set_back(tmp_path: Path) -> None:
    """A fingerprint looks at both ends of a file alone."""
    path, cache = tmp_path / "model.safetensors", tmp_path / "cache"
    save_file({name: torch.zeros(50_000) for name in ("a", "b", "c")}, path)
    ends, whole = fingerprint([path]), digest_of_contents([path], ALONE, cache)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    time.sleep(0.05)  # file systems count in ticks
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\1")
    os.utime(path, ns=times)
    assert fingerprint([path]) == ends
    assert digest_of_contents([path], ALONE, cache) != whole


def test_it_is_read_once(tmp_path: Path) -> None:
    path, cache = tmp_path / "model.safetensors", tmp_path / "cache"
    save_file({"a": torch.zeros(8)}, path)
    whole = digest_of_contents([path], ALONE, cache)
    (kept,) = (cache / "weights").iterdir()
    kept.write_text("0" * 64)
    assert digest_of_contents([path], ALONE, cache) != whole  # as what is kept says
    kept.write_text("0" * 8)  # of a disk that was full
    assert digest_of_contents([path], ALONE, cache) == whole
    (tmp_path / "file").write_text("")
    assert digest_of_contents([path], ALONE, tmp_path / "file") == whole  # nothing can be kept there
