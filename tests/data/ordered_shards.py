"""Shards for tests of the stage in loaders, written by the webdataset library itself."""

from __future__ import annotations

from typing import Any

import pytest
import webdataset

from trainer.data.ordered_samples import OrderedSamples

SIZES = (7, 1, 12, 5)
N = sum(SIZES)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, paths = tmp_path_factory.mktemp("shards"), []
    for number, size in enumerate(SIZES):
        paths.append(str(folder / f"{number}.tar"))
        with webdataset.TarWriter(paths[-1]) as writer:
            for i in range(size):
                writer.write({"__key__": f"{number}-{i}", "txt": f"text {number} {i}", "json": {"label": i}})
    return paths


def make(shards: str | list[str], **options: Any) -> OrderedSamples:
    return OrderedSamples(shards, **{"seed": 3, "lanes": 4, "window": 2, **options})
