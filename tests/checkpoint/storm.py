"""Every crash point of a save: `strace` kills it, or makes it fail, at its n-th call of the kernel, for every n.

A driver imports torch once and forks a life for each point. A life is one process or two; it has saved step 1, and is
then told to save steps 2 and 3. What it has been told of (acknowledged) it writes down.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.checkpoint.load import find_newest, read_all
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.save import Saver
from trainer.errors import TrainingError
from trainer.topology import Topology

CALLS = ("openat", "write", "fsync", "rename", "mkdir", "unlink", "unlinkat", "rmdir")
SHAPE = (64, 100)
FORK = multiprocessing.get_context("fork")
Save = Callable[[Path, Topology], Iterator[int]]  # saves steps 1, 2, 3; yields those that are acknowledged, else 0


def state(step: int) -> dict[str, torch.Tensor]:
    return {f"model/{name}": torch.full(SHAPE, float(step)) for name in "abcd"}


def saving(folder: Path, topology: Topology) -> Iterator[int]:
    """As the product saves."""
    saver = Saver(folder, topology, Retention(keep=2), asynchronous=False, pauses=())
    for step in (1, 2, 3):
        (event,) = saver.save(step, state(step), {})
        yield step * (event["kind"] == "checkpoint")


def recovered(folder: Path) -> int:
    """The step that a run would go on from; 0 where it begins, -1 where it refuses to."""
    try:
        found, _ = find_newest(folder)
    except TrainingError:
        return -1
    if found is None:
        return 0
    step = found.manifest["step"]
    expected, got = state(step), read_all(found)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got), "a mixture of steps"
    return step


@dataclass
class Life:
    """One or two processes that save in `folder`."""

    folder: Path
    save: Save
    size: int

    def start(self) -> list[BaseProcess]:
        """They have saved step 1, and wait."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "checkpoints").mkdir(parents=True)
        processes = [FORK.Process(target=self._live, args=(rank,)) for rank in range(self.size)]
        for process in processes:
            process.start()
        self._until(lambda: all((self.folder / f"ready.{rank}").exists() for rank in range(self.size)), processes)
        return processes

    def go(self, processes: list[BaseProcess]) -> None:
        """Lets them save the rest, and waits for their ends; of the others too, once one has lost its peer."""
        (self.folder / "go").touch()
        for process in processes:
            process.join(60)
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()

    @property
    def told(self) -> list[list[int]]:
        """Of each rank and save: the step where it was acknowledged, else 0."""
        return [[int(step) for step in path.read_text().split()] for path in self.folder.glob("told.*")]

    def _until(self, condition: Callable[[], bool], processes: list[BaseProcess]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            assert all(process.is_alive() for process in processes)
            time.sleep(0.002)

    def _live(self, rank: int) -> None:
        torch.set_num_threads(1)
        control = group = None
        if self.size > 1:
            store = dist.FileStore(str(self.folder / "store"), self.size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=self.size, timeout=timedelta(seconds=20))
            control, group = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
        topology = Topology(rank, self.size, rank, self.size, torch.device("cpu"), rank, self.size, control, group)
        told = os.open(self.folder / f"told.{rank}", os.O_WRONLY | os.O_CREAT)
        with suppress(BaseException):
            for number, step in enumerate(self.save(self.folder / "checkpoints", topology)):
                os.pwrite(told, f"{step} ".encode(), 2 * number)  # no call that is counted
                if not number:
                    os.mknod(self.folder / f"ready.{rank}")
                    while not os.path.exists(self.folder / "go"):
                        time.sleep(0.002)
        os._exit(0)


@dataclass
class Outcome:
    call: str
    n: int
    reached: bool
    told: list[list[int]]
    recovered: int

    @property
    def acknowledged(self) -> int:
        return max(step for its in self.told for step in its)

    @property
    def lost(self) -> bool:
        return self.recovered < self.acknowledged


def points(
    life: Life, victim: int | None, effect: str, calls: tuple[str, ...] = CALLS, lasting: bool = False
) -> Iterator[Outcome]:
    """What becomes of a life when each call of the kernel, in its turn, has this effect on one rank (None: on all):
    "signal=KILL" instead of it, or an error such as "error=ENOSPC". `lasting`: and all calls of its kind after it."""
    for call in calls:
        n, reached = 0, True
        while reached:
            n += 1
            processes = life.start()
            victims = processes if victim is None else [processes[victim]]
            log = life.folder / "strace.log"
            pids = [argument for process in victims for argument in ("-p", str(process.pid))]
            inject = f"inject={call}:{effect}:when={n}{'+' * lasting}"
            tracer = subprocess.Popen(
                ["strace", "-f", "-o", str(log), *pids, "-e", f"trace={call}", "-e", inject],
                stderr=subprocess.PIPE,
                text=True,
            )
            assert tracer.stderr
            for _ in victims:
                line = tracer.stderr.readline()
                assert "attached" in line, line
            life.go(processes)
            with suppress(subprocess.TimeoutExpired):
                tracer.wait(2)
            tracer.send_signal(signal.SIGKILL)
            tracer.wait()
            text = log.read_text()
            reached = "INJECTED" in text or "killed by SIGKILL" in text
            reader = getattr(life.save, "recovered", recovered)
            outcome = Outcome(call, n, reached, life.told, reader(life.folder / "checkpoints"))
            yield outcome


def dcp_over_itself(folder: Path, topology: Topology) -> Iterator[int]:
    """Control: torch's distributed checkpoint, each into the same folder, as its `save` allows."""
    import torch.distributed.checkpoint as dcp

    for step in (1, 2, 3):
        try:
            dcp.save(state(step), checkpoint_id=folder / "dcp", no_dist=topology.world_size == 1)
            yield step
        except Exception:
            yield 0


def dcp_recovered(folder: Path) -> int:
    import torch.distributed.checkpoint as dcp

    got = state(0)
    try:
        dcp.load(got, checkpoint_id=folder / "dcp", no_dist=True)
    except BaseException:
        return -1
    steps = {value for tensor in got.values() for value in tensor.unique().tolist()}
    return int(steps.pop()) if len(steps) == 1 else -1  # a mixture


dcp_over_itself.recovered = dcp_recovered  # type: ignore[attr-defined]
