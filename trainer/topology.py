"""Rank, device and process groups of this process, read once from torchrun's environment."""

from __future__ import annotations

import datetime
import functools
import hashlib
import itertools
import json
import os
import platform
import resource
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer import rendezvous
from trainer.config.strategy import ONE_STAGE, Layout
from trainer.errors import ConfigError, Crashed, first_line
from trainer.launchers import RENDEZVOUS, STANDARD, are_by_hand, variables_to_unset
from trainer.patches import timeout_of
from trainer.processes import remove_afterwards

SAVING = datetime.timedelta(hours=2)
"""How long ranks that have written wait at least for the slowest one, whose disk is slow. With the
watchdog on, as by default, a save that hangs ends before that: the first after `watchdog.first_s`, a later one after
max(5 s, 3 x what 99 of 100 took) + `watchdog.grace_s`."""
REPORT_AFTER_S = 10.0  # how long the other processes may take to come before that is reported
HEARTBEAT_S = 10.0  # between two signs of life of ranks that wait for the work of one of them
_JOINED = itertools.count()  # how often this process joined: once for each run of a sweep


@dataclass(frozen=True)
class Topology:
    """This process among all of them. `dp_rank` and `dp_size` say which part of the data it takes: all that share one
    replica of the model take the same."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    device: torch.device
    dp_rank: int
    dp_size: int
    control: dist.ProcessGroup | None  # CPU collectives of the loop
    saving: dist.ProcessGroup | None  # CPU collectives of the checkpoint thread, never shared with the loop
    layout: Layout = ONE_STAGE

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_ranks(self) -> list[int]:
        """Returns the `dp_rank` of every process."""
        return [rank // self.layout.tensor % self.dp_size for rank in range(self.world_size)]

    @property
    def is_data_rank(self) -> bool:
        """Returns whether this rank reports its data, as the first of the ranks that take the same."""
        return self.rank == self.dp_rank * self.layout.tensor

    def with_layout(self, layout: Layout) -> Topology:
        """Returns the same processes in another layout."""
        topology = replace(self, dp_size=self.world_size // layout.processes, layout=layout)
        return replace(topology, dp_rank=topology.dp_ranks[self.rank])

    def mesh(self) -> DeviceMesh:
        """Returns all processes as pp x dp x tp (pipeline, data and tensor parallel, torch's names of mesh dimensions):
        neighbors share the matrices of a layer, stages are farthest apart. Strategies that split a dimension further
        (dp into dp_replicate x dp_shard) ask `mesh_of`."""
        return self.mesh_of(pp=self.layout.stages, dp=self.dp_size, tp=self.layout.tensor)

    def mesh_of(self, **sizes: int) -> DeviceMesh:
        """Returns all processes as a mesh of these dimensions, the last of neighbors. Its groups are made once, and
        kept until `close`."""
        return _mesh(self.device.type, *sizes.items())

    def describe(self) -> dict[str, Any]:
        """Returns where the run runs, for checkpoints and reports."""
        return {"processes": self.world_size, "device": self.device.type, "threads": torch.get_num_threads()}

    def barrier(self) -> None:
        if self.control is not None:
            dist.all_reduce(torch.zeros(1), group=self.control)  # dist.barrier would use the GPUs' part of the group

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's JSON-able `value` on every rank."""
        if self.control is None:
            return value
        payload = _encode(value) if self.is_main else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(payload)])
        dist.broadcast(size, 0, group=self.control)
        if not self.is_main:
            payload = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(payload, 0, group=self.control)
        return json.loads(payload.numpy().tobytes())

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's JSON-able value, in rank order."""
        return self.gather_all(value, self.control)

    def gather_all(self, value: Any, group: dist.ProcessGroup | None) -> list[Any]:
        """Gathers values as `gather` does, on another group. Each rank receives only as many bytes as all values have:
        one long value does not pad the others. It sends JSON, as torch's object collectives unpickle what a peer
        sends."""
        if group is None:
            return [value]
        payload, rank = _encode(value), dist.get_rank(group)
        ends = torch.zeros(dist.get_world_size(group), dtype=torch.int64)
        ends[rank:] = len(payload)
        dist.all_reduce(ends, group=group)
        everything = torch.zeros(int(ends[-1]), dtype=torch.uint8)
        everything[int(ends[rank]) - len(payload) : int(ends[rank])] = payload
        dist.all_reduce(everything, group=group)
        raw, edges = everything.numpy().tobytes(), [0, *ends.tolist()]
        return [json.loads(raw[start:end]) for start, end in pairwise(edges)]

    def run_on_all(self, work: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
        """Returns the JSON-able result of `work` on each rank, however long one takes: it is done in a thread, while
        the ranks exchange heartbeats. `work` must not raise: the other ranks would wait for its result."""
        if self.world_size == 1:
            return [work()]
        future, beat_s = _start_in_thread(work), _heartbeat_s(group)
        while not all(answers := self.gather_all(_wait_for_result(future, beat_s), group)):
            pass
        return [value for (value,) in answers]

    def run_on_main(self, work: Callable[[], Any]) -> Any:
        """Returns the result of the main rank's `work` on all ranks, as `run_on_all` does."""
        if self.world_size == 1:
            return work()
        future, beat_s = _start_in_thread(work if self.is_main else _do_nothing), _heartbeat_s(self.control)
        while not (answers := self.broadcast(_wait_for_result(future, beat_s))):
            pass
        return answers[0]

    def replica_group(self) -> dist.ProcessGroup | None:
        """Returns a new group of the processes that share this replica of the model, for CPU collectives of the main
        thread. All of them call it."""
        if self.control is None:
            return None
        ranks = [rank for rank, dp_rank in enumerate(self.dp_ranks) if dp_rank == self.dp_rank]
        return dist.new_group(ranks, timeout=timeout_of(self.control), backend="gloo", use_local_synchronization=True)

    def close(self) -> None:
        """Leaves the process group together with all ranks: if one left early, others that still
        send would fail."""
        if self.control is not None:
            self.barrier()
            _mesh.cache_clear()
            dist.destroy_process_group()


def _start_in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Starts the work in a daemon thread, which does not keep a process alive that has lost its peers."""
    future: Future[Any] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=do, name="onecurve-work", daemon=True).start()
    return future


def _heartbeat_s(group: dist.ProcessGroup | None) -> float:
    """Returns a period well below the timeout of the group's collectives."""
    return HEARTBEAT_S if group is None else min(HEARTBEAT_S, timeout_of(group).total_seconds() / 4)


def _wait_for_result(future: Future[Any], seconds: float) -> list[Any]:
    """Waits up to so many seconds; returns the result in a list, which is empty if there is none yet."""
    wait([future], seconds)
    return [future.result()] if future.done() else []


def _do_nothing() -> None:
    pass


ALONE = Topology(0, 1, 0, 1, torch.device("cpu"), 0, 1, None, None)  # a process that is not a rank of a run


@functools.cache
def _mesh(device: str, *sizes: tuple[str, int]) -> DeviceMesh:
    names, shape = zip(*sizes, strict=True)
    return init_device_mesh(device, shape, mesh_dim_names=names)


def _encode(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def world_size() -> int:
    """Returns how many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(timeout_s: int, layout: Layout = ONE_STAGE, store: dist.Store | None = None) -> Topology:
    """Joins the process group that the launcher's environment describes; a process that is alone needs none.
    `store`: the rendezvous of the processes, if not the launcher's."""
    rank, size = int(os.environ.get("RANK", "0")), world_size()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_size > torch.cuda.device_count():
            num_gpus = torch.cuda.device_count()
            raise _local_error(f"{local_size} processes on a machine with {num_gpus} GPUs: start one a GPU")
        torch.cuda.set_device(device)
    control = saving = None
    if size > 1:
        timeout = datetime.timedelta(seconds=timeout_s)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # Each process would open a connection to each other one, in every group: only those that are used are opened.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        raise_open_files()
        check_interfaces(device.type == "cuda")
        with _report_waiting(rank, size):
            store = store or store_of(size, local_size, timeout)
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, store=store)
        control = dist.group.WORLD  # of the main thread, as are the strategy's collectives; its CPU backend is gloo
        saving = dist.new_group(backend="gloo", timeout=max(timeout, SAVING))
    return Topology(rank, size, local_rank, local_size, device, rank, size, control, saving).with_layout(layout)


@contextmanager
def _report_waiting(rank: int, size: int) -> Iterator[None]:
    """Prints what it waits for when the other processes do not come. Raises OnecurveError if they never do."""
    names = [name for name in (*STANDARD, "MASTER_ADDR", "MASTER_PORT") if name in os.environ]
    variables, by_hand = " ".join(f"{name}={os.environ[name]}" for name in names), are_by_hand()
    unset_hint = f"; to train alone: unset {' '.join(variables_to_unset())}" if variables_to_unset() else ""

    def print_waiting() -> None:
        print(f"onecurve: rank {rank} waits for {size} processes to come: {variables}{unset_hint}", file=sys.stderr)

    timer = threading.Timer(REPORT_AFTER_S, print_waiting)
    timer.daemon = True
    if rank == 0 or by_hand:
        timer.start()
    try:
        yield
    except RuntimeError as error:  # the base class of torch's errors
        problem = f"the {size} processes did not find each other: {first_line(error)} ({variables}){unset_hint}"
        if by_hand:
            raise _local_error(problem) from error
        raise Crashed(problem) from error
    finally:
        timer.cancel()


def check_interfaces(with_gpus: bool) -> None:
    """Raises ConfigError where a variable names network interfaces that this machine lacks: gloo and NCCL would fail
    with messages that name neither."""
    interfaces = [name for _, name in socket.if_nameindex()]
    matchers = {"GLOO_SOCKET_IFNAME": lambda name: name in interfaces}
    if with_gpus:  # ^ excludes, = is exact, else it is a prefix
        matchers["NCCL_SOCKET_IFNAME"] = lambda name: (
            name[1:] in interfaces if name[0] == "=" else _any_starts_with(interfaces, name)
        )
    for variable, matches in matchers.items():
        value = os.environ.get(variable, "")
        words = [name.strip() for name in value.split(",") if name.strip()]
        if value.startswith("^") or not words or (any if variable[0] == "N" else all)(map(matches, words)):
            continue
        raise _local_error(
            f"{variable}={value}: no such network interface on this machine, which has {', '.join(interfaces)}; unset "
            "it, or name one of them"
        )


def _any_starts_with(names: list[str], word: str) -> bool:
    return any(name.startswith(word) for name in names)


def _local_error(text: str) -> ConfigError:
    error = ConfigError(f"{platform.node()}: {text}")
    error.local = True
    return error


def raise_open_files() -> None:
    """Raises the soft limit of open files to the hard one, which this process can handle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # macOS: a hard limit that is larger than what can be set
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def store_of(size: int, local_size: int, timeout: datetime.timedelta) -> dist.Store | None:
    """Returns the store by which the processes find each other, without addresses of a dead attempt. On one node it is
    a file, so that nothing listens on the network: that of `onecurve train`, or our own under another launcher. Under
    torchrun on several nodes it is a store that rank 0 serves.

    Elsewhere returns None: torch uses its own store at MASTER_ADDR.
    """
    launcher_file, run_id = os.environ.get("ONECURVE_STORE"), os.environ.get("TORCHELASTIC_RUN_ID")
    if launcher_file is None and RENDEZVOUS not in os.environ and run_id is None:
        return None
    if run_id is not None and local_size != size:
        return rendezvous.find_rendezvous(f"onecurve/{next(_JOINED)}", timeout)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    file = dist.FileStore(launcher_file or str(_store_file(os.environ.get(RENDEZVOUS) or _torchrun_key())), size)
    file.set_timeout(timeout)
    return dist.PrefixStore(str(next(_JOINED)), file)


def _torchrun_key() -> str:
    # All ranks of an attempt share it, and no other attempt has it: launcher, its start time, and restart count.
    launcher = os.getppid()
    started = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
    run_id, restart = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("RUN_ID", "RESTART_COUNT"))
    attempt = [run_id, launcher, started, restart]
    return hashlib.sha256(repr(attempt).encode()).hexdigest()[:16]


def _store_file(name: str) -> Path:
    """Returns the path of a store's file in a folder that nobody else may read."""
    folder = Path(tempfile.gettempdir()) / f"onecurve-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"{folder}: is not a folder of yours alone; set TMPDIR to one that is")
    if os.environ.get("RANK") == "0":
        remove_afterwards(folder / name)
    return folder / name
