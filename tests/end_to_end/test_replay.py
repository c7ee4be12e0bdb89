"""A step of a run again on one process: its samples, its numbers, and the poisoned document behind a spike."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from random import Random

import pytest
import yaml
from webdataset import TarWriter

from launch.cli import main
from tests.runs import Run
from trainer.config.compose import load
from trainer.sampling import open_run


@pytest.fixture
def onecurve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process; gives what it printed. `code`: the exit code it must have."""

    def command(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["onecurve", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert end.value.code == code, printed.err
        assert "Traceback" not in printed.err
        return printed.err if code else printed.out

    return command


def state_of(folder: Path) -> list[tuple]:
    return sorted((str(path), path.lstat().st_mtime_ns, path.lstat().st_size) for path in [folder, *folder.rglob("*")])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On two processes, then on one, with another learning rate and clipping."""
    overrides = (
        "strategy=fsdp",
        "train.steps=20",
        "train.micro_batch=4",
        "model.dropout=0.1",
        "track.wandb.mode=disabled",
    )
    run = Run(tmp_path_factory.mktemp("replay") / "run", 2, overrides)
    run.train()
    run.procs = 1
    run.overrides = (*overrides, "strategy=single", "train.steps=25", "optimizer.lr=0.001", "train.clip_norm=0.5")
    run.train()
    return run


@pytest.mark.parametrize(("step", "checkpoint"), [(17, 10), (3, 0), (25, 20)])
def test_the_same_batch_and_the_same_numbers(run: Run, onecurve, step: int, checkpoint: int) -> None:
    before = state_of(run.folder)
    told = json.loads(onecurve("replay", run.folder, "--step", step, "--json"))
    assert state_of(run.folder) == before
    row = run.metrics()[step - 1]
    assert (told["step"], told["checkpoint"], told["same"], told["apart_since"]) == (step, checkpoint, True, None)
    assert told["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert told["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
    assert told["recorded"] == {name: row[name] for name in ("loss", "grad_norm")}
    assert [sample["sample"] for sample in told["samples"]] == run.ledger()[step - 1]["samples"]
    assert [sample["number"] for sample in told["samples"]] == list(range((step - 1) * 24, step * 24))
    assert told["in_ledger"] is True
    losses = [sample["loss"] * sample["targets"] for sample in told["samples"]]
    assert sum(losses) / sum(sample["targets"] for sample in told["samples"]) == pytest.approx(row["loss"], rel=1e-5)
    assert all(len(sample["content"].encode()) in (47, 48) for sample in told["samples"])


def test_what_a_person_sees(run: Run, onecurve) -> None:
    text = onecurve("replay", run.folder, "--step", 12, "--checkpoint", 0, "--show", 3, "--bisect")
    assert "step 12 of shakespeare: 24 samples, 1,152 targets; from the initial weights, 11 steps done again" in text
    assert "\nthe same as recorded\nthe samples are those of ledger.jsonl\n" in text
    assert "and 21 more; --show 24 lists all" in text
    assert "\nnone stands out; the largest gradient: train-00000" in text
    assert all(line.isprintable() for line in text.splitlines())


def test_a_damaged_checkpoint_is_passed_over_and_other_weights_are_noticed(run: Run, onecurve, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    damaged = copy / "checkpoints" / "step-00000010"
    (file,) = damaged.glob("rank-00000.*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    before = state_of(copy)
    assert json.loads(onecurve("replay", copy, "--step", 12, "--json"))["checkpoint"] == 0
    assert "is not whole" in onecurve("replay", copy, "--step", 12, "--checkpoint", 10, code=2)
    assert state_of(copy) == before
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["run"]["seed"] += 1
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    (copy / "shards.json").unlink()
    told = json.loads(onecurve("replay", copy, "--step", 2, "--json"))
    assert (told["same"], told["apart_since"], told["in_ledger"]) == (False, 1, False)
    assert "not as recorded, from step 1 on" in onecurve("replay", copy, "--step", 2)


def test_what_was_done_with_another_optimizer(run: Run, onecurve, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    with open(tmp_path / "run" / "events.jsonl", "a") as file:
        event = {"kind": "config_changed", "step": 20, "changes": {"optimizer.name": ["lion", "adamw"]}}
        file.write(json.dumps(event) + "\n")
    told = onecurve("replay", tmp_path / "run", "--step", 20, code=2)
    assert "--step 20: was done with optimizer=lion, and since step 20 the run has optimizer=adamw" in told
    assert onecurve("replay", tmp_path / "run", "--step", 21)


def test_refusals(run: Run, onecurve, tmp_path: Path) -> None:
    assert "run has recorded steps 1 to 25" in onecurve("replay", run.folder, "--step", 26, code=2)
    assert "run has recorded steps 1 to 25" in onecurve("replay", run.folder, "--step", 0, code=2)
    assert "is not a run's folder" in onecurve("replay", tmp_path, "--step", 1, code=2)
    assert "--checkpoint 20: " in onecurve("replay", run.folder, "--step", 20, "--checkpoint", 20, code=2)


def test_a_config_of_many_processes_is_read_on_one(tmp_path: Path) -> None:
    config = load(["strategy=pipeline", "strategy.stages=2", "strategy.tensor_parallel=2"], world_size=4)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.resolved()))
    assert open_run(tmp_path)[0].strategy.name == "single"


POISON, KEY = "Q" * 47, "b100"
SPIKE = (
    "data=webdataset", "train.steps=27", "optimizer.lr=0.01", "schedule=constant", "schedule.warmup_steps=5",
    "eval.every=0", "data.lanes=6",
)  # fmt: skip


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of ordinary texts, one of them poisoned."""
    random, folder = Random(5), tmp_path_factory.mktemp("poisoned") / "in"
    folder.mkdir()
    for name in "abc":
        with TarWriter(str(folder / f"{name}.tar")) as tar:
            for i in range(200):
                text, key = "".join(random.choices("to be or not", k=random.randint(24, 47))), f"{name}{i:03d}"
                tar.write({"__key__": key, "txt": POISON if key == KEY else text})
    return folder


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_a_planted_spike_is_found_by_name(packing: str, poisoned: Path, onecurve, tmp_path: Path) -> None:
    """Under best_fit the run leaves the step out, and so does the replay of the next one."""
    guard = ("guard.loss_spike=10", "guard.window=8", "guard.bad_step=skip") if packing == "best_fit" else ()
    data = (*guard, f"data.packing={packing}", f"data.shards={poisoned}/*.tar", f"data.cache={poisoned.parent}/cache")
    run = Run(tmp_path / "run", 1, (*SPIKE, *data))
    run.train()
    late = run.metrics()[15:]
    spike = max(late, key=lambda row: row["loss"])["step"]
    assert late[spike - 16]["loss"] > 1.1 * sorted(row["loss"] for row in late)[len(late) // 2]
    assert [row["step"] for row in run.metrics() if row["skipped"]] == ([spike] if guard else [])
    after = json.loads(onecurve("replay", run.folder, "--step", spike + 1, "--json"))
    assert (after["same"], after["checkpoint"] < spike, after["apart_since"]) == (True, True, None)
    found = json.loads(onecurve("replay", run.folder, "--step", spike, "--bisect", "--json"))
    assert found["same"]
    blamed = found["bisect"]
    assert blamed["grad_norm"] > 3 * blamed["median"]
    assert blamed["without"]["loss"] < 0.9 * found["loss"]
    assert blamed["without"]["grad_norm"] < found["grad_norm"]
    (piece,) = [piece for piece in blamed["sample"] if piece[1] == KEY]
    if len(blamed["sample"]) > 1:
        assert blamed["documents"][0]["piece"] == piece
    assert f"\nfound: b.tar {KEY} [" in onecurve("replay", run.folder, "--step", spike, "--bisect")

    moved = poisoned.rename(poisoned.with_name("elsewhere"))
    try:
        assert f"no file matches {poisoned}/*.tar" in onecurve("replay", run.folder, "--step", spike, code=2)
    finally:
        moved.rename(poisoned)


def test_decoded_samples_and_those_that_were_left_out(onecurve, tmp_path: Path) -> None:
    """In a mixture; other contents than the run's are refused."""
    for name in "ab":
        with TarWriter(str(tmp_path / f"{name}.tar")) as tar:
            for i in range(40):
                tar.write({"__key__": f"{name}{i:02d}", "txt": b"\xff\xfe" if i == 7 else f"to be {i} or not".encode()})
    sources = ", ".join(f"{name}: {{shards: {tmp_path}/{name}.tar, weight: 1}}" for name in "ab")
    options = ("data=samples", "data.fields={tokens: txt}", f"data.sources={{{sources}}}", "data.on_error=quarantine")
    run = Run(tmp_path / "run", 1, (*options, "train.steps=4", "checkpoint.every=2", "train.batch_ramp={1: 12}"))
    run.train()
    places = [row for row in run.rows("quarantine.jsonl") if row["step"] is not None]
    assert {row["key"] for row in places} == {"a07", "b07"}
    step = places[0]["step"]
    told = json.loads(onecurve("replay", run.folder, "--step", step, "--json"))
    assert (told["same"], told["in_ledger"]) == (True, True)
    assert places[0]["number"] not in [sample["number"] for sample in told["samples"]]
    first = told["samples"][0]
    assert first["source"] == first["sample"][1][0]
    assert first["content"] == f"to be {int(first['sample'][1][1:])} or not"
    assert "a/a.tar a" in onecurve("replay", run.folder, "--step", step)

    with TarWriter(str(tmp_path / "a.tar")) as tar:
        for i in range(40):
            tar.write({"__key__": f"x{i:02d}", "txt": f"to be {i} or not"})
    told = onecurve("replay", run.folder, "--step", step, code=2)
    assert "data.sources.a.shards: not the texts or samples that the run began with" in told
