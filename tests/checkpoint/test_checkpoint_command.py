"""`onecurve checkpoint`: it tells what is there, sees what is damaged, and deletes nothing that is needed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from launch import checkpoint
from trainer.checkpoint import inspection
from trainer.checkpoint.format import MANIFEST, DamagedCheckpoint, folder_name, write_manifest
from trainer.checkpoint.load import find_newest
from trainer.checkpoint.retention import Retention, complete_checkpoints
from trainer.checkpoint.save import Saver
from trainer.errors import ConfigError, TrainingError
from trainer.topology import ALONE

KEPT = Retention(keep=100)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "model/a": torch.full((64, 64), value),
        "model/same": torch.arange(6).view(2, 3),
        "optimizer/step/a": torch.tensor(value),
    }


def about(step: int, **config: Any) -> dict[str, Any]:
    """What the loop tells of a checkpoint."""
    rules = {"keep": 2, "keep_every": None, "keep_best": None}
    return {
        "progress": {"step": step, "tokens": 100 * step},
        "identity": {"model": {"width": 64}, "data": {"shards": {"all": "abc"}}},
        "config": {"checkpoint": rules, "strategy": {"name": "ddp"}, **config},
        "topology": {"processes": 2, "device": "cpu", "threads": 1},
        "evaluation": {"loss": 3 + step / 1000, "tokens": 5},
    }


def save(run: Path, step: int, state: dict[str, torch.Tensor], told: dict[str, Any]) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    saver = Saver(run / "checkpoints", ALONE, KEPT, asynchronous=False, pauses=())
    (event,) = saver.save(step, state, told)
    saver.close()
    assert event["kind"] == "checkpoint"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("made")
    for step in (10, 20, 30, 40, 50):
        save(run, step, tensors(step), about(step))
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A run with checkpoints of the steps 10 to 50."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def onecurve(*words: str | Path) -> int:
    """The exit code of `onecurve checkpoint ...`, in this process."""
    parser = argparse.ArgumentParser()
    checkpoint.add_commands(parser.add_subparsers())
    arguments = parser.parse_args(["checkpoint", *map(str, words)])
    return arguments.func(arguments)


def at(run: Path, step: int) -> Path:
    return run / "checkpoints" / folder_name(step)


def flip(run: Path, step: int) -> None:
    """Damage that only checksums see."""
    path = at(run, step) / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def steps(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in complete_checkpoints(run / "checkpoints")]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): ((stat := path.stat()).st_size, stat.st_mtime_ns) for path in folder.rglob("*")}


def test_ls_tells_what_each_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(at(run, 20) / "rank-00000.safetensors", 1000)
    (at(run, 30) / MANIFEST).unlink()
    at(run, 40).rename(run / "checkpoints" / f".damaged-{folder_name(40)}")
    before = listing(run)
    assert onecurve("ls", run) == 0
    head, *rows, foot = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["step", "bytes", "tensors", "written"]
    assert [row.split()[0] for row in rows] == ["10", "20", "30", "40", "50"]
    assert rows[0].endswith("2 x cpu   ddp       3.0100  whole")
    assert "damaged: rank-00000.safetensors has 1000 bytes, not " in rows[1]
    assert rows[2].endswith("-         -         -       damaged: no manifest.json")
    assert rows[3].endswith("set aside as .damaged-step-00000040")
    assert len({row.index(word) for row, word in zip(rows, ("whole", "damaged", "damaged", "set"), strict=False)}) == 1
    assert "only sizes were checked" in foot
    assert listing(run) == before


def test_ls_for_machines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(run, 60, tensors(nan), {**about(60), "evaluation": {"loss": nan}})
    assert onecurve("ls", "--json", run) == 0
    rows = [json.loads(line, parse_constant=pytest.fail) for line in capsys.readouterr().out.splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    assert rows[0]["bytes"] == sum(path.stat().st_size for path in at(run, 10).iterdir())
    assert (rows[0]["tensors"], rows[0]["state"], rows[0]["problem"]) == (3, "whole", None)
    assert rows[0]["topology"] == {"processes": 2, "device": "cpu", "threads": 1}
    assert rows[0]["evaluation"] == {"loss": 3.01, "tokens": 5}
    assert rows[-1]["evaluation"] == {"loss": None}  # strict JSON


@pytest.mark.parametrize("odd", [[], "\x1b[2J", 7, {"strategy": "\x1b[2J", "checkpoint": 3}, None])
def test_a_strange_manifest_harms_nobody(run: Path, odd: Any, capsys: pytest.CaptureFixture[str]) -> None:
    strange = dict.fromkeys(("config", "identity", "topology", "progress", "evaluation"), odd)
    save(run, 60, {"model/\x1b[2J": torch.zeros(1)}, strange)
    assert onecurve("ls", run) == 0
    assert onecurve("diff", run, f"{run}:10") == 1
    with pytest.raises(ConfigError, match="--keep"):  # it does not say what stays: nothing is guessed
        onecurve("prune", run)
    assert "\x1b" not in capsys.readouterr().out
    assert steps(run) == [10, 20, 30, 40, 50, 60]


def test_verify_reads_every_byte_and_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert onecurve("verify", run) == 0
    assert [line.split(" (")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{folder_name(step)}: whole" for step in (10, 20, 30, 40, 50)
    ]
    flip(run, 30)
    before = listing(run)
    assert onecurve("verify", run) == 4
    assert f"{folder_name(30)}: damaged: rank-00000.safetensors does not match its checksum" in capsys.readouterr().out
    assert onecurve("verify", run, "--step", "30") == 4
    assert onecurve("verify", run, "--step", "20") == 0
    assert onecurve("verify", run, "--fast") == 0  # sizes say nothing of it
    assert "sizes only" in capsys.readouterr().out
    assert listing(run) == before


def test_verify_tells_of_another_format(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = inspection.inspect_checkpoint(at(run, 10)).manifest  # type: ignore[union-attr]
    (at(run, 10) / MANIFEST).unlink()
    write_manifest(at(run, 10), {**manifest, "version": 1})
    assert onecurve("verify", run) == 4
    first, *others = capsys.readouterr().out.splitlines()
    assert "format version 1" in first
    assert all("whole" in line for line in others)


def test_what_a_run_deletes_meanwhile_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: Path) -> None:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        raise DamagedCheckpoint("no manifest.json")

    monkeypatch.setattr(inspection, "read_manifest", gone)
    assert inspection.inspect_checkpoint(at(run, 10)) is None


def test_diff_of_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = about(50, strategy={"name": "fsdp", "shards": [1]})
    save(tmp_path / "other", 50, tensors(50), {**other, "topology": {"processes": 4, "device": "cpu"}})
    assert onecurve("diff", run, tmp_path / "other") == 0  # what the manifests say differently is not counted
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"A  {at(run, 50)}",
        f"B  {at(tmp_path / 'other', 50)}",
        'config.strategy.name: "ddp" -> "fsdp"',
        "config.strategy.shards: (none) -> [1]",
        "topology.processes: 2 -> 4",
        "topology.threads: 1 -> (none)",
        "3 of 3 common tensors are equal to the bit",
    ]


def test_diff_of_others(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {**tensors(50), "model/new": torch.ones(1), "model/same": torch.arange(6.0).view(3, 2)}
    state["model/a"][63, 63] = 51
    del state["optimizer/step/a"]
    save(run, 60, state, about(60))
    assert onecurve("diff", f"{run}:50", at(run, 60)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "progress.step: 50 -> 60" in lines
    assert "only in A: optimizer/step/a" in lines
    assert "only in B: model/new" in lines
    assert "model/same: I64 [2, 3] -> F32 [3, 2]" in lines
    assert "0 of 1 common tensors are equal to the bit" in lines
    assert lines[-1].split() == ["0.0196", "1", "model/a"]


def test_diff_names_the_worst(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zeros = {f"model/{i:02}": torch.ones(3) for i in range(20)}
    save(tmp_path, 1, zeros, about(1))
    save(tmp_path, 2, {name: it + i / 8 for i, (name, it) in enumerate(zeros.items())}, about(2))
    assert onecurve("diff", f"{tmp_path}:1", f"{tmp_path}:2") == 1
    worst = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[-10:]]
    assert worst == [f"model/{i}" for i in range(19, 9, -1)]


def test_diff_in_batches_is_the_same(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = ({"path": at(run, step)} for step in (10, 20))
    pair = [inspection.FoundCheckpoint(it["path"], inspection.read_manifest(it["path"])) for it in (a, b)]
    whole = inspection.compare(*pair)
    monkeypatch.setattr(inspection, "BATCH", 1)
    monkeypatch.setattr(inspection, "BLOCK", 7)
    assert inspection.compare(*pair) == whole
    assert [it.name for it in whole.different] == ["model/a", "optimizer/step/a"]
    assert whole.equal == ["model/same"]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0], [1.0, 4.0], (0.5, 2)),
        ([0.0], [-0.0], (0, 0)),
        ([nan, 1.0], [nan, 2.0], (0.5, 1)),
        ([1.0], [nan], (inf, inf)),
        ([inf, 1.0], [inf, 2.0], (0.5, 1)),
        ([inf], [-inf], (inf, inf)),
        ([0.0], [3.0], (1, 3)),
    ],
)
def test_differences(a: list[float], b: list[float], expected: tuple[float, float]) -> None:
    assert inspection.difference(torch.tensor(a), torch.tensor(b)) == expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64])
def test_differences_of_every_type(dtype: torch.dtype) -> None:
    assert inspection.difference(torch.tensor(0, dtype=dtype), torch.tensor(1, dtype=dtype)) == (1, 1)


def test_diff_takes_the_newest_whole_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run, 50)
    assert onecurve("diff", run, f"{run}:40") == 0
    assert f"A  {at(run, 40)}" in capsys.readouterr().out
    assert at(run, 50).is_dir()  # nothing was set aside
    with pytest.raises(ConfigError, match=r"^B .*does not match its checksum"):
        onecurve("diff", run, at(run, 50))


def test_prune_keeps_what_the_run_would(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / ".attempt-step-00000060-x-0").mkdir()
    (run / "checkpoints" / ".attempt-step-00000060-x-0" / "part").write_bytes(bytes(1000))
    before = inspection.disk_usage(run / "checkpoints")
    assert onecurve("prune", run, "--dry-run") == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in told[:-1]] == [folder_name(10), folder_name(20), folder_name(30)]
    assert inspection.disk_usage(run / "checkpoints") == before
    assert not (run / ".lock").exists()
    assert onecurve("prune", run) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [folder_name(10), folder_name(20), folder_name(30)]
    assert steps(run) == [40, 50]
    freed = checkpoint.size(before - inspection.disk_usage(run / "checkpoints"))
    assert last == f"2 of 5 stay (the newest 2); freed {freed}"
    assert sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir()) == [
        folder_name(40), folder_name(50),
    ]  # fmt: skip


def test_prune_by_other_rules(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert onecurve("prune", run, "--keep", "1", "--every", "20", "--best", "loss") == 0
    assert steps(run) == [10, 20, 40, 50]
    assert "the newest 1, multiples of 20, the lowest loss" in capsys.readouterr().out


def test_prune_takes_its_rules_from_the_newest(run: Path) -> None:
    save(run, 60, tensors(60), about(60, checkpoint={"keep": 3, "keep_every": 20, "keep_best": "loss"}))
    assert onecurve("prune", run) == 0
    assert steps(run) == [10, 20, 40, 50, 60]
    assert onecurve("prune", run, "--every", "0", "--best", "") == 0
    assert steps(run) == [40, 50, 60]


@pytest.mark.parametrize("damage", [flip, lambda run, step: (at(run, step) / MANIFEST).unlink()])
def test_prune_deletes_nothing_that_is_needed(run: Path, damage: Any) -> None:
    damage(run, 50)
    for more in ([], ["--dry-run"]):
        with pytest.raises(TrainingError, match="nothing is deleted"):
            onecurve("prune", run, "--keep", "1", *more)
    assert steps(run) == [10, 20, 30, 40, 50]
    found, _ = find_newest(run / "checkpoints")
    assert found
    assert found.path == at(run, 40)


def test_prune_waits_for_no_run(run: Path) -> None:
    with FileLock(run / ".lock", blocking=False), pytest.raises(ConfigError, match="another process trains"):
        onecurve("prune", run)
    assert steps(run) == [10, 20, 30, 40, 50]
    with FileLock(run / ".lock", blocking=False):
        assert onecurve("prune", run, "--dry-run") == 0


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["ls", "nowhere"], "RUN_DIR nowhere: no such folder"),
        (["ls", "."], r"RUN_DIR \.: has no checkpoints/"),
        (["verify", "empty"], "RUN_DIR empty: has no checkpoint yet"),
        (["prune", "empty"], "RUN_DIR empty: has no checkpoint yet"),
        (["verify", "run", "--step", "15"], "--step 15: no checkpoint of this step; there are 10, 20, 30, 40, 50"),
        (["diff", "run", "run:15"], "B run:15: no checkpoint of this step; there are 10"),
        (["diff", "nowhere", "run"], "A nowhere: no such folder"),
        (["diff", "run", "nowhere:10"], "B nowhere: no such folder"),
        (["diff", "run/checkpoints", "run"], r"A run/checkpoints: no manifest\.json"),
        (["prune", "run", "--keep", "0"], "--keep: must be a number of at least 1, not 0"),
        (["prune", "run", "--every", "-5"], "--every: must be a number of steps, or 0 for none, not -5"),
        (["prune", "run", "--best", "bleu"], "--best bleu: no checkpoint was evaluated by it; choose among: loss"),
    ],
)
def test_what_is_wrong_is_named(run: Path, words: list[str], problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    (run.parent / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=problem):
        onecurve(*words)
    assert steps(run) == [10, 20, 30, 40, 50]


@pytest.mark.parametrize("command", ["ls", "verify", "prune"])
def test_storage_that_fails_is_no_damage(run: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Path, patience_s: float | None = None) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("trainer.checkpoint.reader.open_file", refuses)
    with pytest.raises(ConfigError, match=r"RUN_DIR .*manifest\.json: Permission denied"):
        onecurve(command, run)


def test_one_set_aside_is_listed_and_no_other_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, tensors(1), about(1))
    at(tmp_path, 1).rename(tmp_path / "checkpoints" / f".damaged-{folder_name(1)}-1")
    assert onecurve("ls", tmp_path) == 0
    assert "set aside as .damaged-step-00000001-1" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="set aside"):
        onecurve("verify", tmp_path)


@pytest.mark.slow
def test_on_the_command_line(run: Path) -> None:
    flip(run, 50)
    for words, code, text in (
        (["verify", str(run)], 4, "step-00000050: damaged"),
        (["ls", "nowhere"], 2, "RUN_DIR nowhere: no such folder"),
    ):
        command = [sys.executable, "-c", "from launch.cli import main; main()", "checkpoint", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        assert text in done.stdout + done.stderr


def test_diff_says_where_two_runs_part(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "other", 50, tensors(50), about(50))
    rows = [{"step": step, "loss": 3.0, "grad_norm": 1.0, "fingerprint": f"{step:x}"} for step in range(1, 6)]
    for folder, spoilt in ((run, {}), (tmp_path / "other", {"fingerprint": "0"})):
        lines = [json.dumps(row | (spoilt if row["step"] == 4 else {})) for row in rows]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert onecurve("diff", run, tmp_path / "other") == 0
    assert "the runs part at step 4: the first difference is in fingerprint" in capsys.readouterr().out
