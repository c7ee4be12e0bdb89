"""Invariant I5: a checkpoint is whole and verified, or it does not count. Nothing in it is executed."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch

from trainer.checkpoint.format import Damaged, folder_name, verify
from trainer.checkpoint.load import newest, read
from trainer.checkpoint.retention import Retention, candidates
from trainer.checkpoint.save import Saver
from trainer.errors import TrainingError
from trainer.topology import ALONE


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model/a": torch.full((64, 64), value), "optimizer/step/a": torch.tensor(value)}


@pytest.fixture
def saver(tmp_path: Path) -> Saver:
    return Saver(tmp_path, ALONE, Retention(keep=2), asynchronous=False, pauses=())


def save(saver: Saver, *steps: int) -> list[str]:
    return [event["kind"] for step in steps for event in saver.save(step, tensors(step), {"about": "x"})]


def restored(folder: Path) -> float:
    found, _ = newest(folder)
    assert found
    target = tensors(-1)
    read(found, target)
    assert target["model/a"].unique().numel() == 1
    return target["optimizer/step/a"].item()


def test_saves_and_restores(saver: Saver) -> None:
    assert save(saver, 10) == ["checkpoint"]
    manifest = verify(saver.folder / folder_name(10))
    assert manifest["step"] == 10
    assert manifest["about"] == "x"
    assert restored(saver.folder) == 10


def test_what_is_saved_is_what_was(tmp_path: Path) -> None:
    saver = Saver(tmp_path, ALONE, Retention())
    state = tensors(1)
    saver.save(1, state, {})
    state["model/a"].zero_()  # training goes on at once
    (event,) = saver.wait()
    assert event["kind"] == "checkpoint"
    assert restored(tmp_path) == 1


def test_keeps_the_newest(saver: Saver) -> None:
    save(saver, 1, 2, 3, 4)
    assert sorted(path.name for path in saver.folder.iterdir()) == [".writer", folder_name(3), folder_name(4)]


def test_a_step_is_saved_once(saver: Saver) -> None:
    assert save(saver, 5, 5) == ["checkpoint"]


def damage_cases() -> dict:
    def flip(path: Path, where: float) -> None:
        data = bytearray(path.read_bytes())
        data[int(where * (len(data) - 1))] ^= 1 << random.Random(where).randrange(8)
        path.write_bytes(data)

    def zero(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[:4096] + bytes(4096) + data[8192:])

    return {
        "a flipped bit in the tensors": lambda folder: flip(folder / "rank-00000.safetensors", 0.7),
        "a flipped bit in the index": lambda folder: flip(folder / "index.json", 0.3),
        "a flipped bit in the manifest": lambda folder: flip(folder / "manifest.json", 0.5),
        "a zeroed page": lambda folder: zero(folder / "rank-00000.safetensors"),
        "a truncated file": lambda folder: os.truncate(folder / "rank-00000.safetensors", 1000),
        "a missing file": lambda folder: (folder / "rank-00000.safetensors").unlink(),
        "no manifest": lambda folder: (folder / "manifest.json").unlink(),
        "an empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
        "a manifest of nothing": lambda folder: (folder / "manifest.json").write_text("[1]"),
        "a longer file": lambda folder: os.truncate(folder / "rank-00000.safetensors", 100_000),
        "a file of another step": lambda folder: (folder / "rank-00000.safetensors").write_bytes(
            (folder.parent / folder_name(1) / "rank-00000.safetensors").read_bytes()
        ),
        "a link to elsewhere": lambda folder: (
            (folder / "rank-00000.safetensors").rename(folder.parent / "elsewhere"),
            (folder / "rank-00000.safetensors").symlink_to(folder.parent / "elsewhere"),
        ),
    }


@pytest.mark.parametrize("damage", damage_cases())
def test_damage_is_seen_and_the_older_one_taken(saver: Saver, damage: str) -> None:
    save(saver, 1, 2)
    damage_cases()[damage](saver.folder / folder_name(2))
    found, events = newest(saver.folder)
    assert found
    assert found.path.name == folder_name(1)
    assert events[0]["kind"] == "checkpoint_damaged"
    assert restored(saver.folder) == 1


def test_every_flipped_bit_is_seen(saver: Saver) -> None:
    save(saver, 1)
    folder = saver.folder / folder_name(1)
    draw = random.Random(0)
    files = sorted(folder.iterdir())
    for _ in range(300):
        path = draw.choice(files)
        original = path.read_bytes()
        data = bytearray(original)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        with pytest.raises(Damaged):
            verify(folder)
        path.write_bytes(original)
    verify(folder)


def test_never_silently_from_scratch(saver: Saver) -> None:
    save(saver, 1)
    (saver.folder / folder_name(1) / "manifest.json").unlink()
    with pytest.raises(TrainingError, match=r"run\.fresh=true"):
        newest(saver.folder)
    with pytest.raises(TrainingError):  # and not at the second try either
        newest(saver.folder)


def test_a_failed_save_leaves_the_good_one(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    save(saver, 1)

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trainer.checkpoint.save.write_manifest", full)
        (event,) = saver.save(2, tensors(2), {})
    assert event["kind"] == "checkpoint_failed"
    assert "No space left" in event["reason"]
    assert saver.problem == event["reason"]  # a run must not end as if it were saved
    assert sorted(path.name for path in saver.folder.iterdir()) == [".writer", folder_name(1)]
    assert save(saver, 3) == ["checkpoint"]
    assert restored(saver.folder) == 3


def test_names_and_shapes_are_checked(saver: Saver) -> None:
    save(saver, 1)
    found, _ = newest(saver.folder)
    assert found
    with pytest.raises(TrainingError, match="model/b"):
        read(found, {"model/b": torch.zeros(1)})
    with pytest.raises(TrainingError, match="model/a"):
        read(found, {"model/a": torch.zeros(3, 3)})


def test_manifest_is_plain_json(saver: Saver) -> None:
    save(saver, 1)
    manifest = json.loads((saver.folder / folder_name(1) / "manifest.json").read_text())
    assert set(manifest["files"]) == {"rank-00000.safetensors", "index.json"}
    assert candidates(saver.folder) == [saver.folder / folder_name(1)]
