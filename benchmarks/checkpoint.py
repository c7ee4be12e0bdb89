"""What a checkpoint costs, side by side: `python benchmarks/checkpoint.py` writes checkpoint.json, in 4 minutes.

Two processes hold the same 500 MB (as under ddp) and do steps of matrix products that change it. Each way of saving is
measured in turns, on the same disk, in fresh folders: how long the step stands still, how long ten steps take while it
writes, how long until it is there, how long loading takes, and the most memory above what training has. Ways:

- torch.save: rank 0 writes all of it, the others wait;
- dcp.save, dcp.async_save: torch's distributed checkpoint, in a folder a save, on a group of its own;
- onecurve: our Saver; "without hashes" is the same without checksums, "blocking" waits for the end.

The second part saves a model of 20,000 small tensors.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from trainer import topology
from trainer.checkpoint.format import verify
from trainer.checkpoint.load import FoundCheckpoint, read_state
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.save import Saver

State = dict[str, torch.Tensor]
Way = Callable[[State, Path], tuple[float, Callable[[], None]]]  # saves; returns the stall, and a wait for the end
TURNS, STEPS = 4, 10


def large() -> State:
    """Returns 500 MB: 40 matrices and AdamW's state of them."""
    return {
        f"{kind}/{i}": torch.randn(1024, 1040) for i in range(40) for kind in ("model", "optimizer/m", "optimizer/v")
    }


def small() -> State:
    return {f"model/{i}": torch.randn(16) for i in range(20_000)}


def step(state: State, work: torch.Tensor) -> None:
    for _ in range(12):
        work = work @ work * 1e-3
    torch._foreach_add_(list(state.values()), 1e-6)
    dist.all_reduce(torch.zeros(1))


class NoHash:
    def update(self, _: Any) -> None: ...

    def hexdigest(self) -> str:
        return "0" * 32


def ways(ranks: topology.Topology, folder: Path) -> dict[str, Way]:
    saving = dist.new_group(backend="gloo")

    def torch_save(state: State, path: Path) -> tuple[float, Callable[[], None]]:
        started = time.monotonic()
        if ranks.is_main:
            path.mkdir()
            with open(path / "all.pt", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        ranks.barrier()
        return time.monotonic() - started, lambda: None

    def dcp_save(state: State, path: Path) -> tuple[float, Callable[[], None]]:
        started = time.monotonic()
        dcp.save(state, checkpoint_id=path, process_group=saving)
        return time.monotonic() - started, lambda: None

    def dcp_async(state: State, path: Path) -> tuple[float, Callable[[], None]]:
        started = time.monotonic()
        future: Any = dcp.async_save(state, checkpoint_id=path, process_group=saving)
        return time.monotonic() - started, lambda: future.result() and None

    def onecurve_way(asynchronous: bool, hashed: bool) -> Way:
        makers: dict[Path, Saver] = {}

        def save(state: State, path: Path) -> tuple[float, Callable[[], None]]:
            saver_folder = folder / f"ours-{asynchronous}-{hashed}"
            saver_folder.mkdir(exist_ok=True)
            if saver_folder not in makers:
                makers[saver_folder] = Saver(saver_folder, ranks, Retention(), asynchronous=asynchronous)
            saver, number = makers[saver_folder], int(path.name)
            no_hash = mock.patch("trainer.checkpoint.format.xxhash.xxh3_128", NoHash)
            no_hash.start() if not hashed else None
            started = time.monotonic()
            saver.save(number, state, {})
            stall = time.monotonic() - started

            def wait() -> None:
                saver.wait()
                no_hash.stop() if not hashed else None
                assert saver.problem is None
                ranks.barrier()
                if ranks.is_main and hashed:
                    shutil.copytree(saver_folder / f"step-{number:08d}", path, copy_function=os.link)
                ranks.barrier()

            return stall, wait

        return save

    return {
        "torch.save on rank 0": torch_save,
        "dcp.save": dcp_save,
        "dcp.async_save": dcp_async,
        "onecurve, blocking": onecurve_way(False, True),
        "onecurve": onecurve_way(True, True),
        "onecurve without hashes": onecurve_way(True, False),
    }


def load(name: str, state: State, path: Path) -> None:
    target = {key: torch.zeros_like(value) for key, value in state.items()}
    if name.startswith("torch"):
        target = torch.load(path / "all.pt", weights_only=True)
    elif name.startswith("dcp"):
        dcp.load(target, checkpoint_id=path)
    else:
        read_state(FoundCheckpoint(path, verify(path)), target)
    assert all(torch.isfinite(value).all() for value in list(target.values())[:3])


def measure(ranks: topology.Topology, folder: Path, state: State, steps: int) -> dict[str, Any]:
    work = torch.randn(700, 700)
    for _ in range(3):
        step(state, work)
    started = time.monotonic()
    for _ in range(2 * steps):
        step(state, work)
    plain_step_s = (time.monotonic() - started) / max(1, 2 * steps)
    results: dict[str, dict[str, Any]] = {name: {"stall": [], "ten": [], "total": []} for name in ways(ranks, folder)}
    ways_by_name = ways(ranks, folder)
    for turn in range(TURNS):
        for name, way in ways_by_name.items():
            path = folder / name.replace(" ", "-") / str(turn + 1)
            if ranks.is_main:
                path.parent.mkdir(exist_ok=True)
                os.sync()
            ranks.barrier()
            rss_before, way_start = _rss(), time.monotonic()
            stall, wait = way(state, path)
            for _ in range(steps):
                step(state, work)
            results[name]["ten"].append((time.monotonic() - way_start - stall) / max(1, steps))
            wait()
            results[name]["total"].append(time.monotonic() - way_start)
            results[name]["stall"].append(stall)
            results[name]["memory"] = max(results[name].get("memory", 0), _rss() - rss_before)
            if turn == TURNS - 1 and "without" not in name:
                way_start = time.monotonic()
                load(name, state, path)
                results[name]["load_s"] = round(time.monotonic() - way_start, 3)
                results[name]["mb"] = round(sum(file.stat().st_size for file in path.iterdir()) / 1e6, 1)
            ranks.barrier()
            if ranks.is_main:
                shutil.rmtree(path, ignore_errors=True)
    for numbers in results.values():
        numbers["first_stall_s"] = round(numbers["stall"][0], 4)
        numbers["stall_s"] = round(statistics.median(numbers.pop("stall")[1:]), 4)
        ten = statistics.median(numbers.pop("ten")[1:])
        if steps:
            numbers["slower"] = round(ten / plain_step_s, 3)
        numbers["written_s"] = round(statistics.median(numbers.pop("total")[1:]), 3)
        numbers["held_mb"] = round(numbers.pop("memory") / 1e6)
    return {"step_s": round(plain_step_s, 4), "ways": results}


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def rank(out: Path) -> None:
    ranks = topology.join(timeout_s=600)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=out.parent) if ranks.is_main else mock.MagicMock() as name:
        folder = Path(ranks.broadcast(str(name)))
        result = {"cpus": os.cpu_count(), "processes": ranks.world_size, "torch": torch.__version__}
        for title, state, steps in (("500 MB", large(), STEPS), ("20,000 tensors", small(), 0)):
            (folder / title).mkdir() if ranks.is_main else None
            ranks.barrier()
            result[title] = measure(ranks, folder / title, state, steps)
        ranks.barrier()
    if ranks.is_main:
        out.write_text(json.dumps(result, indent=1) + "\n")
    ranks.close()


def main() -> None:
    out = Path(__file__).with_suffix(".json")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, __file__, "rank", str(out)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for title in ("500 MB", "20,000 tensors"):
        print(title)
        for name, numbers in json.loads(out.read_text())[title]["ways"].items():
            print(f"  {name:26}", "  ".join(f"{key} {value}" for key, value in numbers.items()))


if __name__ == "__main__":
    rank(Path(sys.argv[2])) if sys.argv[1:2] == ["rank"] else main()
