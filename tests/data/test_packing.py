from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import TarWriter

from trainer.data import ledger
from trainer.data.index import Shards
from trainer.data.order import Order
from trainer.data.packing import Documents, Lane, Piece
from trainer.data.tokenizer import ByteTokenizer
from trainer.errors import DataError

TEXTS = ["", "a", "bc", "", "déf", "x" * 37, "ghijk\n", "日本", "lm", "nopqrstuvw"]


def documents(folder: Path, payloads: list[bytes], cache_bytes: int = 1 << 20) -> Documents:
    with TarWriter(str(folder / "s-0.tar")) as tar:
        for i, payload in enumerate(payloads):
            tar.write({"__key__": f"k{i}", "txt": payload})
    return Documents(Shards([str(folder / "s-0.tar")], "txt"), ByteTokenizer(), cache_bytes)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return documents(tmp_path_factory.mktemp("texts"), [text.encode() for text in TEXTS])


def expected_tokens(sample: int) -> list[int]:
    return [*TEXTS[sample].encode(), 256]


def test_a_document_is_its_tokens_and_a_separator(texts: Documents) -> None:
    for sample in range(len(TEXTS)):
        tokens = texts.tokens(sample)
        assert tokens.dtype == np.int32
        assert tokens.tolist() == expected_tokens(sample)
        with pytest.raises(ValueError, match="read-only"):
            tokens[0] = 1


@pytest.mark.parametrize("room", [0, 40, 400, 10_000])
def test_cache_is_bounded_and_does_not_change_tokens(tmp_path: Path, room: int) -> None:
    held = documents(tmp_path, [text.encode() for text in TEXTS], cache_bytes=room)
    for sample in [*range(10), *range(9, -1, -1), 5, 5, 5]:
        assert held.tokens(sample).tolist() == expected_tokens(sample)
        kept = [tokens.nbytes for tokens in held._cache.values()]
        assert sum(kept) == room - held._room <= room


def test_what_is_cached_is_encoded_once(tmp_path: Path) -> None:
    held = documents(tmp_path, [b"abc", b"de"])
    assert held.tokens(0) is held.tokens(0)


def test_a_sample_that_is_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s-0\.tar: sample 'k1' is not UTF-8 text \(at its byte 2\)"):
        documents(tmp_path, [b"fine", b"ab\xff"]).tokens(1)


@settings(max_examples=120, deadline=None)
@given(
    lanes=st.integers(1, 12),
    lane=st.integers(0, 11),
    plan=st.lists(st.tuples(st.booleans(), st.integers(1, 50)), min_size=1, max_size=30),
    reopen=st.booleans(),
)
def test_a_lane_is_the_endless_concatenation_of_its_documents(
    texts: Documents, lanes: int, lane: int, plan: list[tuple[bool, int]], reopen: bool
) -> None:
    order = Order(len(TEXTS), lanes, 2, 2, seed=4)
    number = lane % order.lanes
    stream, origin = [], []  # the lane by definition: every token, and (epoch, index, sample, offset) of each
    for epoch in count():
        if len(stream) > sum(length for _, length in plan):
            break
        for index in range(order.lane_size(number)):
            sample = order.sample(epoch, number, index)
            stream += expected_tokens(sample)
            origin += [(epoch, index, sample, offset) for offset in range(len(expected_tokens(sample)))]
    walker, at = Lane(number, order, texts, (0, 0, 0)), 0
    for read, length in plan:
        if reopen:
            walker = Lane(number, order, texts, walker.cursor)
        if read:
            row = np.full(length + 1, -7, dtype=np.int64)
            pieces = walker.read(row)
            assert row.tolist() == stream[at : at + length + 1]
            taken = [(sample, offset) for sample, first, end in pieces for offset in range(first, end)]
            assert taken == [(sample, offset) for _, _, sample, offset in origin[at : at + length]]
        else:
            walker.skip(length)
        at += length
        epoch, index, _, offset = origin[at]
        assert walker.cursor == (epoch, index, offset)


def test_impossible_cursors_are_refused(texts: Documents) -> None:
    order = Order(len(TEXTS), 5, 2, 2, seed=4)
    for cursor in [(0, 2, 0), (-1, 0, 0), (0, 0, -1)]:
        with pytest.raises(ValueError, match="lane 1 has 2 samples an epoch"):
            Lane(1, order, texts, cursor)
    with pytest.raises(DataError, match="the run stands at its token 999"):
        Lane(1, order, texts, (0, 0, 999)).skip(1)


def test_ledger_rows_are_in_global_order_whatever_the_order_of_the_parts() -> None:
    def pieces(*numbers: int) -> list[list[Piece]]:
        return [[Piece("s.tar", f"k{number}", 0, 3), Piece("s.tar", "z", number, 9)] for number in numbers]

    parts = [
        (2, 7, 3, pieces(7, 10)),
        (1, 0, 3, pieces(0, 3)),
        (2, 6, 3, pieces(6, 9)),
        (1, 2, 3, pieces(2, 5)),
        (2, 8, 3, pieces(8, 11)),
        (1, 1, 3, pieces(1, 4)),
    ]
    rows = ledger.rows(parts)
    assert [row["step"] for row in rows] == [1, 2]
    assert [sample[0][1] for row in rows for sample in row["samples"]] == [f"k{number}" for number in range(12)]
    assert rows[1]["samples"][0] == [["s.tar", "k6", 0, 3], ["s.tar", "z", 6, 9]]
    with pytest.raises(ValueError, match="4 of the 6 sequences of step 2"):
        ledger.rows(parts[1:])
    with pytest.raises(ValueError, match=r"sequences \[7, 10\] of step 2 twice"):
        ledger.rows([*parts, parts[0]])
