"""`onecurve data pack`: requests and inputs that are refused, before anything or leaving nothing."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from tests.data.packs import pack
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"one document", {}, "1 samples are too few"),
        (b"", {"validation": 0}, "0 samples are too few"),
        (b"ok\n\xff\xfe", {"split": "lines"}, r"in\.txt: is not UTF-8 text \(at byte 3\)"),
        (b"text", {"split": "chapters", "validation": 1.0}, r"(?s)'chapters' is none of.*from 0 to below 1, not 1\.0"),
        (b"text", {"tokenizer": "bpe:12"}, "at least 257"),
        (b"text", {"tokenizer": "/no/where"}, "No such file"),
        (b"text", {"field": "a/b"}, "cannot be stored"),
        (b"text", {"field": ""}, "--field: needs a name"),
        (b"text", {"field": "json", "keep_json": True}, "--keep-json makes a member of this name"),
    ],
)
def test_bad_requests_leave_nothing(tmp_path: Path, content: bytes, options: dict, words: str) -> None:
    (tmp_path / "in.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        pack(tmp_path / "in.txt", tmp_path / "out", **options)
    assert os.listdir(tmp_path) == ["in.txt"]


def test_what_a_worker_finds_is_told_the_same(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n' * 50 + "{}\n" + '{"text": "a"}\n' * 50)
    with pytest.raises(ConfigError, match=r"in\.jsonl: cannot be read: line 51: has no 'text'") as raised:
        pack(path, tmp_path / "out", 100, workers=2, tokenizer="bytes")
    assert len(raised.value.problems) == 1
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": 1}\n', r"line 2: has no 'text' \(--text-field\); it has: body"),
        ("a.jsonl", b'{"text": 7}\n', r"line 1: 'text' \(--text-field\) is a number, not a string"),
        ("a.jsonl", b'{"text": null}\n', "line 1: 'text' .*is null, not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: 'text' .*is not Unicode text"),
        ("a.jsonl", b"[1]\n", "line 1: is not a JSON object but a list"),
        ("a.jsonl", b'{"text": "a"}\n{"text":\n', r"line 2: is not JSON: Expecting value \(character 10\)"),
        ("a.jsonl", b'{"text": "a", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", "line 1: is nested too deeply"),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-9], "cannot be read"),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:15] + b"\xff" * 30, "cannot be read"),
        ("a.txt.xz", b"nothing", "cannot be read"),
        ("a.pdf", b"%PDF", r"no \.txt"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}: .*{words}"):
        pack(tmp_path / name, tmp_path / "out", validation=0, piece_bytes=16)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("value", "words"), [("NaN", "NaN and Infinity cannot"), ("-Infinity", "NaN"), ('"\\ud800"', "not Unicode text")]
)
def test_what_json_cannot_keep_is_named(tmp_path: Path, value: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "x": ' + value + "}\n")
    with pytest.raises(ConfigError, match=rf"a\.jsonl: cannot be read: line 2: --keep-json: .*{words}"):
        pack(tmp_path / "a.jsonl", tmp_path / "out", keep_json=True)
    assert pack(tmp_path / "a.jsonl", tmp_path / "out", validation=0, tokenizer="bytes")["splits"]["train"]


def test_parquet_that_has_not_one_text_a_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, options = tmp_path / "a.parquet", {"validation": 0, "tokenizer": "bytes"}
    for columns, given, words in (
        ([("text", ["a", None])], {}, r"row 1: 'text' \(--text-field\) is null; leave such rows out"),
        ([("text", ["a", "b"]), ("x", [1.0, float("nan")])], {"keep_json": True}, "row 1: --keep-json: NaN"),
        ([("text", ["a", "b"]), ("x", [b"1", b"2"])], {"keep_json": True}, "row 0: --keep-json: a field that holds"),
        ([("text", ["a"]), ("text", ["b"])], {}, "has two columns 'text': rename one"),
        ([("text", ["a"]), ("x", [1]), ("x", [2])], {"keep_json": True}, "has two columns 'x'"),
    ):
        names = [name for name, _ in columns]
        parquet.write_table(pyarrow.table([pyarrow.array(values) for _, values in columns], names=names), path)
        with pytest.raises(ConfigError, match=rf"a\.parquet: .*{words}"):
            pack(path, tmp_path / "out", **options, **given)
    assert pack(path, tmp_path / "out", **options)["splits"]["train"]["samples"] == 1  # the others are not looked at


def test_an_input_that_comes_twice(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    os.symlink("in", tmp_path / "link")
    path = tmp_path / "in" / "a.txt"
    for inputs, words in (
        ([path, path], f"{path}: is given twice"),
        ([tmp_path / "in", tmp_path / "link"], f"{tmp_path}/link: is given twice"),
        ([tmp_path / "link" / "a.txt", tmp_path / "in"], f"{tmp_path}/link/a.txt: lies in {tmp_path}/in, which is"),
    ):
        with pytest.raises(ConfigError) as raised:
            pack(inputs, tmp_path / "out")
        assert [problem[: len(words)] for problem in raised.value.problems] == [words]


def test_a_folder_that_cannot_become_the_data_set(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    os.symlink("real", tmp_path / "link")
    (tmp_path / "a.txt").write_text("text")
    for out, words in ((tmp_path / "link", "is a link; give what it leads to"), (Path("/proc"), "is a mount point")):
        with pytest.raises(ConfigError, match=f"{out}: {words}"):
            pack(tmp_path / "a.txt", out)
    assert not list(tmp_path.glob(".*"))


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "gone", tmp_path / "in" / "a.txt")
    with pytest.raises(ConfigError) as raised:
        pack([tmp_path / "no", tmp_path / "in"], tmp_path / "out")
    assert f"{tmp_path}/no: missing or empty" in raised.value.problems
    assert f"{tmp_path}/in/a.txt: is a link to nothing" in raised.value.problems
