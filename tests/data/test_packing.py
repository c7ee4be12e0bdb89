"""Documents to sequences: against token lists that are cut and packed by hand."""

from __future__ import annotations

import math
import pickle
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.texts import SEPARATOR, read_tokens, write_shards
from trainer.data import packing as module
from trainer.data import recent_cache
from trainer.data.packing import NO_TARGET, Packed, best_fit
from trainer.data.shards import Shards
from trainer.data.storage import Storage
from trainer.data.tokenizer import ByteTokenizer
from trainer.data.tokens import TokenLine

Documents = dict[tuple[str, str], list[int]]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_shards(tmp_path_factory.mktemp("shards"), [17, 1, 29, 14])


@pytest.fixture(scope="module")
def documents(paths: list[str]) -> Documents:
    return read_tokens(paths)


@pytest.fixture(scope="module")
def line(paths: list[str], tmp_path_factory: pytest.TempPathFactory) -> TokenLine:
    cache = tmp_path_factory.mktemp("cache")
    return TokenLine(Shards.open(paths, "txt", Storage(cache)), ByteTokenizer(), cache)


def rows(packed: Packed) -> list[dict[str, list[int]]]:
    read = [packed.read(unit, 0) for unit in range(packed.n)]
    assert all(array.dtype == np.int64 for row in read for array in row.values())
    return [{name: array.tolist() for name, array in row.items()} for row in read]


@pytest.mark.parametrize("length", [1, 7, 24, 100, 100_000])
def test_concat_cuts_the_line_of_all_documents(line: TokenLine, documents: Documents, length: int) -> None:
    packed, text = Packed(line, length), list(chain.from_iterable(documents.values()))
    assert packed.n == -(-len(text) // length)
    for unit, row in enumerate(rows(packed)):
        here = text[unit * length : (unit + 1) * length]
        following = text[unit * length + 1 : (unit + 1) * length + 1]
        assert row["inputs"] == here + [0] * (length - len(here))
        assert row["targets"] == following + [NO_TARGET] * (length - len(following))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("length", [1, 7, 24, 100])
def test_the_ledger_covers_every_token_once(line: TokenLine, documents: Documents, packing: str, length: int) -> None:
    packed = Packed(line, length, packing=packing)
    covered: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for unit, row in enumerate(rows(packed)):
        pieces = packed.entry(unit)
        tokens = [token for shard, name, first, end in pieces for token in documents[shard, name][first:end]]
        assert row["inputs"][: len(tokens)] == tokens
        assert 0 < len(tokens) <= length
        for shard, name, first, end in pieces:
            covered.setdefault((shard, name), []).append((first, end))
    assert covered.keys() == documents.keys()
    for document, spans in covered.items():
        spans.sort()
        assert [spans[0][0], *(end for _, end in spans)] == [first for first, _ in spans] + [len(documents[document])]
        if packing == "best_fit":
            assert len(spans) == -(-len(documents[document]) // length)  # cut only as often as it must be


@pytest.mark.parametrize(("packing", "mask"), [("concat", True), ("best_fit", True), ("best_fit", False)])
@pytest.mark.parametrize("length", [1, 7, 24, 100])
def test_masks_positions_and_targets_end_with_each_document(
    line: TokenLine, documents: Documents, packing: str, mask: bool, length: int
) -> None:
    packed = Packed(line, length, packing=packing, document_mask=mask)
    for unit, row in enumerate(rows(packed)):
        expected: dict[str, list[int]] = {"inputs": [], "targets": [], "documents": [], "positions": []}
        for number, (shard, name, first, end) in enumerate(packed.entry(unit)):
            tokens = documents[shard, name]
            expected["inputs"] += tokens[first:end]
            expected["targets"] += [*tokens[first + 1 : end + 1], *([NO_TARGET] if end == len(tokens) else [])]
            expected["documents"] += [number] * (end - first)
            expected["positions"] += range(end - first)
        padding = {"inputs": 0, "targets": NO_TARGET, "documents": -1, "positions": 0}
        wanted = {name: values + [padding[name]] * (length - len(values)) for name, values in expected.items()}
        assert row == {name: wanted[name] for name in (wanted if mask else ("inputs", "targets"))}


@settings(max_examples=300, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), max_size=60), room=st.sampled_from([30, 31, 64]))
def test_best_fit_is_best_fit_decreasing(sizes: list[int], room: int) -> None:
    bins, rests = [], []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = [(rest, -number) for number, rest in enumerate(rests) if rest >= sizes[i]]
        if fits:
            tightest = min(rest for rest, _ in fits)
            number = next(n for n, rest in enumerate(rests) if rest == tightest)
        else:
            number = len(bins)
            bins.append(0)
            rests.append(room)
        bins[number] += 1
        rests[number] -= sizes[i]
    found = best_fit(sizes, room)
    assert sorted(chain.from_iterable(found)) == list(range(len(sizes)))
    assert all(chosen == sorted(chosen) and sum(sizes[i] for i in chosen) <= room for chosen in found)
    # Which of two equally full bins takes an item is free; how full the bins get is not.
    assert sorted(room - sum(sizes[i] for i in chosen) for chosen in found) == sorted(rests)


def test_best_fit_wastes_little(line: TokenLine) -> None:
    packed = Packed(line, 100, packing="best_fit")
    assert packed.n <= line.total / 100 + len(line.starts) - 1  # a bin that is not full, a shard


def test_the_separator_ends_each_document(documents: Documents) -> None:
    assert all(tokens[-1] == SEPARATOR for tokens in documents.values())


def test_documents_of_nothing(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [5], lengths=(0,))
    packed = Packed(TokenLine(Shards.open(paths, "txt", Storage(tmp_path)), ByteTokenizer(), tmp_path), 3)
    assert [row["inputs"] for row in rows(packed)] == [[SEPARATOR] * 3, [SEPARATOR, SEPARATOR, 0]]


def test_best_fit_is_worked_out_once_and_kept(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    packed_anew: list[int] = []
    original = module.best_fit
    monkeypatch.setattr(module, "best_fit", lambda sizes, room: packed_anew.append(room) or original(sizes, room))
    monkeypatch.setattr(recent_cache, "open_room", lambda: 1)

    def packed(length: int) -> list[Any]:
        made = Packed(
            TokenLine(Shards.open(paths, "txt", Storage(cache)), ByteTokenizer(), cache), length, packing="best_fit"
        )
        order = [unit * 7 % made.n for unit in range(2 * made.n)]
        assert math.gcd(7, made.n) == 1
        rows = [made.read(unit, 0)["inputs"].tolist() for unit in order]
        assert rows == [pickle.loads(pickle.dumps(made)).read(unit, 0)["inputs"].tolist() for unit in order]
        return rows

    first = packed(64)
    assert packed_anew == [64] * 4
    assert packed(64) == first
    assert packed_anew == [64] * 4
    for kept in (cache / "tokens").glob("*.best_fit-1-64.npy"):
        content = bytearray(kept.read_bytes())
        content[128] ^= 1  # the first number: its piece would be another sequence's
        kept.write_bytes(content)
    assert packed(64) == first
    assert packed_anew[:8] == [64] * 8
