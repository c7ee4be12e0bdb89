"""`onecurve data pack`: the same bytes from any number of processes, any partition and any number of kills."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import re
import subprocess
import tarfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.packs import POEM, contents, pack, read
from trainer.data.index import SIDECAR, ShardIndex
from trainer.data.shard_spec import expand
from trainer.data.shards import Shards
from trainer.data.storage import Storage
from trainer.data.tokenizer import load
from trainer.data.tools import documents
from trainer.data.tools.documents import SplitOptions, sources
from trainer.data.tools.pack import Options, pack_inputs
from trainer.errors import ConfigError
from trainer.randomness import key as random_key


def by_hand(samples: list[tuple[str, bytes]], shard_bytes: int) -> list[bytes]:
    """The shards of some texts, by tarfile."""
    shards, file = [], None
    for key, content in samples:
        if file is None:
            file = io.BytesIO()
            tar = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        info = tarfile.TarInfo(f"{key}.txt")
        info.size, info.mode = len(content), 0o444
        tar.addfile(info, io.BytesIO(content))
        if tar.offset >= shard_bytes:
            tar.close()
            shards.append(file.getvalue())
            file = None
    if file is not None:
        tar.close()
        shards.append(file.getvalue())
    return shards


def lines_of(path: Path, key: str) -> list[tuple[str, bytes]]:
    found, at = [], 0
    for line in path.read_bytes().split(b"\n"):
        if line.strip():
            found.append((f"{key}/{at:012d}", line.rstrip(b"\r")))
        at += len(line) + 1
    return found


@pytest.mark.parametrize("piece_bytes", [100, 1999, 1 << 20])
def test_shards_are_those_of_one_writer_without_pieces(tmp_path: Path, piece_bytes: int) -> None:
    path = tmp_path / "poem.txt"
    path.write_bytes(POEM.encode())
    pack(path, tmp_path / "out", piece_bytes, split="lines", validation=0.2, tokenizer="bytes", shard_bytes=20_000)
    samples = lines_of(path, "poem")
    held = {key for key, _ in samples if random_key("validation", key) < 0.2 * 2**63}
    assert 10 < len(held) < 40
    for split, chosen in (("validation", held), ("train", {key for key, _ in samples} - held)):
        paths = expand(str(tmp_path / "out" / f"{split}-*.tar"))
        found = [Path(path).read_bytes() for path in paths]
        assert found == by_hand([sample for sample in samples if sample[0] in chosen], 20_000)
        assert len(found) > 1
        for path_of in paths:
            storage = Storage(tmp_path / "cache")
            kept = ShardIndex.load(Path(path_of + SIDECAR), path_of, storage.stamp(path_of))
            assert kept is not None
            assert kept == ShardIndex.build(storage.open(path_of))
            listed = subprocess.run(["tar", "-tf", path_of], capture_output=True, check=True, text=True)
            assert listed.stdout.split() == [f"{key}.txt" for key in kept.keys]
            assert listed.stderr == ""
    assert not list(tmp_path.glob(".*"))


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    random, folder = Random(3), tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for i in range(30):
        (folder / "sub" / f"{i}.md").write_text(f"# {i}\n" * random.randrange(1, 40))
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": "x" * i, "n": i}) + "\n" for i in range(300)))
    first = (folder / "lines.jsonl").read_text().splitlines(keepends=True)[0]
    (folder / "more.jsonl.gz").write_bytes(gzip.compress((folder / "lines.jsonl").read_bytes()))
    options = {"tokenizer": "bpe:300", "keep_json": True, "shard_bytes": 30_000, "validation": 0.1}
    made = [pack(folder, tmp_path / f"out{workers}", 2000, workers, **options) for workers in (1, 3)]
    assert made[0] == made[1]
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")
    assert made[0]["splits"]["train"]["samples"] + made[0]["splits"]["validation"]["samples"] == 30 + 2 * 299
    assert read(tmp_path / "out1")[f"in/lines/{len(first):012d}"] == {"txt": b"x", "json": b'{"n":1}'}


PARTS = ["a", "é", " ", "\n", "\n\n", "\r\n", "\u3000", "\xa0\n", "bcd "]
TEXT = st.lists(st.sampled_from(PARTS), max_size=60).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=TEXT, split=st.sampled_from(["lines", "paragraphs"]), size=st.integers(1, 30), bom=st.booleans())
def test_a_file_gives_the_same_documents_in_pieces(
    tmp_path_factory: pytest.TempPathFactory, text: str, split: str, size: int, bom: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    found = sources([(path, path.parent)], set())
    whole, parted = (
        [
            document
            for piece in documents.pieces(found, SplitOptions(split), n)
            for document, _ in piece.documents(SplitOptions(split))
        ]
        for n in (1 << 30, size)
    )
    assert parted == whole
    lines = text.split("\n")
    if split == "paragraphs":
        blocks = "\n".join(line if line.strip() else "" for line in lines)
        lines = re.split(r"\n{2,}", blocks.strip("\n")) if blocks.strip() else []
    assert [document.text for document in whole] == [line.rstrip("\r\n") for line in lines if line.strip()]
    for document in whole:  # the key says where it begins
        at = int(document.key.rpartition("/")[2])
        assert path.read_bytes()[at:].decode("utf-8-sig").startswith(document.text)


def test_paragraphs_longer_than_what_is_searched_at_once(tmp_path: Path) -> None:
    text = "\n".join("x" * 200_000 for _ in range(3)) + "\n\nlast\n"
    (tmp_path / "a.txt").write_text(text)
    pack(tmp_path / "a.txt", tmp_path / "out", 70_000, split="paragraphs", validation=0, tokenizer="bytes")
    assert [len(sample["txt"]) for sample in read(tmp_path / "out").values()] == [600_002, 4]


def test_kinds_of_input(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "v1.2").mkdir(parents=True)
    (folder / "a.txt").write_text("plain", encoding="utf-8-sig")
    (folder / "a.md").write_text("# mark")
    (folder / "v1.2" / "b.c.txt.xz").write_bytes(lzma.compress(b"packed\r\n"))
    (folder / "d.TXT.gz").write_bytes(gzip.compress(b"zipped", mtime=0))
    (folder / "blank.txt").write_text(" \n")
    (folder / "skipped.bin").write_bytes(b"\0")
    (folder / ".hidden.txt").write_text("hidden")
    os.symlink("..", folder / "v1.2" / "back")
    (tmp_path / "e.jsonl").write_text('{"text": "one"}\n\n{"text": "two\\n", "id": 7}\n{"text": ""}\n')
    options = Options(validation=0, tokenizer="chars", field="text.txt", keep_json=True)
    left_out = pack_inputs([folder, tmp_path / "e.jsonl"], tmp_path / "out", options)
    assert left_out == [folder / "skipped.bin"]
    assert read(tmp_path / "out") == {
        "in/a": {"text.txt": b"# mark"},
        "in/a~1": {"text.txt": b"plain"},
        "in/d": {"text.txt": b"zipped"},
        "in/v1-2/b-c": {"text.txt": b"packed\r\n"},
        "e/000000000000": {"text.txt": b"one", "json": b"{}"},
        "e/000000000017": {"text.txt": b"two\n", "json": b'{"id":7}'},
    }
    made = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert made["sources"] == ["a.md", "a.txt", "blank.txt", "d.TXT.gz", "b.c.txt.xz", "e.jsonl"]
    assert made["splits"]["validation"] == {"samples": 0, "bytes": 0, "chars": 0, "shards": None}


def test_what_is_held_out_depends_on_the_key_alone(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    files = sorted(tmp_path.glob("*.txt"))
    pack(files, tmp_path / "a", validation=0.3, tokenizer="bytes")
    pack(files[::-1], tmp_path / "b", validation=0.3, tokenizer="bytes")
    assert read(tmp_path / "a", "validation") == read(tmp_path / "b", "validation")
    assert read(tmp_path / "a", "train") == read(tmp_path / "b", "train")


@pytest.mark.parametrize(("tokenizer", "field", "dtype"), [("bpe:300", "u16", "<u2"), ("wide", "u32", "<u4")])
def test_token_ids_are_those_that_text_gives(tmp_path: Path, tokenizer: str, field: str, dtype: str) -> None:
    (tmp_path / "poem.txt").write_bytes(POEM.encode())
    if tokenizer == "wide":  # a vocabulary of more than 65,536
        vocabulary = {"<|endoftext|>": 70_000, "a": 1, "S": 66_000}
        model = {"type": "BPE", "vocab": vocabulary, "merges": []}
        tokenizer = str(tmp_path / "tokenizer.json")
        added = {"id": 70_000, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False}
        added |= {"normalized": False, "special": True}
        Path(tokenizer).write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": [added]}))
    options = {"split": "paragraphs", "tokenizer": tokenizer, "shard_bytes": 20_000}
    text = pack(tmp_path / "poem.txt", tmp_path / "text", **options)
    made = pack(tmp_path / "poem.txt", tmp_path / "ids", 500, tokenize=True, **options)
    assert made["field"] == field
    assert made["tokenizer"] == text["tokenizer"]  # trained on the same, in pieces or not
    loaded, expected = load(str(tmp_path / "ids")), read(tmp_path / "text")
    found = read(tmp_path / "ids")
    assert found.keys() == expected.keys()
    for key, members in found.items():
        ids = np.frombuffer(members[field], dtype)
        assert ids.tolist() == [*loaded.encode(expected[key]["txt"].decode()), loaded.separator]
    told = [made["splits"][split] for split in ("train", "validation")]
    assert sum(split["tokens"] for split in told) == sum(len(m[field]) for m in found.values()) // int(dtype[2])
    assert [split["chars"] for split in told] == [text["splits"][s]["chars"] for s in ("train", "validation")]


def test_token_ids_are_read_as_they_are(tmp_path: Path) -> None:
    from trainer.data.tokens import TokenLine

    (tmp_path / "poem.txt").write_bytes(POEM.encode())
    options = {"split": "lines", "tokenizer": "bpe:280", "validation": 0}
    for name, tokenize in (("text", False), ("ids", True)):
        pack(tmp_path / "poem.txt", tmp_path / name, tokenize=tokenize, **options)
    lines = []
    for name, field in (("text", "txt"), ("ids", "u16")):
        shards = Shards.open(str(tmp_path / name / "train-*.tar"), field, Storage(tmp_path / "cache"))
        line = TokenLine(shards, load(str(tmp_path / name)), tmp_path / "cache")
        lines.append(line.read(0, line.total).tolist())
    assert lines[0] == lines[1]
    assert len(lines[0]) > 1000


def test_tokenizer_is_trained_on_the_train_split(tmp_path: Path) -> None:
    (tmp_path / "poem.txt").write_bytes(POEM.encode())
    options = {"split": "paragraphs", "validation": 0.3}
    made = pack(tmp_path / "poem.txt", tmp_path / "a", tokenizer="chars", **options)
    texts = [sample["txt"].decode() for sample in read(tmp_path / "a", "train").values()]
    assert load(str(tmp_path / "a")).vocab_size == made["tokenizer"]["vocab_size"] == 2 + len(set("".join(texts)))
    given = tmp_path / "a" / "tokenizer.json"
    again = pack(tmp_path / "poem.txt", tmp_path / "b", tokenizer=str(given), **options)
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == given.read_bytes()
    assert again["tokenizer"]["made"] == "tokenizer.json"


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"row {i}" if i % 7 else "" for i in range(3000)]
    table = pyarrow.table({"body": texts, "n": range(3000), "at": [np.datetime64("2020-01-01", "us")] * 3000})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=100)
    options = {"text_field": "body", "validation": 0, "tokenizer": "bytes"}
    for workers, piece_bytes in ((1, 1 << 20), (2, 3000)):
        pack(tmp_path / "t.parquet", tmp_path / f"o{workers}", piece_bytes, workers, keep_json=True, **options)
    assert contents(tmp_path / "o1") == contents(tmp_path / "o2")
    found = read(tmp_path / "o1")
    assert len(found) == sum(map(bool, texts))
    assert found["t/000000002999"]["txt"] == b"row 2999"
    assert json.loads(found["t/000000002999"]["json"]) == {"n": 2999, "at": "2020-01-01 00:00:00"}
    with pytest.raises(ConfigError, match=r"t\.parquet: has no column 'text' .*it has: body, n, at"):
        pack(tmp_path / "t.parquet", tmp_path / "o3", validation=0)
    with pytest.raises(ConfigError, match="holds int64, not strings"):
        pack(tmp_path / "t.parquet", tmp_path / "o3", validation=0, text_field="n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ConfigError, match=r"bad\.parquet: cannot be read"):
        pack(tmp_path / "bad.parquet", tmp_path / "o3", validation=0)
    assert not (tmp_path / "o3").exists()


def test_folders_of_images(tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    for name in ("dog", "cat"):
        (folder / name / "deep").mkdir(parents=True)
        for i in range(12):
            (folder / name / f"{i}.1.JPG").write_bytes(f"{name} {i}".encode())
    (folder / "cat" / "0.1.txt").write_text("a caption")
    (folder / "cat" / "0.1.json").write_text("{}")
    (folder / "dog" / "1.1.cls").write_text("77")
    (folder / "dog" / "deep" / "x.png").write_bytes(b"png")
    (folder / "notes.txt").write_text("of no image")
    options = Options(shard_bytes=10_000, kind="images")
    for workers in (1, 2):
        left_out = pack_inputs([folder], tmp_path / f"o{workers}", options, workers=workers, piece_bytes=9)
        assert left_out == [folder / "notes.txt"]
    (folder / "notes.txt").unlink()
    assert contents(tmp_path / "o1") == contents(tmp_path / "o2")
    assert json.loads((tmp_path / "o1" / "classes.json").read_text()) == {"cat": 0, "dog": 1}
    found = read(tmp_path / "o1")
    assert len(found) == 25
    assert found["pets/cat/0-1"] == {"jpg": b"cat 0", "txt": b"a caption", "json": b"{}", "cls": b"0"}
    assert found["pets/dog/1-1"] == {"jpg": b"dog 1", "cls": b"77"}
    assert found["pets/dog/deep/x"] == {"png": b"png", "cls": b"1"}
    made = json.loads((tmp_path / "o1" / "dataset.json").read_text())
    assert made["classes"] == 2
    assert "tokenizer" not in made
    assert made["splits"]["validation"]["samples"] > 0
    pack(folder, tmp_path / "o3", labels=False)
    assert read(tmp_path / "o3")["pets/cat/1-1"] == {"jpg": b"cat 1"}
    assert not (tmp_path / "o3" / "classes.json").exists()
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ConfigError, match="text and images cannot be in one data set"):
        pack([folder, tmp_path / "text.txt"], tmp_path / "o4")
    (folder / "cat" / "1.1.jpg").write_bytes(b"another")
    with pytest.raises(ConfigError, match="upper and lower case"):
        pack(folder, tmp_path / "o4")


def test_indexes_of_shards_with_fields_that_some_samples_lack(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(9):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(b"x")
        for extension in ("cls", "txt")[: i % 3]:  # numbered in another order than a piece that begins without them
            (tmp_path / "in" / f"{i}.{extension}").write_text("1")
    for shard_bytes in (1, 5000):
        pack(tmp_path / "in", tmp_path / f"o{shard_bytes}", 4, validation=0, shard_bytes=shard_bytes)
        paths = expand(str(tmp_path / f"o{shard_bytes}" / "*.tar"))
        assert len(paths) == (9 if shard_bytes == 1 else 3)
        for path in paths:
            storage = Storage(tmp_path / "cache")
            kept = ShardIndex.load(Path(path + SIDECAR), path, storage.stamp(path))
            assert kept == ShardIndex.build(storage.open(path))
