"""Packing: the shards read back in webdataset and tarfile, are the same every time, and never half there."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import webdataset

from launch.data import add_commands
from trainer.data import write
from trainer.data.index import SIDECAR, ShardIndex, Shards, expand
from trainer.data.tokenizer import load
from trainer.data.write import ShardWriter, pack, pack_text
from trainer.errors import ConfigError, DataError, OnecurveError

POEM = "\n\n".join(f"Stanza {i}, line one\r\nand its line two: ü {i * i}" for i in range(60)) + "\n"


def read_all(spec: str | Path) -> dict[str, str]:
    samples = webdataset.WebDataset(expand(str(spec)), shardshuffle=False)
    return {sample["__key__"]: sample["txt"].decode() for sample in samples}


def packed(out: Path, **options) -> tuple[dict[str, str], dict[str, str], dict]:
    """Train texts, validation texts and description of a packed dataset, read by webdataset."""
    made = json.loads((out / "dataset.json").read_text())
    splits = [made["splits"][name]["shards"] for name in ("train", "validation")]
    return *(read_all(out / shards) if shards else {} for shards in splits), made  # type: ignore[return-value]


def test_any_samples_read_back_in_order(tmp_path: Path) -> None:
    samples = [(f"café/{i:03d}", {"png": os.urandom(i * 37), "seg.json": b"{}" * i}) for i in range(40)]
    samples.append(("k" * 200, {"png": b"long", "seg.json": b""}))
    pack(iter(samples), tmp_path / "out", "img", shard_bytes=20_000)
    paths = expand(str(tmp_path / "out" / "img-*.tar"))
    assert len(paths) > 2
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        name for path in paths for name in (os.path.basename(path), os.path.basename(path) + SIDECAR)
    )
    found = [
        (s["__key__"], {"png": s["png"], "seg.json": s["seg.json"]})
        for s in webdataset.WebDataset(paths, shardshuffle=False)
    ]
    assert found == samples
    assert all(os.path.getsize(path) % tarfile.RECORDSIZE == 0 for path in paths)
    assert [ShardIndex.load(Path(path + SIDECAR), path) for path in paths] == [ShardIndex.build(p) for p in paths]
    with tarfile.open(paths[0]) as archive:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.mode) for info in archive} == {(0, 0, 0, "", 0o444)}
    assert subprocess.run(["tar", "-tf", paths[-1]], capture_output=True, check=True).stderr == b""


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "poem.txt").write_bytes(POEM.encode())
    for name in ("a", "b"):
        pack_text(
            [tmp_path / "poem.txt"],
            tmp_path / name,
            split="paragraphs",
            tokenizer="bpe:300",
            shard_bytes=9000,
        )
    first, second = (json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("a", "b"))
    assert first == second
    for name, digest in first["sha256"].items():
        assert hashlib.sha256((tmp_path / "b" / name).read_bytes()).hexdigest() == digest
    assert len(first["sha256"]) == 1 + sum(name.endswith(".tar") for name in os.listdir(tmp_path / "a"))


@pytest.mark.parametrize(
    ("split", "texts"),
    [
        ("paragraphs", POEM.rstrip("\n").split("\n\n")),
        ("lines", [line for line in POEM.replace("\r", "").split("\n") if line]),
    ],
)
def test_every_document_is_in_one_split(tmp_path: Path, split: str, texts: list[str]) -> None:
    (tmp_path / "poem.txt").write_bytes(POEM.encode())
    pack_text([tmp_path / "poem.txt"], tmp_path / "out", split=split, validation=0.2, tokenizer="bytes")
    train, validation, made = packed(tmp_path / "out")
    assert [text for _, text in sorted((train | validation).items())] == texts
    assert not train.keys() & validation.keys()
    assert 0.05 < len(validation) / len(texts) < 0.4
    for name, found in (("train", train), ("validation", validation)):
        told = made["splits"][name]
        assert told["samples"] == len(found)
        assert told["bytes"] == sum(len(text.encode()) for text in found.values())
        assert told["chars"] == sum(map(len, found.values()))
    assert made["tokenizer"]["load"] == "bytes"
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_what_is_held_out_depends_on_the_key_alone(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    files = sorted(tmp_path.glob("*.txt"))
    pack_text(files, tmp_path / "a", validation=0.3, tokenizer="bytes")
    pack_text(files[::-1], tmp_path / "b", validation=0.3, tokenizer="bytes")
    assert packed(tmp_path / "a")[:2] == packed(tmp_path / "b")[:2]


def test_kinds_of_input(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "v1.2").mkdir(parents=True)
    (folder / "a.txt").write_text("plain", encoding="utf-8-sig")
    (folder / "a.md").write_text("# mark")
    (folder / "v1.2" / "b.c.txt.xz").write_bytes(lzma.compress(b"packed\r\n"))
    (folder / "d.TXT.gz").write_bytes(gzip.compress(b"zipped", mtime=0))
    (folder / "blank.txt").write_text(" \n")
    (folder / "skipped.bin").write_bytes(b"\0")
    (tmp_path / "e.jsonl").write_text('{"text": "one"}\n\n{"text": "two\\n", "id": 7}\n{"text": ""}\n')
    pack_text(
        [folder, tmp_path / "e.jsonl"],
        tmp_path / "out",
        validation=0,
        tokenizer="chars",
        field="text.TXT".lower(),
    )
    shards = Shards.open(str(tmp_path / "out" / "train-*.tar"), "text.txt")
    found = {shards.name(v)[1]: shards.read(v).decode() for v in range(shards.n)}
    assert found == {
        "in/a": "# mark",
        "in/a~1": "plain",
        "in/d": "zipped",
        "in/v1-2/b-c": "packed\r\n",
        "e/00000000": "one",
        "e/00000002": "two\n",
    }
    made = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert made["sources"] == ["a.md", "a.txt", "blank.txt", "d.TXT.gz", "b.c.txt.xz", "e.jsonl"]
    assert made["splits"]["validation"] == {"samples": 0, "bytes": 0, "chars": 0, "shards": None}


def test_tokenizer_is_trained_on_the_train_split(tmp_path: Path) -> None:
    (tmp_path / "poem.txt").write_bytes(POEM.encode())
    pack_text([tmp_path / "poem.txt"], tmp_path / "a", split="paragraphs", tokenizer="chars", validation=0.3)
    train, _, made = packed(tmp_path / "a")
    assert (
        load(str(tmp_path / "a")).vocab_size == made["tokenizer"]["vocab_size"] == 2 + len(set("".join(train.values())))
    )
    pack_text(
        [tmp_path / "poem.txt"],
        tmp_path / "b",
        split="lines",
        tokenizer=str(tmp_path / "a" / "tokenizer.json"),
    )
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert packed(tmp_path / "b")[2]["tokenizer"]["made"] == "tokenizer.json"


def test_large_texts_are_sampled_for_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "TOKENIZER_SAMPLE", 100)
    pack(((f"{i}", {"txt": bytes([65 + i]) * 10}) for i in range(26)), tmp_path / "out")
    assert [text[0] for text in write._texts([str(tmp_path / "out" / "train-000000.tar")], "txt")] == list("ADGJMPSVY")


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"one document", {}, "1 documents are too few"),
        (b"", {"validation": 0}, "0 documents are too few"),
        (b"\xff\xfe", {}, r"in\.txt: is not UTF-8"),
        (
            b"text",
            {"split": "chapters", "validation": 1.0},
            r"(?s)'chapters' is none of.*from 0 to below 1, not 1\.0",
        ),
        (b"text", {"tokenizer": "bpe:12"}, "at least 257"),
        (b"text", {"tokenizer": "/no/where"}, "No such file"),
        (b"text", {"field": "a/b"}, "cannot be stored"),
    ],
)
def test_bad_requests_leave_nothing(tmp_path: Path, content: bytes, options: dict, words: str) -> None:
    (tmp_path / "in.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        pack_text([tmp_path / "in.txt"], tmp_path / "out", **options)
    assert os.listdir(tmp_path) == ["in.txt"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": 1}\n', "line 2 is not a JSON object with a string 'text'"),
        ("a.jsonl", b'{"text": 7}\n', "line 1"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1"),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-9], "cannot be read"),
        ("a.txt.xz", b"nothing", "cannot be read"),
        ("a.pdf", b"%PDF", r"no \.txt"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}: .*{words}"):
        pack_text([tmp_path / name], tmp_path / "out", validation=0)
    assert os.listdir(tmp_path) == [name]


def test_existing_folders_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    pack([("a", {"txt": b"1"})], out)
    before = sorted(os.listdir(out))
    with pytest.raises(ConfigError, match="exists already"):
        pack([("b", {"txt": b"2"})], out)
    assert sorted(os.listdir(out)) == before
    with pytest.raises(ConfigError, match="no samples"):
        pack([], tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        pack([("a", {"txt": b"1"})], tmp_path / "file" / "out")
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


@pytest.mark.parametrize("key", ["a.b", "", "__a__/b", ".x", "a/", "dir/b.c"])
def test_keys_that_readers_would_misread(tmp_path: Path, key: str) -> None:
    writer = ShardWriter(tmp_path, "x")
    with pytest.raises(ConfigError, match="cannot be stored"):
        writer.add(key, {"txt": b""} if key != "a/" else {})
    assert not os.listdir(tmp_path)


def test_a_key_that_comes_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="key 'a' comes back"):
        pack([("a", {"txt": b""}), ("b", {"txt": b""}), ("a", {"txt": b""})], tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_a_killed_packer_leaves_no_dataset(tmp_path: Path) -> None:
    code = """
import itertools, sys
from pathlib import Path
from trainer.data.write import pack
pack(((f"{i:09d}", {"txt": b"x" * 1000}) for i in itertools.count()), Path(sys.argv[1]), shard_bytes=100_000)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob(".out.*/*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".out.*/*.tar"))
    assert not (tmp_path / "out").exists()
    pack([("a", {"txt": b"1"})], tmp_path / "out")
    assert Shards.open(str(tmp_path / "out" / "*.tar"), "txt").n == 1


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from trainer.data.write import pack
from trainer.errors import ConfigError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    pack(((f"{i:09d}", {"txt": b"x" * 1000}) for i in range(1000)), Path(sys.argv[1]))
except ConfigError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert "out: cannot be written: File too large" in done.stdout
    assert done.stderr == ""
    assert not os.listdir(tmp_path)


def onecurve(*words: str | Path) -> int:
    parser = argparse.ArgumentParser("onecurve")
    add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", *map(str, words)])
    try:
        return args.func(args)
    except OnecurveError as error:
        print(error)
        return error.exit_code


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "poem.txt").write_bytes(POEM.encode())
    out = tmp_path / "out"
    assert onecurve("pack", tmp_path / "poem.txt", "--out", out, "--split", "lines", "--shard-mb", "0.05") == 0
    assert f"tokenizer: {out}/tokenizer.json" in capsys.readouterr().out
    assert onecurve("pack", tmp_path / "poem.txt", "--out", out) == 2
    for sidecar in out.glob(f"*{SIDECAR}"):
        sidecar.unlink()
    capsys.readouterr()
    assert onecurve("index", f"{out}/*.tar") == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(list(out.glob("*.tar"))) == 1 + len(list(out.glob(f"*{SIDECAR}")))
    assert " 120 samples" in printed[-1]
    assert "fields: txt" in printed[-1]
    assert onecurve("check", f"{out}/*.tar") == 0
    assert ", 0 damaged: 120 samples" in capsys.readouterr().out
    assert onecurve("check", f"{out}/no-*.tar") == 2
    assert capsys.readouterr().out == f"SHARDS: no file matches {out}/no-*.tar\n"


def test_check_finds_all_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "poem.txt").write_bytes(POEM.encode())
    out = tmp_path / "out"
    onecurve("pack", tmp_path / "poem.txt", "--out", out, "--split", "lines", "--shard-mb", "0.02")
    paths = sorted(out.glob("train-*.tar"))
    for path, at in (
        (paths[0], 0),
        (paths[1], 512 + 3),
    ):  # a header; a payload, which only the checksum tells
        times, content = os.stat(path), bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    sidecar = Path(f"{paths[2]}{SIDECAR}")
    sidecar.write_text(sidecar.read_text().replace("/0000", "/9999", 1))
    capsys.readouterr()
    assert onecurve("check", f"{out}/*.tar") == 3
    printed = capsys.readouterr().out
    assert f"{paths[0]}: byte 0: damaged header" in printed
    assert f"{paths[1]}: its checksum is not the one in dataset.json" in printed
    assert f"{paths[2]}: is not what its index says" in printed
    assert " 3 damaged" in printed
