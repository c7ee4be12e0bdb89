"""`data.classes`: names of classes, from a list or from what `onecurve data pack` writes, to `facts.classes`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.config.compose import load
from trainer.data.tokenizer import load as load_tokenizer
from trainer.errors import ConfigError
from trainer.facts import Facts

TEXT = ("data=webdataset", "data.shards=x.tar")


def test_names_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    packed = tmp_path / "classes.json"
    packed.write_text(json.dumps({"wren": 1, "auk": 0, "owl": 2}))
    config = load([*TEXT, f"data.classes={packed}"])
    packed.unlink()  # the config has the names: a later command on the run does not need the file
    assert Facts.of(config, load_tokenizer("bytes")).classes == ("auk", "wren", "owl")
    assert config.resolved()["data"]["classes"] == ["auk", "wren", "owl"]
    assert load([*TEXT, "data.classes=[auk,wren,owl]"]).data == config.data


def test_without_the_key_there_are_none() -> None:
    assert Facts.of(load(TEXT), load_tokenizer("bytes")).classes == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("[]", "should be JSON as onecurve data pack writes it"),
        ("{", "should be JSON as onecurve data pack writes it"),
        ('{"auk": 1, "wren": 2}', "classes are not numbered from 0 on"),
        ('{"auk": 0, "wren": "1"}', "should be JSON as onecurve data pack writes it"),
    ],
)
def test_files_that_name_no_classes_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "classes.json").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load([*TEXT, f"data.classes={tmp_path}/classes.json"])
    (problem,) = refused.value.problems
    assert problem.startswith("data.classes=")
    assert message in problem


def test_a_class_twice_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        load([*TEXT, "data.classes=[auk,wren,auk]"])
    assert "names a class twice: auk" in refused.value.problems[0]
