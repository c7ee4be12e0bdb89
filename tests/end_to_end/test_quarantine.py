"""Damaged data in real runs on 2 processes: `fail` names it, `quarantine` goes on, each life leaves out the same."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from webdataset import TarWriter

from tests.runs import Run, assert_same_bits, assert_same_curve

OVERRIDES = ("data=webdataset", "train.steps=30", "train.log_every=1", "checkpoint.every=10", "data.lanes=6")


def shards(folder: Path, field: str = "txt") -> tuple[str, ...]:
    """Three shards of 40 documents; returns the overrides that train on them."""
    random = Random(3)
    folder.mkdir()
    for name in "abc":
        with TarWriter(str(folder / f"{name}.tar")) as tar:
            for i in range(40):
                text = "".join(random.choices("to be or not", k=random.randint(200, 900)))
                content = text if field == "txt" else np.frombuffer(text.encode(), np.uint8).astype("<u2").tobytes()
                tar.write({"__key__": f"{name}{i:02d}", field: content})
    return (*OVERRIDES, f"data.shards={folder}/*.tar", f"data.field={field}", f"data.cache={folder.parent}/cache")


def damage(shard: Path) -> int:
    """Overwrites the header that follows the middle of a shard; gives its byte."""
    content = bytearray(shard.read_bytes())
    at = content.index(b"ustar", len(content) // 2) - 257
    content[at : at + 300] = b"x" * 300
    shard.write_bytes(content)
    return at


def quarantined(run: Run) -> list[dict]:
    rows = [row for row in run.rows("events.jsonl") if row["kind"] == "quarantined"]
    return [{name: row[name] for name in ("shard", "key", "byte", "cause", "number")} for row in rows]


@pytest.mark.slow
def test_a_damaged_shard_fails_by_default(tmp_path: Path) -> None:
    overrides = shards(tmp_path / "in")
    at = damage(tmp_path / "in" / "b.tar")
    output = Run(tmp_path / "run", 2, overrides).train(expect=3)
    assert f"b.tar: byte {at}" in output
    assert f"b.tar: byte {at}" in Run(tmp_path / "run", 1, overrides).train(expect=3)


@pytest.mark.slow
def test_quarantine_goes_on_and_its_killed_twin_has_the_same_ledger(tmp_path: Path) -> None:
    overrides = (*shards(tmp_path / "in"), "data.on_error=quarantine")
    at = damage(tmp_path / "in" / "b.tar")
    whole = Run(tmp_path / "whole", 2, overrides)
    whole.train()
    (fault,) = quarantined(whole)
    assert (Path(fault["shard"]).name, fault["byte"], fault["number"]) == ("b.tar", at, None)
    assert f"byte {at}" in fault["cause"]
    used = {(shard, key) for row in whole.ledger() for sequence in row["samples"] for shard, key, *_ in sequence}
    of_b = sorted(key for shard, key in used if shard == "b.tar")
    assert of_b == [f"b{i:02d}" for i in range(len(of_b))]  # what lies before the damage
    assert 15 <= len(of_b) <= 25
    assert {key for shard, key in used if shard == "a.tar"} == {f"a{i:02d}" for i in range(40)}

    killed = Run(tmp_path / "killed", 2, overrides)
    killed.kill_at(14)
    killed.train()
    assert_same_bits(killed, whole)
    assert quarantined(killed) == [fault]  # told once
    resized = Run(tmp_path / "resized", 2, overrides)
    resized.kill_at(14)
    resized.procs = 3
    resized.train()
    assert_same_curve(resized, whole, 30)


@pytest.mark.slow
def test_documents_that_are_no_text(tmp_path: Path) -> None:
    overrides = shards(tmp_path / "in")
    with TarWriter(str(tmp_path / "in" / "d.tar")) as tar:
        for i in range(20):
            tar.write({"__key__": f"d{i:02d}", "txt": b"\xff\xfe" if i == 7 else b"what a piece of work is man " * 20})
    output = Run(tmp_path / "run", 2, overrides).train(expect=3)
    assert re.search(r"d\.tar: byte \d+: sample 'd07' is not UTF-8 text", output)
    run = Run(tmp_path / "run", 2, (*overrides, "data.on_error=quarantine"))
    run.train()
    assert [fault["key"] for fault in quarantined(run)] == ["d07"]
    spent = Run(tmp_path / "spent", 1, (*overrides, "data.on_error=quarantine", "data.error_budget=0"))
    assert "data.error_budget=0" in spent.train(expect=3)
    assert spent.status()["exit_code"] == 3


@pytest.mark.slow
def test_what_was_left_out_stays_out_though_it_can_be_read_again(tmp_path: Path) -> None:
    """Token ids are read from the shard itself: it is cut short during the run, and whole again for the next life."""
    limit = ("data.workers=0", "data.on_error=quarantine", "data.error_budget=10000")
    run = Run(tmp_path / "run", 2, (*shards(tmp_path / "in", "u16"), *limit))
    shard = tmp_path / "in" / "c.tar"
    content = shard.read_bytes()

    def cut() -> None:
        while run.last_step() < 5:
            time.sleep(0.01)
        os.truncate(shard, len(content) // 3)

    cutter = threading.Thread(target=cut)
    cutter.start()
    run.kill_at(16)
    cutter.join()
    left_out, seen = quarantined(run), run.ledger()
    assert left_out
    assert all(Path(fault["shard"]).name == "c.tar" and "the file ends here" in fault["cause"] for fault in left_out)
    shard.write_bytes(content)
    run.train()
    assert run.ledger()[: len(seen)] == seen
    assert quarantined(run) == left_out
    assert run.status()["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("field", ["txt", "u16"])
def test_a_shard_that_is_damaged_while_the_run_goes_on(tmp_path: Path, field: str) -> None:
    """Killed behind that and started again, it takes the shard as it was: the curve of the run that was not killed."""
    overrides = (*shards(tmp_path / "in", field), "data.on_error=quarantine")
    whole = Run(tmp_path / "whole", 2, overrides)
    whole.train()
    assert not quarantined(whole)
    killed = Run(tmp_path / "killed", 2, overrides)
    killed.kill_at(16)
    at = damage(tmp_path / "in" / "b.tar")
    (fails,) = Run(killed.folder, 1, (*overrides, "data.on_error=fail")).train(expect=3).split("problem")[1:]
    assert f"b.tar: byte {at}" in fails
    killed.train()
    (fault,) = quarantined(killed)
    assert (Path(fault["shard"]).name, fault["byte"]) == ("b.tar", at)
    assert_same_bits(killed, whole)


@pytest.mark.slow
def test_a_damaged_shard_that_is_repaired_changes_nothing_about_the_run(tmp_path: Path) -> None:
    overrides = (*shards(tmp_path / "in"), "data.on_error=quarantine")
    content = (tmp_path / "in" / "b.tar").read_bytes()
    damage(tmp_path / "in" / "b.tar")
    whole = Run(tmp_path / "whole", 1, overrides)
    whole.train()
    run = Run(tmp_path / "run", 1, overrides)
    run.kill_at(16)
    (tmp_path / "in" / "b.tar").write_bytes(content)
    run.train()
    assert_same_bits(run, whole)
