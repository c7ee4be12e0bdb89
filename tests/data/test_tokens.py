"""The token line: encoded once, kept, shared by ranks; and shards that hold token ids already."""

from __future__ import annotations

import hashlib
import os
import pickle
import resource
import tarfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset import TarWriter

from tests.data.ranks import on_ranks
from tests.data.texts import read_tokens, write_shards
from trainer.data import recent_cache
from trainer.data import tokens as module
from trainer.data.packing import Packed
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
        ConfigError, match=r"odd\.tar: sample 'd0': 3 bytes are not a whole number of 2-byte token ids"
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
    for path in (tmp_path / "cache" / "tokens").iterdir():
        path.unlink()
    replace_keeping_times(Path(paths[0]), lambda content: content.replace(b"a", b"z"))
    with pytest.raises(DataError, match=r"gives other tokens than when the run began"):
        other.read(0, 5)


def replace_keeping_times(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Puts another file in a shard's place, of its size and times."""
    before, beside = path.stat(), path.with_suffix(".new")
    beside.write_bytes(change(path.read_bytes()))
    os.utime(beside, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(beside, path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def one_record(folder: Path, letter: str) -> None:
    """A shard `a.tar` that differs from others like it by its text alone."""
    folder.mkdir()
    with TarWriter(str(folder / "a.tar"), mtime=0) as tar:
        tar.write({"__key__": "record", "txt": letter * 8})
    os.utime(folder / "a.tar", (1e9, 1e9))


def test_two_data_sets_of_one_relative_path_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, letter in (("one", "A"), ("two", "B")):
        one_record(tmp_path / folder, letter)
        monkeypatch.chdir(tmp_path / folder)
        assert bytes(line_of(["a.tar"], tmp_path / "cache").read(0, 8).tolist()) == letter.encode() * 8


def test_another_shard_of_one_path_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As containers have them: /data/a.tar in each, with the times of the archive it came from."""
    encoded: list[int] = []
    original = TokenLine._encode
    monkeypatch.setattr(TokenLine, "_encode", lambda self, number: encoded.append(number) or original(self, number))
    one_record(tmp_path / "in", "A")
    path = tmp_path / "in" / "a.tar"
    first = line_of([str(path)], tmp_path / "cache")
    replace_keeping_times(path, lambda content: content.replace(b"AAAAAAAA", b"BBBBBBBB"))
    second = line_of([str(path)], tmp_path / "cache")
    assert bytes(second.read(0, 8).tolist()) == b"BBBBBBBB"
    assert first.fingerprint != second.fingerprint
    assert bytes(first.read(0, 8).tolist()) == b"AAAAAAAA"  # a run that goes on beside has its own
    assert encoded == [0, 0]
    replace_keeping_times(path, lambda content: content)  # a copy: its text is compared, not encoded
    for _ in range(2):
        assert bytes(line_of([str(path)], tmp_path / "cache").read(0, 8).tolist()) == b"BBBBBBBB"
    assert encoded == [0, 0]


@pytest.mark.parametrize("what", ["*.tokens", "*.ends.npy"])
def test_kept_tokens_that_are_damaged_are_made_anew_and_told(
    what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bytes in the middle are other ones, as a disk or a killed node leaves them; the size is right."""
    paths = write_shards(tmp_path / "in", [9])
    line = line_of(paths, tmp_path / "cache")
    expected = line.read(0, line.total).tolist()
    (path,) = (tmp_path / "cache" / "tokens").glob(what)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    capfd.readouterr()
    again = line_of(paths, tmp_path / "cache")
    assert again.fingerprint == line.fingerprint
    assert again.read(0, again.total).tolist() == expected
    assert path.read_bytes() == whole
    told = capfd.readouterr().err
    assert told.count("the kept tokens of") == 1
    assert paths[0] in told
    assert line_of(paths, tmp_path / "cache").read(0, line.total).tolist() == expected
    assert capfd.readouterr().err == ""


def test_kept_tokens_are_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not each time that a shard is opened again."""
    paths = write_shards(tmp_path / "in", [5, 6, 7])
    monkeypatch.setattr(recent_cache, "open_room", lambda: 1)
    line, opened, hashed = line_of(paths, tmp_path / "cache"), [], []
    original, sha256 = TokenLine._load, hashlib.sha256
    monkeypatch.setattr(TokenLine, "_load", lambda self, n: opened.append(n) or original(self, n))
    monkeypatch.setattr(module.hashlib, "sha256", lambda content=b"": hashed.append(len(content)) or sha256(content))
    sizes = np.diff(line.starts).tolist()
    for _ in range(3):
        line.read(0, line.total)
    assert opened == [0, 1, 2] * 3
    assert [hashed.count(size) for size in sizes] == [1, 1, 1]


@pytest.mark.slow
def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    """The limit is shared by all that keeps shards open: shards of each source, their tokens, how they are packed."""
    paths = write_shards(tmp_path / "in", [1] * 120, lengths=(5, 9))
    lines = [line_of(paths, tmp_path / "cache") for _ in range(2)]
    packed = [Packed(line, 4, packing="best_fit") for line in lines]
    used = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 100, hard))
    try:
        for units in packed:
            assert all(units.read(unit, 0) for unit in range(units.n))
            assert len({units.entry(unit)[0].shard for unit in range(units.n)}) == 120
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_share_the_work_and_know_the_same(tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, on one disk or each with its own: every shard encoded by one of them; errors are everybody's."""
    paths = write_shards(tmp_path / "in", [5, 6, 7, 8, 9])
    expected = line_of(paths, tmp_path / "alone")
    encoded: list[int] = []
    original = TokenLine._encode
    monkeypatch.setattr(TokenLine, "_encode", lambda self, n: encoded.append(n) or original(self, n))
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


def test_special_tokens_that_are_taken_for_text_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """At each start, also where they are encoded already; by one of the ranks."""
    trained = train_bpe(["abc abc"] * 20, 280)
    trained.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    for number in range(3):
        with TarWriter(str(tmp_path / f"{number}.tar")) as tar:
            tar.write({"__key__": "chat", "txt": "<|im_start|>abc<|im_end|><|im_start|>"})
    paths, tokenizer = [str(tmp_path / f"{number}.tar") for number in range(3)], JsonTokenizer(trained.to_str())
    for _ in range(2):
        capfd.readouterr()
        on_ranks(2, lambda team: line_of(paths, tmp_path / "cache", tokenizer=tokenizer, team=team))
        assert capfd.readouterr().err.count("special tokens are spelled out 9 times in the texts") == 1
    tokenizer = JsonTokenizer(trained.to_str(), special_tokens=True)
    assert line_of(paths, tmp_path / "cache", tokenizer=tokenizer).total < 30
    assert "special tokens" not in capfd.readouterr().err


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
    with pytest.raises(ConfigError, match=r"a\.tar: sample 'b': 3 bytes are not a whole number") as error:
        TokenLine(shards, ByteTokenizer(), tmp_path)
    assert error.value.exit_code == 3
    line = TokenLine(shards, ByteTokenizer(), tmp_path, tolerant=True)
    assert [fault.key for fault in line.faults] == ["b"]
    assert line.total == 4
    assert line.read(0, 2).tolist() == [1, 2]
    with pytest.raises(DataError, match=r"a\.tar: sample 'c': token id 65535, but data\.tokenizer has 257 tokens"):
        line.read(0, 4)
