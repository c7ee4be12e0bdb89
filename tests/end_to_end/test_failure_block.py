"""What a person reads when a run fails: one block, whose first line says what happened and what to do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launch.failure import failure_block
from tests.end_to_end.test_refusals import onecurve
from tests.runs import TINY
from trainer import diagnosis

NET = """
import torch
import trainer.config

class Net(torch.nn.Module):
    class Config(trainer.config.Plugin):
        pass
    def __init__(self, config, facts):
        super().__init__()
        self.embedding = torch.nn.Embedding(facts.vocab_size, facts.vocab_size)
    def forward(self, batch):
        import not_installed_here
    def initialise(self, name, parameter, generator):
        parameter.normal_(0.0, 0.1, generator=generator)
"""


def test_the_block_of_what_a_rank_told(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-3.log").write_text("".join(f"line {n}\n" for n in range(40)))
    told = {"rank": 3, "step": 7, "reason": "out of memory: try this\nand that"}
    first, *rest = failure_block(tmp_path, told, [], "no new checkpoint in 3 restarts").strip().splitlines()
    assert first == "onecurve: rank 3 failed at step 7: out of memory: try this"
    assert [line.strip() for line in rest[:2]] == ["and that", "no restart: no new checkpoint in 3 restarts"]
    assert rest[2].endswith("logs/rank-3.log:")
    assert rest[3:] == [f"    line {n}" for n in range(28, 40)]


def test_the_block_of_a_process_that_was_killed(tmp_path: Path) -> None:
    (line,) = failure_block(tmp_path, None, [(1, -9), (0, 4)], "").strip().splitlines()
    assert line.startswith("onecurve: rank 1 was killed (signal 9), probably by the kernel for want of memory")


def test_causes_are_told_apart() -> None:
    assert "install the package of 'foo.bar'" in str(
        diagnosis.advice_for("ModuleNotFoundError: No module named 'foo.bar'")
    )
    assert "disk is full" in str(diagnosis.advice_for("OSError: [Errno 28] No space left on device: '/x'"))
    assert "launch.timeout_s" in str(
        diagnosis.advice_for("[gloo/unbound_buffer.cc:81] Timed out waiting 5000ms for recv")
    )
    assert "launch.timeout_s" in str(
        diagnosis.advice_for("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7")
    )
    assert "first NCCL warning" in str(
        diagnosis.advice_for("NCCL error in: ProcessGroupNCCL.cpp:1691, unhandled system error")
    )
    assert diagnosis.advice_for("ValueError: 3") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (
            ("debug.faults=[data.next:errno@ENOSPC:3+:1]",),
            4,
            ("rank 1 failed at step 2: OSError: [Errno 28] No space left on device", "the disk is full: free some"),
        ),
        (
            ("model.width=262144",),
            4,
            ("failed at step 0: out of memory: try train.activation_checkpointing=full or train.micro_batch below 12",),
        ),
        (
            ("data.shards=gone-{000000..000001}.tar", "data=webdataset"),
            2,
            ("data.shards: missing file gone-000000.tar",),
        ),
        (
            ("launch.timeout_s=3", "watchdog.enabled=false", "debug.faults=[data.next:delay@20:3+:1]"),
            4,
            ("lost another process", "did not come to what all do together within launch.timeout_s"),
        ),
        (
            ("model=net", "run.plugins=[plugged]"),
            4,
            ("ModuleNotFoundError: No module named 'not_installed_here': install the package",),
        ),
    ],
    ids=["full disk", "out of memory", "missing shard", "time-out", "import"],
)
def test_one_block(tmp_path: Path, overrides: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    (tmp_path / "plugged.py").write_text(NET)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "net.yaml").write_text("name: plugged:Net\n")
    base = [part for part in TINY if not (part.startswith("model.") and "model=net" in overrides)]
    command = onecurve("train", "-n", "2", "--config-dir", "conf", *base, "train.steps=8", "train.log_every=1")
    command += ["launch.restarts=0", "run.dir=run", *overrides]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stdout + done.stderr
    blocks = [line for line in done.stderr.splitlines() if line.startswith("onecurve: ")]
    assert len(blocks) == 1, done.stderr
    first = " ".join(done.stderr[done.stderr.index("onecurve: ") :].splitlines()[: 2 if code == 2 else 1])
    for word in words:
        assert word in first, done.stderr
    if code != 2:
        assert "the last lines of run/logs/rank-" in done.stderr
