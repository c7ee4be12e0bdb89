"""`onecurve data index | check | stats`: nothing that is wrong goes unseen, nothing that is right is accused."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import signal
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from webdataset import TarWriter, tenbin

from launch.data import add_commands
from tests.data.packs import CLI, alive, wait_for
from tests.data.servers import http_server
from trainer.data.index import SIDECAR, ShardIndex, places
from trainer.data.storage import Storage
from trainer.data.tokenizer import load
from trainer.data.tools.pack import Options, pack_inputs
from trainer.errors import OnecurveError

LINES = "".join(f"line {i} ü\n" for i in range(300))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A packed data set of several shards."""
    (tmp_path / "in.txt").write_text(LINES)
    options = Options(split="lines", tokenizer="bytes", shard_bytes=60_000, tokenize=True)
    pack_inputs([tmp_path / "in.txt"], tmp_path / "out", options)
    return tmp_path / "out"


@pytest.fixture
def onecurve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Runs a command: its exit code and lines."""

    def run(*words: str | Path, workers: int = 1) -> tuple[int, list[str]]:
        parser = argparse.ArgumentParser("onecurve")
        add_commands(parser.add_subparsers(required=True))
        more = ["--cache", str(tmp_path / "cache"), "--workers", str(workers)]
        arguments = parser.parse_args(["data", *map(str, words), *more])
        capsys.readouterr()
        try:
            code = arguments.func(arguments)
        except OnecurveError as error:
            print(error)
            code = error.exit_code
        return code, capsys.readouterr().out.splitlines()

    return run


Run = Callable[..., tuple[int, list[str]]]


def shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with TarWriter(str(path), encoder=False) as tar:
        for key, members in samples.items():
            tar.write({"__key__": key, **members})
    return path


def change(path: Path, at: int, with_time: bool = False) -> None:
    """Another bit, as a bad disk would make it: the time stays."""
    about, content = path.stat(), bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    if not with_time:
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize("workers", [1, 2])
def test_index(out: Path, onecurve: Run, workers: int) -> None:
    before = {path.name: path.read_bytes() for path in out.glob(f"*{SIDECAR}")}
    for path in out.glob(f"*{SIDECAR}"):
        path.unlink()
    code, lines = onecurve("index", f"{out}/*.tar", workers=workers)
    assert code == 0
    assert {path.name: path.read_bytes() for path in out.glob(f"*{SIDECAR}")} == before
    assert len(lines) == 1 + len(before)
    assert lines[0].startswith(f"{out}/train-000000.tar: ")
    assert " 300 samples" in lines[-1]
    assert lines[-1].endswith("fields: u16")
    assert onecurve("index", f"{out}/no-*.tar") == (2, [f"SHARDS: no file matches {out}/no-*.tar"])


def test_index_where_the_folder_takes_none(tmp_path: Path, onecurve: Run) -> None:
    path = shard(tmp_path / "in" / "a.tar", {"a": {"txt": b"1"}})
    Path(f"{path}{SIDECAR}").mkdir()  # a file cannot be put there, whoever tries
    code, lines = onecurve("index", path)
    cached = places(str(path), Storage(tmp_path / "cache"))[1]
    assert code == 0
    assert lines[0].endswith(f"; index in {cached}")
    assert ShardIndex.load(cached, str(path), Storage(tmp_path / "cache").stamp(str(path))) is not None
    (tmp_path / "cache" / "indexes").rename(tmp_path / "moved")
    (tmp_path / "cache" / "indexes").write_text("")
    code, lines = onecurve("index", path)
    assert code == 2
    assert "its index can be written neither beside it nor in --cache" in lines[0]


def test_index_goes_on_after_damage(out: Path, onecurve: Run) -> None:
    for path in out.glob(f"*{SIDECAR}"):
        path.unlink()
    change(out / "train-000001.tar", 0)
    code, lines = onecurve("index", f"{out}/*.tar", workers=2)
    assert code == 3
    assert any(line.startswith(f"{out}/train-000001.tar: byte 0: damaged header") for line in lines)
    assert lines[-1].endswith("; 1 damaged, not indexed")
    assert len(list(out.glob(f"*{SIDECAR}"))) == len(list(out.glob("*.tar"))) - 1


def test_shards_behind_urls(out: Path, tmp_path: Path, onecurve: Run) -> None:
    with http_server() as server:
        names = [path.name for path in sorted(out.glob("*.tar"))]
        urls = [server.put(name, (out / name).read_bytes()) for name in names]
        code, lines = onecurve("check", *urls, "--decode")
        assert (code, lines[-1].partition(":")[0]) == (0, f"{len(urls)} shards, 0 damaged")
        server.put("dataset.json", (out / "dataset.json").read_bytes())
        code, lines = onecurve("index", *urls, workers=2)
        assert code == 0
        assert all("; index in " in line for line in lines[:-1])
        assert onecurve("stats", *urls, "--json")[1] == onecurve("stats", f"{out}/*.tar", "--json")[1]
        changed = bytearray((out / names[0]).read_bytes())
        changed[600] ^= 1
        server.put(names[0], bytes(changed))
        code, lines = onecurve("check", *urls, workers=2)
        assert code == 3
        assert lines[0] == f"{urls[0]}: its checksum is not the one in dataset.json; payloads have changed"
        assert len(lines) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_check_finds_all_damage(out: Path, onecurve: Run, workers: int) -> None:
    code, lines = onecurve("check", f"{out}/*.tar", "--decode", workers=workers)
    assert (code, len(lines)) == (0, 1)
    assert ", 0 damaged: 300 samples" in lines[0]
    header, payload, index, cut, stale = (out / f"train-00000{i}.tar" for i in range(5))
    change(header, 2 * 1024)
    change(payload, 512 + 3)  # which only the checksum tells
    change(Path(f"{index}{SIDECAR}"), -3)
    cut.write_bytes(cut.read_bytes()[:-20_000])
    os.utime(stale)  # its index is of another time: not believed by anyone, so no harm
    code, lines = onecurve("check", f"{out}/*.tar", workers=workers)
    assert code == 3
    for path, words in (
        (header, ": byte 2048: damaged header"),
        (payload, ": its checksum is not the one in dataset.json"),
        (index, f": is not what its index says; delete {index}{SIDECAR}"),
        (cut, ": its checksum is not"),
    ):
        assert [line for line in lines if line.startswith(f"{path}{words}")], path
    assert not [line for line in lines if line.startswith(str(stale))]
    assert f"{len(list(out.glob('*.tar')))} shards, 4 damaged" in lines[-1]


def test_every_bit_of_a_shard_is_looked_at(tmp_path: Path, onecurve: Run) -> None:
    """Of a packed data set no bit can change unseen."""
    (tmp_path / "in.txt").write_text("a\nb\n")
    pack_inputs([tmp_path / "in.txt"], tmp_path / "o", Options(split="lines", tokenizer="bytes", validation=0))
    path = tmp_path / "o" / "train-000000.tar"
    whole, times = path.read_bytes(), path.stat().st_mtime_ns
    for at in range(0, len(whole), 97):
        change(path, at)
        assert onecurve("check", path)[0] == 3, at
        path.write_bytes(whole)
        os.utime(path, ns=(times, times))
    assert onecurve("check", path)[0] == 0


def test_an_index_that_says_something_else(tmp_path: Path, onecurve: Run) -> None:
    path = shard(tmp_path / "in" / "a.tar", {"a": {"txt": b"1"}, "b": {"txt": b"2"}})
    storage = Storage(tmp_path / "cache")
    index = ShardIndex.build(storage.open(str(path)))
    index.table["offset"][1] += 1  # well-formed, and wrong
    index.save(Path(f"{path}{SIDECAR}"))
    code, lines = onecurve("check", path)
    assert code == 3
    assert lines[0].startswith(f"{path}: is not what its index says; delete {path}{SIDECAR}")


def test_a_description_that_cannot_be_read(out: Path, onecurve: Run) -> None:
    (out / "dataset.json").write_text("{")
    code, lines = onecurve("check", out / "train-000000.tar")
    assert code == 3
    assert f"{out}/dataset.json beside it cannot be read" in lines[0]
    (out / "dataset.json").write_text('{"made": "by others"}')
    assert onecurve("check", out / "train-000000.tar", "--decode")[0] == 0


def test_members_that_do_not_decode(tmp_path: Path, onecurve: Run) -> None:
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 40, 3), np.uint8)).save(file, "png")
    png, npy = file.getvalue(), io.BytesIO()
    np.save(npy, np.arange(5))
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], object), allow_pickle=True)
    good = {"json": b"{}", "txt": b"x", "a.png": png, "npy": npy.getvalue(), "u16": b"ab", "u32": b"abcd", "cls": b"7"}
    assert onecurve("check", shard(tmp_path / "good.tar", {"k": good}), "--decode")[0] == 0
    bad = {
        "json": b"{", "txt": b"\xff", "a.png": png[:-300], "npy": npy.getvalue()[:-1], "u16": b"abc",
        "u32": b"abcde", "cls": b"cat", "bin": b"any",
    }  # fmt: skip
    path = shard(
        tmp_path / "bad.tar",
        {"good": good, "bad": bad, "pickled": {"npy": pickled.getvalue()}, "long": {"npy": good["npy"] + b"x"}},
    )
    assert onecurve("check", path)[0] == 0
    code, lines = onecurve("check", path, "--decode")
    assert code == 3
    with tarfile.open(path) as tar:
        at = {member.name: member.offset_data for member in tar}
    expected = [("bad", name) for name in bad if name != "bin"] + [("pickled", "npy"), ("long", "npy")]
    assert sorted(line.partition(" cannot be decoded: ")[0] for line in lines[:-2]) == sorted(
        f"{path}: byte {at[f'{key}.{name}']}: sample {key!r}: member {name!r}" for key, name in expected
    )
    assert lines[-2:] == ["not decoded: bin", lines[-1]]
    assert "1 shards, 1 damaged" in lines[-1]


def test_members_that_training_decodes_are_decoded(tmp_path: Path, onecurve: Run) -> None:
    """By the same decoders: compressed ones, webdataset's own formats, and images that are not known to be colors."""
    image, msgpack = pytest.importorskip("PIL.Image"), pytest.importorskip("msgpack")
    grey, numbers = io.BytesIO(), io.BytesIO()
    image.fromarray(np.full((4, 4), 24000, np.uint16)).save(grey, "png")
    image.fromarray(np.full((4, 4), 0.5, np.float32)).save(numbers, "tiff")
    claims = io.BytesIO()
    np.lib.format.write_array_header_1_0(claims, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)})
    good = {"txt.gz": gzip.compress(b"text"), "mp": msgpack.packb([1]), "ten": tenbin.encode_buffer([np.ones(2)])}
    path = shard(tmp_path / "good.tar", {"k": {**good, "png": grey.getvalue()}})
    assert onecurve("check", path, "--decode") == (0, [onecurve("check", path)[1][-1]])
    bad = {"txt.gz": b"no gzip", "mp": b"", "ten": b"~~", "tiff": numbers.getvalue(), "npy": claims.getvalue()}
    code, lines = onecurve("check", shard(tmp_path / "bad.tar", {"k": bad}), "--decode")
    assert code == 3
    assert {line.partition("member ")[2].partition(" cannot")[0] for line in lines[:-1]} == {repr(name) for name in bad}
    assert "its pixels are numbers of 32 bits (mode F) of no known range" in "".join(lines)
    assert "its header tells of 9007199254740992 bytes, but 0 follow" in "".join(lines)


def test_tokens_that_are_not_in_the_vocabulary(out: Path, onecurve: Run) -> None:
    made = json.loads((out / "dataset.json").read_text())
    assert onecurve("check", f"{out}/*.tar", "--decode")[0] == 0
    made["tokenizer"]["vocab_size"] = 256
    (out / "dataset.json").write_text(json.dumps(made))
    code, lines = onecurve("check", f"{out}/*.tar", "--decode")
    assert code == 3
    assert len([line for line in lines if line.endswith("token 256, but the vocabulary has 256")]) == 300


def test_indexes_of_others(tmp_path: Path, onecurve: Run) -> None:
    path = shard(tmp_path / "in" / "a.tar", {"a": {"txt": b"1"}, "b": {"txt": b"2", "cls": b"3"}, "c": {"txt": b""}})
    with tarfile.open(path) as tar:
        begins = [min(member.offset for member in tar if member.name.startswith(key)) for key in "abc"]
        end = tar.offset
    energon, sizes, wids = Path(f"{path}.idx"), path.parent / "sizes.json", path.parent / "shardindex.json"

    def tell(offsets: list[int], count: int, listed: int, size: int) -> None:
        energon.write_bytes(np.array(offsets, "<u8").tobytes())
        sizes.write_text(json.dumps({"a.tar": count}))
        about = {"url": "a.tar", "nsamples": listed, "filesize": size}
        wids.write_text(json.dumps({"wids_version": 1, "shardlist": [about]}))

    size = path.stat().st_size
    tell([*begins, end], 3, 3, size)
    assert onecurve("check", path)[0] == 0
    tell([begins[0], begins[1] - 512, begins[2], end], 4, 2, size + 1)
    code, lines = onecurve("check", path)
    assert code == 3
    assert sorted(lines[:-1]) == sorted(
        [
            f"{path}: its samples do not begin where {energon} says",
            f"{path}: has 3 samples, but {sizes} says 4",
            f"{path}: has 3 samples, but {wids} says 2",
            f"{path}: has {size} bytes, but {wids} says {size + 1}",
        ]
    )
    tell([begins[0], begins[1] + 2048, begins[2], end], 3, 3, size)  # behind its first header
    assert f"{path}: its samples do not begin where {energon} says" in onecurve("check", path)[1]
    energon.write_bytes(b"odd")
    assert f"{path}: its samples do not begin where {energon} says" in onecurve("check", path)[1]
    for place in (energon, sizes, wids):
        os.utime(place, ns=(1, 1))  # older than the shard: of a former one
    assert onecurve("check", path)[0] == 0


def test_stats(tmp_path: Path, onecurve: Run) -> None:
    sizes = [0, 1, 2, 3, 4, 100]
    samples = {f"{i}": {"txt": b"x" * n, **({"cls": b"1"} if i % 2 else {})} for i, n in enumerate(sizes)}
    paths = [shard(tmp_path / f"{i}.tar", dict(list(samples.items())[i::2])) for i in range(2)]
    code, lines = onecurve("stats", *paths, "--json", workers=2)
    assert code == 0
    assert len(lines) == 1
    whole = sorted(n + i % 2 for i, n in enumerate(sizes))  # 0 2 2 4 4 101
    assert json.loads(lines[0]) == {
        "shards": 2,
        "samples": 6,
        "bytes": sum(path.stat().st_size for path in paths),
        "fields": {"cls": {"samples": 3, "bytes": 3}, "txt": {"samples": 6, "bytes": sum(sizes)}},
        "sample_bytes": {"min": 0, "median": 3.0, "mean": sum(whole) / 6, "max": 101},
        "histogram": [[0, 1, 1], [1, 2, 0], [2, 4, 2], [4, 8, 2], [8, 16, 0], [16, 32, 0], [32, 64, 0], [64, 128, 1]],
    }
    assert json.loads(onecurve("stats", *paths, "--json", "--tokenizer", "bytes")[1][0])["tokens"] == sum(sizes) + 6
    code, lines = onecurve("stats", *paths)
    assert code == 0
    assert lines[0].startswith("2 shards, 6 samples, ")
    assert "  cls: 3 B in 3 samples" in lines
    assert len([line for line in lines if line.endswith("#")]) == 4
    code, lines = onecurve("stats", *paths, "--tokenizer", "/no/where")
    assert code == 2
    assert len(lines) == 1
    code, lines = onecurve("stats", *paths, "--tokenizer", "bytes", "--field", "text")
    assert code == 2
    assert "--field text: no sample of" in lines[0]


def test_stats_of_tokens(out: Path, onecurve: Run) -> None:
    made = json.loads((out / "dataset.json").read_text())
    tokens = sum(split["tokens"] for split in made["splits"].values())
    assert tokens == len(load("bytes").encode(LINES))  # a separator for each line end
    assert json.loads(onecurve("stats", f"{out}/*.tar", "--json", workers=2)[1][0])["tokens"] == tokens


def test_bad_text_is_named(tmp_path: Path, onecurve: Run) -> None:
    path = shard(tmp_path / "a.tar", {"k": {"txt": b"ab\xff"}})
    code, lines = onecurve("stats", path, "--tokenizer", "bytes")
    assert code == 3
    with tarfile.open(path) as tar:
        at = tar.getmember("k.txt").offset_data + 2
    assert lines == [f"{path}: byte {at}: sample 'k': is not UTF-8 text"]


def test_commands_in_shells_only_when_allowed(tmp_path: Path, onecurve: Run) -> None:
    path = shard(tmp_path / "a.tar", {"k": {"txt": b"ab"}})
    code, lines = onecurve("check", f"pipe:cat {path}")
    assert code == 2
    assert "runs a command in a shell" in lines[0]
    assert onecurve("check", f"pipe:cat {path}", "--allow-pipe", "--decode")[0] == 0
    assert list((tmp_path / "cache" / "unpacked").iterdir()) == []
    path.write_bytes(path.read_bytes()[:700])  # not what it was at the last command
    for command in ("check", "index"):
        code, lines = onecurve(command, f"pipe:cat {path}", "--allow-pipe")
        assert code == 3
        assert "the archive is cut off" in lines[0]


def test_interrupted_it_ends_the_commands_in_shells(tmp_path: Path) -> None:
    urls = [f"pipe:echo $$ > {tmp_path}/{i}.pid; sleep 60; cat {tmp_path}/a.tar" for i in range(2)]
    command = [*CLI, "check", "--workers", "2", "--allow-pipe", "--cache", str(tmp_path / "cache"), *urls]
    for end in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: len([path for path in tmp_path.glob("*.pid") if path.read_text().strip()]) == 2)
        shells = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
        process.send_signal(end)
        process.wait()
        for shell in shells:
            wait_for(lambda: not alive(shell))  # noqa: B023
        for path in tmp_path.glob("*.pid"):
            path.unlink()
