"""Other people's indexes: which of their names are of a shard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.tars import make, storage
from trainer.data.external_indexes import ENERGON_INFO, SIZES, WIDS, ExternalCounts


def told(shard: str, name: str, content: Any) -> int | None:
    place = Path(shard).parent / name
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(content))
    store = storage(Path(shard).parent)
    count = ExternalCounts(store).count(store.open(shard))
    place.unlink()
    return count and count.samples


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"s-00.tar": 3, "sub/s-00.tar": 5}, 3),
        ({"./s-00.tar": 3}, 3),
        ({"sub/s-00.tar": 5}, None),  # of another folder
        ({"s-00.tar": 3, "./s-00.tar": 5}, None),
    ],
)
def test_names_are_relative_to_the_folder(tmp_path: Path, names: dict[str, int], expected: int | None) -> None:
    (shard,) = make(tmp_path, 1)
    assert told(shard, ENERGON_INFO, {"shard_counts": names}) == expected
    assert told(shard, SIZES, names) == expected


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        (["s-00.tar"], 3),
        (["made/elsewhere/s-00.tar"], 3),
        (["https://host/a/s-00.tar?sig=1"], 3),
        (["a/s-00.tar", "b/s-00.tar"], None),  # which of them it is cannot be known
    ],
)
def test_wids_tells_where_shards_were(tmp_path: Path, urls: list[str], expected: int | None) -> None:
    (shard,) = make(tmp_path, 1)
    listed = [{"url": url, "nsamples": 3 + i} for i, url in enumerate(urls)]
    assert told(shard, WIDS, {"wids_version": 1, "shardlist": listed}) == expected
