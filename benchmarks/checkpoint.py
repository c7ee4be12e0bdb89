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
Way = Callable[[State, Path], tuple[float, Callable[[], None]]]  # saves; gives the stall, and what waits for the end
TURNS, STEPS = 4, 10


def large() -> State:
    """500 MB: 40 matrices and what AdamW keeps of them."""
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

    def ours(asynchronous: bool, hashed: bool) -> Way:
        makers: dict[Path, Saver] = {}

        def save(state: State, path: Path) -> tuple[float, Callable[[], None]]:
            own = folder / f"ours-{asynchronous}-{hashed}"
            own.mkdir(exist_ok=True)
            if own not in makers:
                makers[own] = Saver(own, ranks, Retention(), asynchronous=asynchronous)
            saver, number = makers[own], int(path.name)
            nothing = mock.patch("trainer.checkpoint.format.xxhash.xxh3_128", NoHash)
            nothing.start() if not hashed else None
            started = time.monotonic()
            saver.save(number, state, {})
            stall = time.monotonic() - started

            def wait() -> None:
                saver.wait()
                nothing.stop() if not hashed else None
                assert saver.problem is None
                ranks.barrier()
                if ranks.is_main and hashed:
                    shutil.copytree(own / f"step-{number:08d}", path, copy_function=os.link)
                ranks.barrier()

            return stall, wait

        return save

    return {
        "torch.save on rank 0": torch_save,
        "dcp.save": dcp_save,
        "dcp.async_save": dcp_async,
        "onecurve, blocking": ours(False, True),
        "onecurve": ours(True, True),
        "onecurve without hashes": ours(True, False),
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
    alone = (time.monotonic() - started) / max(1, 2 * steps)
    found: dict[str, dict[str, Any]] = {name: {"stall": [], "ten": [], "total": []} for name in ways(ranks, folder)}
    made = ways(ranks, folder)
    for turn in range(TURNS):
        for name, way in made.items():
            path = folder / name.replace(" ", "-") / str(turn + 1)
            if ranks.is_main:
                path.parent.mkdir(exist_ok=True)
                os.sync()
            ranks.barrier()
            before, begun = _rss(), time.monotonic()
            stall, wait = way(state, path)
            for _ in range(steps):
                step(state, work)
            found[name]["ten"].append((time.monotonic() - begun - stall) / max(1, steps))
            wait()
            found[name]["total"].append(time.monotonic() - begun)
            found[name]["stall"].append(stall)
            found[name]["memory"] = max(found[name].get("memory", 0), _rss() - before)
            if turn == TURNS - 1 and "without" not in name:
                begun = time.monotonic()
                load(name, state, path)
                found[name]["load_s"] = round(time.monotonic() - begun, 3)
                found[name]["mb"] = round(sum(file.stat().st_size for file in path.iterdir()) / 1e6, 1)
            ranks.barrier()
            if ranks.is_main:
                shutil.rmtree(path, ignore_errors=True)
    for its in found.values():
        its["first_stall_s"] = round(its["stall"][0], 4)
        its["stall_s"] = round(statistics.median(its.pop("stall")[1:]), 4)
        ten = statistics.median(its.pop("ten")[1:])
        if steps:
            its["slower"] = round(ten / alone, 3)
        its["written_s"] = round(statistics.median(its.pop("total")[1:]), 3)
        its["held_mb"] = round(its.pop("memory") / 1e6)
    return {"step_s": round(alone, 4), "ways": found}


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def rank(out: Path) -> None:
    ranks = topology.join(timeout_s=600)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=out.parent) if ranks.is_main else mock.MagicMock() as name:
        folder = Path(ranks.broadcast(str(name)))
        result = {"cpus": os.cpu_count(), "processes": ranks.world_size, "torch": torch.__version__}
        for what, state, steps in (("500 MB", large(), STEPS), ("20,000 tensors", small(), 0)):
            (folder / what).mkdir() if ranks.is_main else None
            ranks.barrier()
            result[what] = measure(ranks, folder / what, state, steps)
        ranks.barrier()
    if ranks.is_main:
        out.write_text(json.dumps(result, indent=1) + "\n")
    ranks.close()


def main() -> None:
    out = Path(__file__).with_suffix(".json")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, __file__, "rank", str(out)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for what in ("500 MB", "20,000 tensors"):
        print(what)
        for name, its in json.loads(out.read_text())[what]["ways"].items():
            print(f"  {name:26}", "  ".join(f"{key} {value}" for key, value in its.items()))


if __name__ == "__main__":
    rank(Path(sys.argv[2])) if sys.argv[1:2] == ["rank"] else main()
