"""`onecurve data pack`: folders of several kinds, compressed files, bad lines, and what is told at the end."""

from __future__ import annotations

import argparse
import gzip
import json
import shlex
from pathlib import Path

import pytest

from launch.data import add_commands
from tests.data.packs import contents, pack, read
from trainer.config.compose import load as load_config
from trainer.data.tokenizer import load, train_bpe
from trainer.errors import ConfigError


def manual(folder: Path) -> Path:
    """Eleven pages and a figure."""
    folder.mkdir()
    for i in range(11):
        (folder / f"{i}.md").write_text(f"# Page {i}\n\nwith words\n")
    (folder / "figure.png").write_bytes(b"\x89PNG")
    return folder


def test_texts_and_images_of_one_folder_are_not_guessed(tmp_path: Path) -> None:
    folder = manual(tmp_path / "manual")
    with pytest.raises(ConfigError) as caught:
        pack(folder, tmp_path / "out")
    assert caught.value.problems == [
        f"{folder}: holds images (1, such as figure.png) and texts that belong to none of them (11, such as 0.md): "
        "say which to pack, --kind images or --kind texts"
    ]
    assert not (tmp_path / "out").exists()
    texts = pack(folder, tmp_path / "texts", kind="texts", tokenizer="bytes", validation=0)
    assert texts["splits"]["train"]["samples"] == 11
    images = pack(folder, tmp_path / "images", kind="images", validation=0)
    assert images["splits"]["train"]["samples"] == 1
    (folder / "figure.txt").write_text("its caption")  # belongs to an image
    for path in folder.glob("*.md"):
        path.unlink()
    assert pack(folder, tmp_path / "both", validation=0)["splits"]["train"]["samples"] == 1
    assert read(tmp_path / "both")["manual/figure"] == {"png": b"\x89PNG", "txt": b"its caption"}
    with pytest.raises(ConfigError, match="'sound' is none of texts, images"):
        pack(folder, tmp_path / "o", kind="sound")


def test_json_lines_by_other_names(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    lines = b"".join(b'{"text": "document %d"}\n' % i for i in range(300))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "c4.00000.json.gz").write_bytes(gzip.compress(lines))
    for name in ("d.jsonl.zst", "e.json.zst"):
        (tmp_path / "in" / name).write_bytes(bytes(pyarrow.Codec("zstd").compress(lines)))
    (tmp_path / "in" / "about.json").write_text('{"of": "the corpus"}')  # no text
    made = pack(tmp_path / "in", tmp_path / "out", validation=0, tokenizer="bytes")
    assert made["splits"]["train"]["samples"] == 900
    found = read(tmp_path / "out")
    assert found["in/c4-00000/000000000000"]["txt"] == found["in/d/000000000000"]["txt"] == b"document 0"
    (tmp_path / "bad.jsonl.zst").write_bytes(b"(\xb5/\xfd no more of it")
    with pytest.raises(ConfigError, match=r"bad\.jsonl\.zst: cannot be read"):
        pack(tmp_path / "bad.jsonl.zst", tmp_path / "o2")


def damaged(folder: Path) -> int:
    """Files of all kinds with documents that cannot be read; how many those are."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir()
    good = [b'{"text": "good %d"}\n' % i for i in range(40)]
    bad = [
        b"{}\n",
        b'{"text": null}\n',
        b"no json\n",
        b'{"text": "\xff"}\n',
        b"[1]\n",
        b'{"text": ' + b"[" * 99_999 + b"\n",
    ]
    lines = [line for pair in zip(good, bad * 7, strict=False) for line in pair]
    (folder / "a.jsonl").write_bytes(b"".join(lines))
    (folder / "b.txt").write_bytes(b"latin-1: \xe9")
    (folder / "c.md").write_bytes(b"good")
    table = pyarrow.table({"text": ["good", None, "good", None, ""]})
    parquet.write_table(table, folder / "d.parquet", row_group_size=2)
    return 40 + 1 + 2


def test_documents_that_cannot_be_read_are_left_out_if_asked(tmp_path: Path) -> None:
    count = damaged(tmp_path / "in")
    options = {"tokenizer": "bytes", "validation": 0, "piece_bytes": 5000}
    with pytest.raises(ConfigError, match=r"cannot be read: line 2: has no 'text'"):
        pack(tmp_path / "in", tmp_path / "out", **options)
    for workers in (1, 2):
        made = pack(tmp_path / "in", tmp_path / f"o{workers}", workers=workers, on_error="skip", **options)
        assert made["splits"]["train"]["samples"] == 43
        assert made["skipped"]["documents"] == count
        assert made["skipped"]["such_as"][0].startswith(f"{tmp_path}/in/")
        assert all(sample["txt"].startswith(b"good") for sample in read(tmp_path / f"o{workers}").values())
    assert contents(tmp_path / "o1") == contents(tmp_path / "o2")
    trained = pack(tmp_path / "in", tmp_path / "trained", on_error="skip", validation=0, tokenizer="chars")
    assert trained["tokenizer"]["vocab_size"] == 2 + len(set("good 0123456789"))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "good"}\n' * 9999)[:-20])
    with pytest.raises(ConfigError, match=r"cut\.jsonl\.gz: cannot be read"):  # what is behind it is not known
        pack(cut, tmp_path / "o3", on_error="skip")


def test_what_was_left_out_is_known_after_a_kill(tmp_path: Path) -> None:
    from trainer.data.tools.pack import Options, pack_inputs

    count = damaged(tmp_path / "in")
    options, done = Options(tokenizer="bytes", validation=0, on_error="skip"), 0

    def stop(what: str, at: int, of: int) -> None:
        nonlocal done
        done += what == "packing"
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_inputs([tmp_path / "in"], tmp_path / "out", options, piece_bytes=5000, report=stop)
    pack_inputs([tmp_path / "in"], tmp_path / "out", options, piece_bytes=5000)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["skipped"]["documents"] == count


def onecurve(*words: str | Path) -> int:
    parser = argparse.ArgumentParser("onecurve")
    add_commands(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["data", *map(str, words), "--workers", "1"])
    return arguments.func(arguments)


def test_the_end_tells_tokens_and_the_command_that_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(60):
        (texts / f"{i}.txt").write_text(f"text number {i}, of a few words")
    (texts / "bad.txt").write_bytes(b"\xff")
    words = ["pack", texts, "--out", tmp_path / "out", "--tokenizer", "bpe:8192", "--on-error", "skip"]
    words += ["--validation", "0.3"]
    assert onecurve(*words) == 0
    said = capsys.readouterr()
    assert "skipped: 1 documents that cannot be read, such as\n" in said.err
    made = json.loads((tmp_path / "out" / "dataset.json").read_text())
    tokenizer = load(str(tmp_path / "out"))
    assert f"{tokenizer.vocab_size} tokens (not 8192: the texts have no more pairs to merge)" in said.out
    samples = read(tmp_path / "out", "train").values()
    tokens = sum(len(tokenizer.encode(sample["txt"].decode())) + 1 for sample in samples)
    assert f"train: {made['splits']['train']['samples']} samples, " in said.out
    assert f", about {tokens} tokens, " in said.out
    (command,) = [line for line in said.out.splitlines() if line.startswith("train on it: ")]
    onecurve_, train, *overrides = shlex.split(command.removeprefix("train on it: "))
    assert (onecurve_, train) == ("onecurve", "train")
    config = load_config(["experiment=smoke", *overrides])
    assert config.data.shards == str(tmp_path / "out" / made["splits"]["train"]["shards"])
    assert config.data.validation == str(tmp_path / "out" / made["splits"]["validation"]["shards"])
    assert (config.data.tokenizer, config.data.field) == (str(tmp_path / "out" / "tokenizer.json"), "txt")


def test_the_command_for_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(9):
        (tmp_path / "in" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / f"c{i % 2}" / f"{i}.{'png' if i % 3 else 'jpg'}").write_bytes(b"image")
    assert onecurve("pack", tmp_path / "in", "--out", tmp_path / "out", "--validation", "0") == 0
    (command,) = [line for line in capsys.readouterr().out.splitlines() if "onecurve train" in line]
    overrides = [word for word in shlex.split(command) if word.startswith("data")]
    plugin = ["model.name=a.b:C", "objective.name=a.b:D", "run.plugins=[a]"]
    with pytest.raises(ConfigError) as caught:  # the model and the objective are missing, nothing else
        load_config(["experiment=none", *overrides, *plugin])
    assert all("data" not in problem.partition("=")[0] for problem in caught.value.problems)


def test_the_separator_of_a_given_tokenizer_goes_along(tmp_path: Path) -> None:
    trained = train_bpe(["some words of text"] * 9, 280)
    trained.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    (tmp_path / "it").mkdir()
    trained.save(str(tmp_path / "it" / "tokenizer.json"))
    (tmp_path / "in.txt").write_text("some words\n" * 30)
    options = {"split": "lines", "validation": 0, "tokenizer": str(tmp_path / "it")}
    plain = pack(tmp_path / "in.txt", tmp_path / "plain", **options)
    asked = pack(tmp_path / "in.txt", tmp_path / "asked", separator="<|im_end|>", tokenize=True, **options)
    assert not (tmp_path / "plain" / "tokenizer_config.json").exists()
    assert load(str(tmp_path / "asked")).separator == trained.token_to_id("<|im_end|>")
    ids = next(iter(read(tmp_path / "asked").values()))["u16"]
    assert int.from_bytes(ids[-2:], "little") == trained.token_to_id("<|im_end|>")
    (tmp_path / "it" / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    told = pack(tmp_path / "in.txt", tmp_path / "told", **options)
    assert told["tokenizer"]["fingerprint"] == asked["tokenizer"]["fingerprint"] != plain["tokenizer"]["fingerprint"]
    with pytest.raises(ConfigError, match=r"--separator: bpe:300 has one of its own"):
        pack(tmp_path / "in.txt", tmp_path / "o", split="lines", tokenizer="bpe:300", separator="</s>")
