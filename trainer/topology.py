"""Who am I: ranks, device, process groups. Read once from torchrun's environment."""

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
"""How long ranks that have written wait at least for the slowest one: its disk is slow, it is not lost. With the
watchdog on, as by default, a save that hangs ends before that: the first after `watchdog.first_s`, a later one after
max(5 s, 3 x what 99 of 100 took) + `watchdog.grace_s`."""
TELL_S = 10.0  # how long the other processes may take to come before that is told
HEARTBEAT_S = 10.0  # between two signs of life of ranks that wait for the work of one of them
_JOINED = itertools.count()  # how often this process joined: once for each run of a sweep


@dataclass(frozen=True)
class Topology:
    """This process among all of them. `dp_rank` and `dp_size` say which part of the data it takes: all that one copy
    of the model is spread over take the same."""

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
        """`dp_rank` of every process."""
        return [rank // self.layout.tensor % self.dp_size for rank in range(self.world_size)]

    @property
    def is_data_rank(self) -> bool:
        """Whether this rank reports its data, for all ranks that take the same: the first of them does."""
        return self.rank == self.dp_rank * self.layout.tensor

    def with_layout(self, layout: Layout) -> Topology:
        """Returns the same processes in another layout."""
        other = replace(self, dp_size=self.world_size // layout.processes, layout=layout)
        return replace(other, dp_rank=other.dp_ranks[self.rank])

    def mesh(self) -> DeviceMesh:
        """Returns all processes as pp x dp x tp (pipeline, data and tensor parallel, torch's names of mesh dimensions):
        neighbors share the matrices of a layer, stages lie farthest apart. Strategies that cut one of them further
        (dp into dp_replicate x dp_shard) ask `mesh_of`."""
        return self.mesh_of(pp=self.layout.stages, dp=self.dp_size, tp=self.layout.tensor)

    def mesh_of(self, **sizes: int) -> DeviceMesh:
        """Returns all processes as a mesh of these dimensions, the last of neighbors. Its groups are made once, and are
        there until `close`."""
        return _mesh(self.device.type, *sizes.items())

    def describe(self) -> dict[str, Any]:
        """What a checkpoint or report says of where a run ran."""
        return {"processes": self.world_size, "device": self.device.type, "threads": torch.get_num_threads()}

    def barrier(self) -> None:
        if self.control is not None:
            dist.all_reduce(torch.zeros(1), group=self.control)  # dist.barrier would use the GPUs' part of the group

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON-able `value` on every rank."""
        if self.control is None:
            return value
        payload = _encoded(value) if self.is_main else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(payload)])
        dist.broadcast(size, 0, group=self.control)
        if not self.is_main:
            payload = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(payload, 0, group=self.control)
        return json.loads(payload.numpy().tobytes())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, in rank order."""
        return self.gather_all(value, self.control)

    def gather_all(self, value: Any, group: dist.ProcessGroup | None) -> list[Any]:
        """`gather` on another group, of which each rank gets as many bytes as all of them have to say: one long value
        does not cost as if all were as long. JSON in bytes: torch's object collectives unpickle what a peer sends."""
        if group is None:
            return [value]
        payload, rank = _encoded(value), dist.get_rank(group)
        ends = torch.zeros(dist.get_world_size(group), dtype=torch.int64)
        ends[rank:] = len(payload)
        dist.all_reduce(ends, group=group)
        everything = torch.zeros(int(ends[-1]), dtype=torch.uint8)
        everything[int(ends[rank]) - len(payload) : int(ends[rank])] = payload
        dist.all_reduce(everything, group=group)
        raw, edges = everything.numpy().tobytes(), [0, *ends.tolist()]
        return [json.loads(raw[start:end]) for start, end in pairwise(edges)]

    def run_on_all(self, work: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
        """What the `work` of each rank gives, JSON-able, however long one of them takes: it is done in a thread, while
        the ranks let each other know that they are there. It must not raise: the others would wait for its word."""
        if self.world_size == 1:
            return [work()]
        begun, beat_s = _start_in_thread(work), _heartbeat_s(group)
        while not all(answers := self.gather_all(_result_within(begun, beat_s), group)):
            pass
        return [value for (value,) in answers]

    def run_on_main(self, work: Callable[[], Any]) -> Any:
        """What the main rank's `work` gives, as `run_on_all`."""
        if self.world_size == 1:
            return work()
        begun, beat_s = _start_in_thread(work if self.is_main else _nothing), _heartbeat_s(self.control)
        while not (answers := self.broadcast(_result_within(begun, beat_s))):
            pass
        return answers[0]

    def replica_group(self) -> dist.ProcessGroup | None:
        """Of the processes that one copy of the model is spread over, for collectives of the main thread on the CPU.
        Each call makes a new one; only they call it."""
        if self.control is None:
            return None
        ranks = [rank for rank, copy in enumerate(self.dp_ranks) if copy == self.dp_rank]
        return dist.new_group(ranks, timeout=timeout_of(self.control), backend="gloo", use_local_synchronization=True)

    def close(self) -> None:
        """Leaves together: a rank that goes while another still sends would make it fail."""
        if self.control is not None:
            self.barrier()
            _mesh.cache_clear()
            dist.destroy_process_group()


def _start_in_thread(work: Callable[[], Any]) -> Future[Any]:
    """The work, in a thread that does not keep a process which has lost its peers."""
    future: Future[Any] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=do, name="onecurve-work", daemon=True).start()
    return future


def _heartbeat_s(group: dist.ProcessGroup | None) -> float:
    """Well below what a collective of the group may take."""
    return HEARTBEAT_S if group is None else min(HEARTBEAT_S, timeout_of(group).total_seconds() / 4)


def _result_within(begun: Future[Any], seconds: float) -> list[Any]:
    """What it gave, after it was waited for no longer than that; empty where that is not known yet."""
    wait([begun], seconds)
    return [begun.result()] if begun.done() else []


def _nothing() -> None:
    pass


ALONE = Topology(0, 1, 0, 1, torch.device("cpu"), 0, 1, None, None)  # a process that is not a rank of a run


@functools.cache
def _mesh(device: str, *sizes: tuple[str, int]) -> DeviceMesh:
    names, shape = zip(*sizes, strict=True)
    return init_device_mesh(device, shape, mesh_dim_names=names)


def _encoded(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def world_size() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(timeout_s: int, layout: Layout = ONE_STAGE, store: dist.Store | None = None) -> Topology:
    """Joins the process group that the launcher's environment describes; alone, none is made. `store`: where the
    processes meet, if not where the launcher says."""
    rank, size = int(os.environ.get("RANK", "0")), world_size()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_size > torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise _of_this_machine(f"{local_size} processes on a machine with {found} GPUs: start one a GPU")
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
        control = dist.group.WORLD  # the main thread's, as the strategy's collectives are; its CPU part is gloo
        saving = dist.new_group(backend="gloo", timeout=max(timeout, SAVING))
    return Topology(rank, size, local_rank, local_size, device, rank, size, control, saving).with_layout(layout)


@contextmanager
def _report_waiting(rank: int, size: int) -> Iterator[None]:
    """Says what is waited for when the other processes do not come. Raises OnecurveError where they never do."""
    names = [name for name in (*STANDARD, "MASTER_ADDR", "MASTER_PORT") if name in os.environ]
    variables, by_hand = " ".join(f"{name}={os.environ[name]}" for name in names), are_by_hand()
    left_over = f"; to train alone: unset {' '.join(variables_to_unset())}" if variables_to_unset() else ""

    def tell() -> None:
        print(f"onecurve: rank {rank} waits for {size} processes to come: {variables}{left_over}", file=sys.stderr)

    teller = threading.Timer(TELL_S, tell)
    teller.daemon = True
    if rank == 0 or by_hand:
        teller.start()
    try:
        yield
    except RuntimeError as error:  # all of torch's are
        answers = f"the {size} processes did not find each other: {first_line(error)} ({variables}){left_over}"
        if by_hand:
            raise _of_this_machine(answers) from error
        raise Crashed(answers) from error
    finally:
        teller.cancel()


def check_interfaces(with_gpus: bool) -> None:
    """Raises ConfigError where a variable names network interfaces that are not here: gloo and NCCL would fail in words
    that name neither."""
    here = [name for _, name in socket.if_nameindex()]
    wanted = {"GLOO_SOCKET_IFNAME": lambda word: word in here}
    if with_gpus:  # ^ leaves out, = is exact, else a name begins so
        wanted["NCCL_SOCKET_IFNAME"] = lambda word: word[1:] in here if word[0] == "=" else _begins(here, word)
    for variable, is_here in wanted.items():
        given = os.environ.get(variable, "")
        words = [word.strip() for word in given.split(",") if word.strip()]
        if given.startswith("^") or not words or (any if variable[0] == "N" else all)(map(is_here, words)):
            continue
        raise _of_this_machine(
            f"{variable}={given}: no such network interface on this machine, which has {', '.join(here)}; unset it, or "
            "name one of them"
        )


def _begins(names: list[str], word: str) -> bool:
    return any(name.startswith(word) for name in names)


def _of_this_machine(text: str) -> ConfigError:
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
    """Where the processes find each other, with no dead attempt's addresses in it. On one node a file, so that nothing
    listens on the network: the one that `onecurve train` gives, or under another launcher one of our own. Under
    torchrun on several nodes one that rank 0 serves.

    Elsewhere None: torch's own store at MASTER_ADDR.
    """
    given, run_id = os.environ.get("ONECURVE_STORE"), os.environ.get("TORCHELASTIC_RUN_ID")
    if given is None and RENDEZVOUS not in os.environ and run_id is None:
        return None
    if run_id is not None and local_size != size:
        return rendezvous.find_rendezvous(f"onecurve/{next(_JOINED)}", timeout)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    file = dist.FileStore(given or str(_file_of(os.environ.get(RENDEZVOUS) or _start_of_torchrun())), size)
    file.set_timeout(timeout)
    return dist.PrefixStore(str(next(_JOINED)), file)


def _start_of_torchrun() -> str:
    # What all ranks of an attempt share and no other attempt ever has: the launcher, by its start time, and the count.
    launcher = os.getppid()
    started = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
    run_id, restart = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("RUN_ID", "RESTART_COUNT"))
    attempt = [run_id, launcher, started, restart]
    return hashlib.sha256(repr(attempt).encode()).hexdigest()[:16]


def _file_of(name: str) -> Path:
    """In a folder that nobody else may read."""
    folder = Path(tempfile.gettempdir()) / f"onecurve-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{folder}: is not a folder of yours alone; set TMPDIR to one that is")
    if os.environ.get("RANK") == "0":
        remove_afterwards(folder / name)
    return folder / name
