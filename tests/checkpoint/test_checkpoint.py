"""Invariant I5: a checkpoint is whole and verified, or it does not count. Nothing in it is executed."""

from __future__ import annotations

import json
import os
import random
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from trainer.checkpoint.format import DamagedCheckpoint, folder_name, verify
from trainer.checkpoint.load import find_newest, read_state
from trainer.checkpoint.retention import Retention, complete_checkpoints
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
    found, _ = find_newest(folder)
    assert found
    target = tensors(-1)
    read_state(found, target)
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
    found, events = find_newest(saver.folder)
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
        with pytest.raises(DamagedCheckpoint):
            verify(folder)
        path.write_bytes(original)
    verify(folder)


def test_never_silently_from_scratch(saver: Saver) -> None:
    save(saver, 1)
    (saver.folder / folder_name(1) / "manifest.json").unlink()
    with pytest.raises(TrainingError, match=r"run\.fresh=true"):
        find_newest(saver.folder)
    with pytest.raises(TrainingError):  # and not at the second try either
        find_newest(saver.folder)


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
    found, _ = find_newest(saver.folder)
    assert found
    with pytest.raises(TrainingError, match="model/b"):
        read_state(found, {"model/b": torch.zeros(1)})
    with pytest.raises(TrainingError, match="model/a"):
        read_state(found, {"model/a": torch.zeros(3, 3)})


def test_manifest_is_plain_json(saver: Saver) -> None:
    save(saver, 1)
    manifest = json.loads((saver.folder / folder_name(1) / "manifest.json").read_text())
    assert set(manifest["files"]) == {"rank-00000.safetensors", "index.json"}
    assert complete_checkpoints(saver.folder) == [saver.folder / folder_name(1)]


def test_what_is_kept(tmp_path: Path) -> None:
    """The newest, every so-manieth, and the best; a score that is not a number is none."""
    saver = Saver(tmp_path, ALONE, Retention(keep=2, every=4, best="loss"), asynchronous=False, pauses=())
    scores = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: float("nan"), 6: "x", 7: 1.5, 8: 4.0, 9: float("nan"), 10: 9.0}
    for step, score in scores.items():
        saver.save(step, tensors(step), {"evaluation": score and {"loss": score}})
    assert [path.name for path in complete_checkpoints(tmp_path)] == [folder_name(step) for step in (2, 4, 8, 9, 10)]
    newer = tmp_path / folder_name(10) / "rank-00000.safetensors"
    newer.unlink()  # then the older ones are needed
    assert Retention(keep=1).removable(tmp_path) == []


def test_an_evaluation_comes_after_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the manifest, which stays whole; a disk that is full for now gets it later."""
    from trainer.checkpoint import save as module

    saver = Saver(tmp_path, ALONE, Retention(keep=1, best="loss"), pauses=())
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 4.0)):
        saver.save(step, tensors(step), {"evaluation": None})
        saver.record_evaluation(step, {"loss": loss})  # the save is still under way
    saver.record_evaluation(7, {"loss": 0.0})  # of no checkpoint
    saver.wait()
    assert [path.name for path in complete_checkpoints(tmp_path)] == [folder_name(step) for step in (2, 4)]
    assert [verify(path)["evaluation"] for path in complete_checkpoints(tmp_path)] == [{"loss": 1.0}, {"loss": 4.0}]

    amend = module.amend_manifest
    monkeypatch.setattr(module, "amend_manifest", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    saver.save(5, tensors(5), {"evaluation": None})
    saver.record_evaluation(5, {"loss": 0.5})
    saver.wait()
    assert verify(tmp_path / folder_name(5))["evaluation"] is None
    monkeypatch.setattr(module, "amend_manifest", amend)
    saver.record_evaluation(7, {"loss": 0.0})
    saver.wait()
    assert verify(tmp_path / folder_name(5))["evaluation"] == {"loss": 0.5}


def test_an_overrun_is_waited_for_or_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a failed save is tried again, then overdue."""
    from trainer.checkpoint import save as module

    going, write = threading.Event(), module.write_file
    monkeypatch.setattr(module, "write_file", lambda *given: (going.wait(20), write(*given))[1])
    saver = Saver(tmp_path, ALONE, Retention(), overrun="skip", pauses=(0.0,))
    assert saver.save(1, tensors(1), {}) == []
    (event,) = saver.save(2, tensors(2), {})
    assert event["kind"] == "checkpoint_skipped"
    threading.Timer(0.2, going.set).start()
    assert [event["step"] for event in saver.save(2, tensors(2), {}, must=True)] == [1]  # as at the run's end
    assert [event["step"] for event in saver.wait()] == [2]
    left = [OSError(28, "No space left on device")]
    monkeypatch.setattr(module, "write_file", lambda *given: write(*given) if not left else raised(left.pop()))
    saver.save(3, tensors(3), {})
    (event,) = saver.wait()
    assert (event["kind"], event["tries"]) == ("checkpoint", 2)
    assert not saver.overdue
    left += [OSError(28, "No space left on device")] * 2
    saver.save(4, tensors(4), {})
    (event,) = saver.wait()
    assert event["kind"] == "checkpoint_failed"
    assert not saver.overdue
    monkeypatch.setattr(module, "OVERDUE_S", 0.0)
    assert saver.overdue
    assert restored(tmp_path) == 3


def raised(error: OSError) -> None:
    raise error


@pytest.mark.slow
def test_two_thousand_flipped_bits_and_a_control(tmp_path: Path) -> None:
    """Also zeroed pages, truncations, files of two steps mixed: all are seen. Of flips in a file of torch's distributed
    checkpoint most are loaded without a word."""
    saver = Saver(tmp_path, ALONE, Retention(keep=3), asynchronous=False)
    draw = random.Random(1)
    for step in (1, 2):
        state = {f"model/{i}": torch.randn(64, 64) + step for i in range(8)}
        saver.save(step, state, {})
    folder = tmp_path / folder_name(2)
    files = sorted(folder.iterdir())
    originals = {path: path.read_bytes() for path in files}
    other = {path: (tmp_path / folder_name(1) / path.name).read_bytes() for path in files}
    for number in range(2300):
        path = draw.choice(files)
        data = bytearray(originals[path])
        at = draw.randrange(len(data))
        if number < 2000:
            data[at] ^= 1 << draw.randrange(8)
        elif number < 2100:
            data[at : at + 4096] = bytes(len(data[at : at + 4096])) if any(data[at : at + 4096]) else b"\1"
        elif number < 2200:
            del data[at:]
        else:
            data = bytearray(other[path])
        if data == originals[path]:  # indices of two steps are the same
            continue
        path.write_bytes(data)
        with pytest.raises(DamagedCheckpoint):
            verify(folder)
        path.write_bytes(originals[path])
    verify(folder)
    assert silent_flips_of_dcp(tmp_path / "dcp", state, draw, 200) > 120


def silent_flips_of_dcp(folder: Path, state: dict[str, torch.Tensor], draw: random.Random, flips: int) -> int:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (path,) = folder.glob("*.distcp")
    original, silent = path.read_bytes(), 0
    for _ in range(flips):
        data = bytearray(original)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        got = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        with suppress(Exception, CheckpointException):
            dcp.load(got, checkpoint_id=folder, no_dist=True)
            silent += not all(torch.equal(got[name], state[name]) for name in state)
    return silent
