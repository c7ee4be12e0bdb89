"""The built-in dataset: whole scenes, all of the text once, made once however many ask."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from trainer.config.compose import load as load_config
from trainer.data import shakespeare
from trainer.data.shards import Shards
from trainer.data.storage import Storage
from trainer.data.tokenizer import load
from trainer.errors import ConfigError
from trainer.run_data import open_shards
from trainer.topology import ALONE

PACKED = resources.files("trainer.data").joinpath("shakespeare.txt.xz").read_bytes()
TEXT = lzma.decompress(PACKED).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shakespeare.ensure(tmp_path_factory.mktemp("cache"))


def split(folder: Path, name: str) -> dict[str, str]:
    shards = Shards.open(str(folder / f"{name}-*.tar"), "txt", Storage(folder.parent / "elsewhere"))
    return {shards.name(v)[1]: bytes(shards.read(v)).decode() for v in range(shards.n)}


def test_the_text_in_the_package() -> None:
    assert (
        hashlib.sha256(TEXT.encode()).hexdigest() == "dc1ee81ed30a428f4ddde4c997e537b5d359408f46838b1b342440f25797d273"
    )
    assert len(PACKED) < 1_500_000
    scenes = shakespeare.scenes(TEXT)
    assert len(scenes) == TEXT.count("\f") == 781
    assert len({name.split("/")[1] for name in scenes}) == 38
    assert scenes["tragedies/hamlet/act-3/scene-1"].count("HAMLET:\nTo be, or not to be: that is the question:\n") == 1
    assert not set("*_[]#\\") & set(TEXT)


def test_the_samples_are_the_whole_text_once(folder: Path) -> None:
    train, validation = split(folder, "train"), split(folder, "validation")
    assert not train.keys() & validation.keys()
    samples = train | validation
    for name, scene in shakespeare.scenes(TEXT).items():
        parts = [samples.pop(f"{name}/part-{n}") for n in range(1, 99) if f"{name}/part-{n}" in samples]
        assert "\n".join(parts) == scene  # cut between speeches
        assert max(len(part.encode()) for part in parts) < 1.25 * shakespeare.PART_BYTES
    assert not samples


def test_whole_scenes_of_every_play_are_held_out(folder: Path) -> None:
    train, validation = split(folder, "train"), split(folder, "validation")
    held = {key.rpartition("/")[0] for key in validation}
    assert not held & {key.rpartition("/")[0] for key in train}
    assert len(held) == len({scene.split("/")[1] for scene in held}) == 38
    total = sum(map(len, train.values())) + sum(map(len, validation.values()))
    assert 0.04 < sum(map(len, validation.values())) / total < 0.06


def test_tokenizer_and_description(folder: Path) -> None:
    tokenizer, made = load(str(folder)), json.loads((folder / "dataset.json").read_text())
    assert tokenizer.vocab_size == 1024
    text = split(folder, "validation").popitem()[1]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 2.0 < len(text) / len(ids) < 3.0
    assert made["splits"]["train"]["samples"] + made["splits"]["validation"]["samples"] == 1043


def test_the_shards_are_the_same_on_every_machine(folder: Path) -> None:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.tar")):
        digest.update(path.read_bytes())
    assert digest.hexdigest() == "bba71bdf926e1f6c159828302e33bf8f8d7829ffac9aae562fe5ed559f57099a"


@pytest.mark.parametrize("tokenizer", ["chars", "bytes"])
def test_other_tokenizers(tmp_path: Path, tokenizer: str) -> None:
    made = shakespeare.ensure(tmp_path, tokenizer)
    assert made.name.endswith(f"-{tokenizer}")
    assert made.name[12:20] == hashlib.sha256(PACKED).hexdigest()[:8]
    assert shakespeare.ensure(tmp_path, tokenizer) == made


def test_processes_that_ask_at_once_get_one_folder(tmp_path: Path) -> None:
    code = (
        "import sys, os; from pathlib import Path; from trainer.data.shakespeare import ensure; "
        "folder = ensure(Path(sys.argv[1]), 'bytes'); print(folder, os.stat(folder).st_ino)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "new")], stdout=subprocess.PIPE) for _ in range(3)
    ]
    printed = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(printed) == 1
    assert len([name for name in os.listdir(tmp_path / "new") if not name.startswith(".")]) == 1
    assert not list((tmp_path / "new").glob("*.tmp"))


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of bpe:SIZE, chars, bytes"):
        shakespeare.ensure(tmp_path, "../evil")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file: cannot be written"):
        shakespeare.ensure(tmp_path / "file", "bytes")
    assert os.listdir(tmp_path) == ["file"]


def test_shards_of_ones_own_are_not_looked_for_in_it(folder: Path) -> None:
    """Whoever gives shards, and leaves the default data set in place, is told which key is missing."""
    data = ["data=shakespeare", "data.tokenizer=bpe:1024", "data.shards=shards", f"data.cache={folder.parent}"]
    config = load_config(["experiment=smoke", *data])
    with pytest.raises(ConfigError) as caught:
        open_shards(config, ALONE)
    assert caught.value.problems[0] == f"data.shards: missing file {folder}/shards"
    assert "for yours: data=webdataset, or data=samples" in caught.value.problems[1]
