"""Shards of small texts, and what is in them, read without any of the code under test."""

from __future__ import annotations

import tarfile
from pathlib import Path
from random import Random

from webdataset import TarWriter

SEPARATOR = 256


def write_shards(folder: Path, counts: list[int], lengths: tuple[int, ...] = (0, 1, 5, 23, 24, 60, 90)) -> list[str]:
    """Shards of texts of random characters, some of them of several bytes."""
    random, paths = Random(11), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, count in enumerate(counts):
        paths.append(str(folder / f"s-{number}.tar"))
        with TarWriter(paths[-1]) as tar:
            for i in range(count):
                text = "".join(random.choices("abc dé\nf日", k=random.choice(lengths)))
                tar.write({"__key__": f"doc{number}-{i:03d}", "txt": text})
    return paths


def read_tokens(paths: list[str]) -> dict[tuple[str, str], list[int]]:
    """(shard, key) -> byte tokens and the separator, in listed order."""
    tokens = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                tokens[Path(path).name, member.name.split(".")[0]] = [*content.read(), SEPARATOR]
    return tokens
