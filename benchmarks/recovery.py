"""From the kill of a rank to the first new step: `python benchmarks/recovery.py` writes recovery.json.

Two processes train the same GPT on bytes; one of them is killed at a step far from a checkpoint. In turns:

- onecurve: `onecurve train -n 2`; where the time goes is told by processes, logs and goodput.jsonl;
- torchrun: a plain script under DistributedDataParallel that saves with torch.save and loads with torch.load, restarted
  by torchrun (with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which a restart hangs now and then).

As ratios to the time that a fresh start takes until its first step, of the same program in the same run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

TURNS = 5
KILLED_AT, EVERY = 37, 10
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
OURS = (
    "experiment=none", "data=shakespeare", "data.tokenizer=bytes", "model.layers=4", "model.width=128", "model.heads=4",
    "data.sequence_length=128", "train.global_batch=16", "train.steps=100000", "schedule.warmup_steps=10",
    f"checkpoint.every={EVERY}", "eval.every=0", "sample.count=0", "track.report=false", "track.console=false",
    "track.wandb.mode=disabled", "train.log_every=1", "precision=fp32",
)  # fmt: skip
PLAIN = """
import os, sys, time
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pathlib import Path
from trainer.config.compose import load
from trainer.facts import Facts
from trainer.models.gpt import GPT
folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
config = load(sys.argv[2:], 2)
model = torch.nn.parallel.DistributedDataParallel(GPT(config.model, Facts(256, 128, steps=1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
step, saved = 0, folder / "checkpoint.pt"
if saved.exists():
    state = torch.load(saved)
    step = state["step"]
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
while True:
    tokens = torch.randint(256, (8, 129), generator=torch.Generator().manual_seed(2 * step + rank))
    outputs = model({"inputs": tokens[:, :-1]})
    F.cross_entropy(outputs.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    if rank == 0:
        with open(folder / "steps", "a") as file:
            file.write(f"{step}\\n")
    if step % 10 == 0:
        if rank == 0:
            torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        dist.barrier()
"""


def onecurve(folder: Path) -> dict[str, float]:
    run, python = folder / "run", [sys.executable, "-c", "from launch.cli import main; main()"]
    started_at = time.time()
    process = launch([*python, "train", "-n", "2", *OURS, f"run.dir={run}"], folder)
    try:
        metrics = run / "metrics.jsonl"
        wait(lambda: last_step(metrics) >= 1)
        fresh = time.time() - started_at
        wait(lambda: last_step(metrics) >= KILLED_AT)
        old_ranks = ranks(process.pid)
        killed_at = time.time()
        os.kill(old_ranks["1"], signal.SIGKILL)
        wait(lambda: not any(alive(pid) for pid in old_ranks.values()))
        dead_at = time.time()
        old_pids = set(old_ranks.values())
        wait(lambda: len(new_ranks := ranks(process.pid)) == 2 and not set(new_ranks.values()) & old_pids)
        forked_at = time.time()
        wait(lambda: resumed_step(run / "events.jsonl") is not None)
        resumed_at = resumed_step(run / "events.jsonl") or 0
        wait(lambda: last_step(metrics) > resumed_at)
        stepped_at = time.time()
        restored_at = restore_time(run / "goodput.jsonl")
        opened_at = log_time(run / "logs" / "rank-1.log", killed_at)
    finally:
        end(process)
    return {
        "fresh": fresh, "all": stepped_at - killed_at, "noticed, others ended": dead_at - killed_at,
        "new processes": forked_at - dead_at, "joined, data opened": opened_at - forked_at,
        "model built, checkpoint loaded": restored_at - opened_at, "first step": stepped_at - restored_at,
    }  # fmt: skip


def torchrun(folder: Path) -> dict[str, float]:
    script, steps = folder / "plain.py", folder / "steps"
    script.write_text(PLAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=9"]
    started_at = time.time()
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = launch([*command, str(script), str(folder), *OURS], folder, environment)
    try:
        wait(lambda: steps.exists() and bool(lines(steps)))
        fresh = time.time() - started_at
        wait(lambda: lines(steps)[-1:] >= [KILLED_AT])
        count = len(lines(steps))
        victim = children(process.pid)[1]
        killed_at = time.time()
        os.kill(victim, signal.SIGKILL)
        wait(lambda: len(lines(steps)) > count and lines(steps)[-1] < lines(steps)[count - 1])
        stepped_at = time.time()
    finally:
        end(process)
    return {"fresh": fresh, "all": stepped_at - killed_at}


def launch(command: list[str], folder: Path, extra: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=folder, env={**ENVIRONMENT, **(extra or {})}, stdout=quiet, stderr=quiet)


def end(process: subprocess.Popen[bytes]) -> None:
    for pid in [process.pid, *children(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, "nothing happens any more"
        time.sleep(0.002)


def last_step(metrics: Path) -> int:
    """Returns the newest step that was recorded."""
    with suppress(OSError, ValueError, IndexError):
        return json.loads(metrics.read_bytes().split(b"\n")[-2])["step"]
    return 0


def resumed_step(events: Path) -> int | None:
    """Returns the step from which the run went on; by then its record is cut back to it."""
    rows = [json.loads(line) for line in events.read_text().split("\n")[:-1]]
    return next((row["step"] for row in rows if row["kind"] == "resume"), None)


def lines(steps: Path) -> list[int]:
    return [int(line) for line in steps.read_text().split("\n")[:-1]]


def restore_time(goodput: Path) -> float:
    """Returns when the newest life had its checkpoint loaded."""
    rows = [json.loads(line) for line in goodput.read_text().splitlines()]
    return datetime.fromisoformat([row["time"] for row in rows if row.get("restored")][-1]).timestamp()


def log_time(log: Path, since: float) -> float:
    """Returns when a rank first opened its log after `since`: it has joined, opened the data and taken the folder."""
    stamps = re.findall(r"^(\S+ \S+),(\d+) INFO rank", log.read_text(), re.M)
    times = [datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S").timestamp() + int(part) / 1000 for stamp, part in stamps]
    return next(stamp for stamp in times if stamp > since)


def ranks(pid: int) -> dict[str, int]:
    pids = {}
    for child in children(pid):
        with suppress(OSError):
            if match := re.fullmatch(r"onecurve-(\d+)\n", Path(f"/proc/{child}/comm").read_text()):
                pids[match[1]] = child
    return pids


def children(pid: int) -> list[int]:
    """Returns all descendants of a process."""
    try:
        direct = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []
    return [*direct, *(descendant for child in direct for descendant in children(child))]


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def main() -> None:
    results: dict[str, list[dict[str, float]]] = {"onecurve": [], "torchrun": []}
    for turn in range(TURNS):
        for name, way in (("onecurve", onecurve), ("torchrun", torchrun)):
            with tempfile.TemporaryDirectory() as folder:
                results[name].append(way(Path(folder)))
                print(turn, name, {part: round(value, 3) for part, value in results[name][-1].items()}, flush=True)
    table = {
        name: {part: round(statistics.median(turn[part] for turn in turns), 3) for part in turns[0]}
        for name, turns in results.items()
    }
    result = {
        "what": "seconds, medians of 5 turns, 2 processes",
        "seconds": table,
        "to the first new step, in fresh starts": {name: round(t["all"] / t["fresh"], 2) for name, t in table.items()},
        "torchrun / onecurve": round(table["torchrun"]["all"] / table["onecurve"]["all"], 2),
        "turns": results,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: part for name, part in result.items() if name != "turns"}, indent=1))


if __name__ == "__main__":
    main()
