"""The token line: encoded once, kept, shared by ranks; and shards that hold token ids already."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset import TarWriter

from tests.data.ranks import on_ranks
from tests.data.texts import read_tokens, write_shards
from trainer.data import tokens as module
from trainer.data.shards import Shards
from trainer.data.storage import Storage
from trainer.data.tokenizer import ByteTokenizer, JsonTokenizer, load, train_bpe
from trainer.data.tokens import TokenLine
from trainer.data.tools.pack import Options, pack_inputs
from trainer.errors import ConfigError, DataError


def line_of(paths: list[str], cache: Path, field: str = "txt", **options: Any) -> TokenLine:
    shards = Shards.open(paths, field, Storage(cache), tolerant=options.get("tolerant", False))
    return TokenLine(shards, options.pop("tokenizer", None) or ByteTokenizer(), cache, **options)


def test_the_line_is_all_documents_in_order(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "in", [17, 1, 29, 14])
    documents = read_tokens(paths)
    text = list(chain.from_iterable(documents.values()))
    line = line_of(paths, tmp_path / "cache")
    assert line.total == len(text)
    assert line.read(0, line.total).tolist() == text
    for first, count in ((0, 1), (5, 700), (len(text) - 3, 3), (len(text) - 3, 50), (len(text), 4)):
        assert line.read(first, count).tolist() == text[first : first + count]
    found = [
        (*line.shards.name(int(line.shards.starts[s]) + d), first, end)
        for s, d, first, end in line.documents(0, len(text))
    ]
    assert found == [(*name, 0, len(tokens)) for name, tokens in documents.items()]
    again = pickle.loads(pickle.dumps(line))
    assert again.read(100, 50).tolist() == text[100:150]


def test_text_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_shards(tmp_path / "in", [5, 6])
    tokenizer = JsonTokenizer(train_bpe(["abc dé f日 abc abc"] * 20, 300).to_str())
    line = line_of(paths, tmp_path / "cache", tokenizer=tokenizer)
    expected = line.read(0, line.total).tolist()
    encoded: list[str] = []
    original = JsonTokenizer.encode
    monkeypatch.setattr(JsonTokenizer, "encode", lambda self, text: encoded.append(text) or original(self, text))
    again = line_of(paths, tmp_path / "cache", tokenizer=tokenizer)
    assert again.read(0, again.total).tolist() == expected
    assert encoded == []
    kept = next((tmp_path / "cache" / "tokens").glob("*.tokens"))
    kept.write_bytes(kept.read_bytes()[:-2])  # cut short: made anew
    assert line_of(paths, tmp_path / "cache", tokenizer=tokenizer).read(0, 9999).tolist() == expected
    assert len(encoded) in (5, 6)
    os.utime(paths[0])  # another shard by its stamp
    assert line_of(paths, tmp_path / "cache", tokenizer=tokenizer).read(0, 9999).tolist() == expected
    assert len(encoded) >= 10
    other = line_of(paths, tmp_path / "cache")
    assert other.total == sum(map(len, read_tokens(paths).values()))


def test_shards_of_token_ids_are_read_as_they_are(tmp_path: Path) -> None:
    documents = [[5, 6, 256], [256], [255, 1, 256], [*range(257), *range(43), 256]]
    for field, kind in (("u16", "<u2"), ("u32", "<u4")):
        path = str(tmp_path / f"{field}.tar")
        with TarWriter(path) as tar:
            for i, ids in enumerate(documents):
                tar.write({"__key__": f"d{i}", field: np.array(ids, kind).tobytes()})
        line = line_of([path], tmp_path / "cache", field)
        text = list(chain.from_iterable(documents))
        assert line.total == len(text)
        assert line.read(2, 303).tolist() == text[2:305]
        assert not (tmp_path / "cache" / "tokens").exists()
        assert pickle.loads(pickle.dumps(line)).read(0, 5).tolist() == text[:5]
    with TarWriter(str(tmp_path / "odd.tar")) as tar:
        tar.write({"__key__": "d0", "u16": b"123"})
    with pytest.raises(
        ConfigError, match=r"odd\.tar: sample 'd0': 3 bytes are no whole number of 2-byte token ids"
    ) as e:
        line_of([str(tmp_path / "odd.tar")], tmp_path / "cache", "u16")
    assert e.value.exit_code == DataError.exit_code


def test_token_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 50 + "".join(map(chr, range(32, 127))))
    for tokenizer in ("bytes", "chars"):
        options = Options(validation=0, tokenizer=tokenizer, tokenize=True)
        pack_inputs([text], tmp_path / tokenizer, options)
    shard = str(tmp_path / "chars" / "train-000000.tar")
    assert line_of([shard], tmp_path / "cache", "u16", tokenizer=load(str(tmp_path / "chars" / "tokenizer.json"))).total
    with pytest.raises(ConfigError, match=r"chars holds token ids of another tokenizer; set data.tokenizer=.*r.json"):
        line_of([f"file://{shard}"], tmp_path / "cache", "u16")
    assert line_of([str(tmp_path / "bytes" / "train-000000.tar")], tmp_path / "cache", "u16").total
    os.rename(shard, tmp_path / "bytes" / "foreign.tar")  # a shard that dataset.json does not tell of
    assert line_of([str(tmp_path / "bytes" / "foreign.tar")], tmp_path / "cache", "u16").total


def bad_shards(folder: Path) -> list[str]:
    folder.mkdir()
    for name, broken in (("a", 3), ("b", None), ("c", 0)):
        with TarWriter(str(folder / f"{name}.tar")) as tar:
            for i in range(5):
                tar.write({"__key__": f"{name}{i}", "txt": b"ab\xff" if i == broken else b"xyz"})
    return [str(folder / f"{name}.tar") for name in "abc"]


def test_text_that_is_none_fails_or_is_left_out(tmp_path: Path) -> None:
    paths = bad_shards(tmp_path / "in")
    at = {}
    for path, key in ((paths[0], "a3"), (paths[2], "c0")):
        with tarfile.open(path) as tar:
            at[key] = tar.getmember(f"{key}.txt").offset_data + 2
    for _ in range(2):  # also when it is known already
        with pytest.raises(ConfigError) as caught:
            line_of(paths, tmp_path / "cache")
        assert caught.value.exit_code == DataError.exit_code
        assert caught.value.problems == [
            f"{paths[0]}: byte {at['a3']}: sample 'a3' is not UTF-8 text",
            f"{paths[2]}: byte {at['c0']}: sample 'c0' is not UTF-8 text",
        ]
    line = line_of(paths, tmp_path / "cache", tolerant=True)
    assert [(Path(str(fault.shard)).name, fault.key, fault.byte) for fault in line.faults] == [
        ("a.tar", "a3", at["a3"]),
        ("c.tar", "c0", at["c0"]),
    ]
    assert line.total == 13 * 4
    assert len(list(line.documents(0, line.total))) == 13


def test_a_text_that_cannot_be_read_now_is_not_kept_as_a_bad_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_shards(tmp_path / "in", [5, 6])
    whole = line_of(paths, tmp_path / "whole")
    reads, original = list[int](), Shards.read

    def outage(shards: Shards, v: int) -> Any:
        reads.append(v)
        if v == 7:
            raise DataError("the network is down")
        return original(shards, v)

    for tolerant in (False, True):
        monkeypatch.setattr(Shards, "read", outage)
        with pytest.raises(ConfigError, match="the network is down") as caught:
            line_of(paths, tmp_path / "cache", tolerant=tolerant)
        assert caught.value.exit_code == DataError.exit_code
        assert max(reads) == 7  # and no further
    monkeypatch.undo()
    line = line_of(paths, tmp_path / "cache", tolerant=True)
    assert (line.total, line.faults, line.fingerprint) == (whole.total, [], whole.fingerprint)


def test_tokens_that_are_made_anew_must_be_the_same(tmp_path: Path) -> None:
    """The cache is emptied under a run, and the shard has another text by then."""
    paths = write_shards(tmp_path / "in", [5, 6])
    line, other = (line_of(paths, tmp_path / "cache") for _ in range(2))
    text = line_of(paths, tmp_path / "elsewhere").read(0, 9999).tolist()
    for path in (tmp_path / "cache" / "tokens").iterdir():
        path.unlink()
    assert line.read(0, 9999).tolist() == text
    for path in (tmp_path / "cache" / "tokens").glob("*.json"):
        about = json.loads(path.read_text())
        path.write_text(json.dumps(about | {"sha256": "of another text"}))
    with pytest.raises(DataError, match=r"gives other tokens than when the run began"):
        other.read(0, 5)


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_share_the_work_and_know_the_same(tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, on one disk or each with its own: every shard encoded by one of them; errors are everybody's."""
    paths = write_shards(tmp_path / "in", [5, 6, 7, 8, 9])
    expected = line_of(paths, tmp_path / "alone")
    encoded: list[int] = []
    original = TokenLine._encode
    monkeypatch.setattr(TokenLine, "_encode", lambda self, n, path: encoded.append(n) or original(self, n, path))
    lines = on_ranks(3, lambda team: line_of(paths, tmp_path / ("disk" if shared else f"disk{team.rank}"), team=team))
    assert sorted(encoded) == [0, 1, 2, 3, 4]
    for line in lines:
        assert (line.total, line.starts.tolist()) == (expected.total, expected.starts.tolist())
        assert line.read(0, line.total).tolist() == expected.read(0, expected.total).tolist()
    assert len(encoded) == (5 if shared else 15)

    bad = bad_shards(tmp_path / "bad")
    errors = on_ranks(3, lambda team: line_of(bad, tmp_path / f"bad{team.rank}", team=team))
    assert len({str(error) for error in errors}) == 1
    assert "'a3'" in str(errors[0])
    assert "'c0'" in str(errors[0])


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "in", [3])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"data\.cache=.*file: tokens cannot be kept there"):
        line_of(paths, tmp_path / "file")
    assert module.FORMAT


def test_stored_ids_that_are_none(tmp_path: Path) -> None:
    """Half an id is found at the start, and quarantine leaves it out; an id beyond the vocabulary when it is read."""
    with TarWriter(str(tmp_path / "a.tar")) as tar:
        for key, content in (("a", b"\1\0\2\0"), ("b", b"\1\0\2"), ("c", b"\5\0\xff\xff")):
            tar.write({"__key__": key, "u16": content})
    shards = Shards.open(str(tmp_path / "a.tar"), "u16", Storage(tmp_path / "cache"), tolerant=True)
    with pytest.raises(ConfigError, match=r"a\.tar: sample 'b': 3 bytes are no whole number") as error:
        TokenLine(shards, ByteTokenizer(), tmp_path)
    assert error.value.exit_code == 3
    line = TokenLine(shards, ByteTokenizer(), tmp_path, tolerant=True)
    assert [fault.key for fault in line.faults] == ["b"]
    assert line.total == 4
    assert line.read(0, 2).tolist() == [1, 2]
    with pytest.raises(DataError, match=r"a\.tar: sample 'c': token id 65535, but data\.tokenizer has 257 tokens"):
        line.read(0, 4)
