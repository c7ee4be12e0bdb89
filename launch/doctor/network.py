"""Clocks, bandwidth and speed of the processes of a group, measured over it; and the judgment of the numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from launch.doctor.verdict import Finding, Verdict, slow
from launch.sizes import size
from trainer.topology import Topology

Pair = tuple[int, int]
Tell = Callable[[int, str, Sequence[int]], None]  # how far this rank has come, in what it is, and for whom it waits
MIB = 1 << 20
QUICK, FULL, LARGE = (MIB,), (MIB, 16 * MIB), (MIB, 16 * MIB, 256 * MIB)  # bytes; the last with GPUs
ROUNDS = 10  # of a ping-pong: the fastest one counts
REPEATS = 3
COMPUTES_S = 0.3  # longer than others may hold up a process that shares its processor
CLOCK_WARNS_S, CLOCK_BAD_S = 0.5, 5.0  # times of files are compared with clocks
SLOW_NETWORK = 1.0  # GB/s between nodes with GPUs


def clocks(topology: Topology, ranks: Sequence[int], tell: Tell) -> list[tuple[int, float, float]]:
    """(rank, how far its clock is before that of rank 0, by how much that may be wrong), seconds, on rank 0; one
    rank after the other. `ranks`: those that are asked, with 0."""
    found, cell = [], torch.zeros(1, dtype=torch.float64)
    for other in [rank for rank in ranks if rank]:
        if topology.rank == 0:
            tell(1, f"the clock of rank {other}", [other])
            tries = []
            for _ in range(ROUNDS):
                before = time.time()
                dist.send(cell, other, group=topology.control)
                dist.recv(cell, other, group=topology.control)
                after = time.time()
                tries.append(((after - before) / 2, float(cell) - (before + after) / 2))
            error, offset = min(tries, key=lambda one: one[0])
            found.append((other, offset, error))
        elif topology.rank == other:
            tell(1, "its clock", [])
            for _ in range(ROUNDS):
                dist.recv(cell, 0, group=topology.control)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0, group=topology.control)
    return found


def judge_clocks(measured: Sequence[tuple[int, float, float]], names: Sequence[str]) -> list[Finding]:
    """`names`: the node of each rank. Where most clocks differ from rank 0's, that one is off."""
    if not measured:
        return []
    middle = median([0.0, *(offset for _, offset, _ in measured)])
    off = [(rank, offset - middle, error) for rank, offset, error in [(0, 0.0, 0.0), *measured]]
    findings = []
    for rank, by, error in off:
        if (sure := abs(by) - error) > CLOCK_WARNS_S:
            told = f"the clock of rank {rank} on {names[rank]} is {abs(by):.3g} s {'ahead' if by > 0 else 'behind'}"
            verdict: Verdict = "bad" if sure > CLOCK_BAD_S else "warning"
            findings.append(Finding("clock", verdict, told, "start chrony or ntpd there", (names[rank],)))
    if not findings:
        largest = max(abs(by) for _, by, _ in off)
        error = max(error for _, _, error in off)
        told = f"{len(off)} clocks agree within {1000 * largest:.2g} ms (measured to {1000 * error:.2g} ms)"
        findings.append(Finding("clock", "good", told))
    return findings


def ring(ranks: Sequence[int]) -> list[list[Pair]]:
    """Each rank with both of its neighbors, in rounds of pairs that do not touch."""
    count = len(ranks)
    if count < 3:
        return [[(ranks[0], ranks[1])]] if count == 2 else []
    pairs = [(ranks[i], ranks[(i + 1) % count]) for i in range(count)]
    rounds = [pairs[0 : count - count % 2 : 2], pairs[1::2]]
    return [*rounds, [pairs[-1]]] if count % 2 else rounds


def point_to_point(topology: Topology, rounds: Sequence[Sequence[Pair]], bytes_: int, tell: Tell) -> list[list[float]]:
    """[a, b, GB/s] of each pair that this rank is the first of."""
    found = []
    buffer = torch.empty(bytes_, dtype=torch.uint8, device=topology.device)
    for round_ in rounds:
        for a, b in round_:
            if topology.rank not in (a, b):
                continue
            other = b if topology.rank == a else a
            tell(2, f"sending between rank {a} and rank {b}", [other])
            times = []
            for _ in range(1 + REPEATS):  # the first one connects
                began = time.perf_counter()
                for sender in (a, b):
                    (dist.send if topology.rank == sender else dist.recv)(buffer, other)
                _finish(topology)
                times.append((time.perf_counter() - began) / 2)
            if topology.rank == a:
                found.append([a, b, bytes_ / min(times[1:]) / 1e9])
    return found


def judge_pairs(pairs: Sequence[Sequence[float]], bytes_: int, names: Sequence[str], gpus: bool) -> list[Finding]:
    """`pairs`: [a, b, GB/s]. A rank counts as fast as its faster pair: a slow one spoils both of its own."""
    if not pairs:
        return []
    best: dict[int, float] = {}
    for a, b, speed in pairs:
        for rank in (int(a), int(b)):
            best[rank] = max(best.get(rank, 0.0), speed)
    a, b, lowest = min(pairs, key=lambda pair: pair[2])
    ends = " and ".join(f"rank {int(rank)} on {names[int(rank)]}" for rank in (a, b))
    told = f"point to point, {size(bytes_)}: {median(p[2] for p in pairs):.3g} GB/s"
    told += f", at least {lowest:.3g} (between {ends})" if len(pairs) > 1 else ""
    apart = len({names[int(rank)] for rank in (a, b)}) > 1
    findings = slower({str(rank): speed for rank, speed in best.items()}, "point to point", "GB/s", names)
    if gpus and apart and lowest < SLOW_NETWORK:
        advice = "NCCL may not use the fast network: NCCL_DEBUG=INFO tells; see NCCL_IB_HCA and NCCL_SOCKET_IFNAME"
        return [Finding("bandwidth", "warning", told, advice), *findings]
    return [Finding("bandwidth", "good", told), *findings]


def all_reduce(topology: Topology, sizes: Sequence[int], tell: Tell) -> list[tuple[int, float]]:
    """(bytes, GB/s of each process's link: what a ring has to move, 2 (n - 1) / n times the bytes)."""
    found = []
    for bytes_ in sizes:
        tell(3, f"an all-reduce of {size(bytes_)}", [])
        buffer = torch.zeros(bytes_ // 4, device=topology.device)
        times = []
        for _ in range(1 + REPEATS):
            began = time.perf_counter()
            dist.all_reduce(buffer)
            _finish(topology)
            times.append(time.perf_counter() - began)
        share = 2 * (topology.world_size - 1) / topology.world_size
        found.append((bytes_, share * bytes_ / min(times[1:]) / 1e9))
    return found


def computes(topology: Topology) -> float:
    """TFLOP/s of a matrix product, the fastest of several."""
    on_gpu = topology.device.type == "cuda"
    side, kind = (4096, torch.bfloat16) if on_gpu else (512, torch.float32)
    a, times = torch.ones(side, side, device=topology.device, dtype=kind), list[float]()
    until = time.perf_counter() + COMPUTES_S
    while len(times) < 8 or time.perf_counter() < until:
        began = time.perf_counter()
        a @ a
        _finish(topology)
        times.append(time.perf_counter() - began)
    return 2 * side**3 / min(times) / 1e12


def slower(speeds: Mapping[str, float], what: str, unit: str, names: Sequence[str]) -> list[Finding]:
    """`speeds` by rank: whoever is slower than half the median. On one node processes share what they use: there it
    is a warning."""
    middle = median(speeds.values()) if speeds else 0.0
    verdict: Verdict = "bad" if len(set(names)) > 1 else "warning"
    advice = "leave the node out, and see whether it is too hot, shared or has a bad link"
    if verdict == "warning":
        advice = "see with `top` and `nvidia-smi` what else runs here"
    return [
        Finding(
            "slow", verdict, f"{what}: rank {rank} on {names[int(rank)]} has {speeds[rank]:.3g} {unit}, the median is "
            f"{middle:.3g}", advice, (names[int(rank)],),
        )
        for rank in slow(speeds)
    ]  # fmt: skip


def sizes(topology: Topology, quick: bool) -> Sequence[int]:
    return QUICK if quick else LARGE if topology.device.type == "cuda" else FULL


def _finish(topology: Topology) -> None:
    if topology.device.type == "cuda":
        torch.cuda.synchronize(topology.device)


def gathered(topology: Topology, value: Sequence[Any]) -> list[Any]:
    """All ranks' lists in one."""
    return [item for mine in topology.gather(list(value)) for item in mine]
