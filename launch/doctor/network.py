"""Measures clocks, bandwidth and speed of the processes of a group, and judges the numbers."""

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
ReportStage = Callable[[int, str, Sequence[int]], None]  # the stage's number, its description, ranks that are awaited
MIB = 1 << 20
QUICK, FULL, LARGE = (MIB,), (MIB, 16 * MIB), (MIB, 16 * MIB, 256 * MIB)  # bytes; the last with GPUs
ROUNDS = 10  # of a ping-pong: the fastest one counts
REPEATS = 3
COMPUTES_S = 0.3  # longer than others may hold up a process that shares its processor
CLOCK_WARNS_S, CLOCK_BAD_S = 0.5, 5.0  # times of files are compared with clocks
SLOW_NETWORK = 1.0  # GB/s between nodes with GPUs


def clocks(topology: Topology, ranks: Sequence[int], report_stage: ReportStage) -> list[tuple[int, float, float]]:
    """Returns on rank 0 (rank, seconds that its clock is ahead of rank 0's, error of that), one rank after the other.
    `ranks`: those that are compared, with 0."""
    offsets, cell = [], torch.zeros(1, dtype=torch.float64)
    for peer in [rank for rank in ranks if rank]:
        if topology.rank == 0:
            report_stage(1, f"the clock of rank {peer}", [peer])
            tries = []
            for _ in range(ROUNDS):
                before = time.time()
                dist.send(cell, peer, group=topology.control)
                dist.recv(cell, peer, group=topology.control)
                after = time.time()
                tries.append(((after - before) / 2, float(cell) - (before + after) / 2))
            error, offset = min(tries, key=lambda one: one[0])
            offsets.append((peer, offset, error))
        elif topology.rank == peer:
            report_stage(1, "its clock", [])
            for _ in range(ROUNDS):
                dist.recv(cell, 0, group=topology.control)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0, group=topology.control)
    return offsets


def judge_clocks(measured: Sequence[tuple[int, float, float]], names: Sequence[str]) -> list[Finding]:
    """Returns findings about clocks: rank 0's is off if most differ from it. `names`: the node of each rank."""
    if not measured:
        return []
    middle = median([0.0, *(offset for _, offset, _ in measured)])
    deviations = [(rank, offset - middle, error) for rank, offset, error in [(0, 0.0, 0.0), *measured]]
    findings = []
    for rank, deviation, error in deviations:
        if (least := abs(deviation) - error) > CLOCK_WARNS_S:
            direction = "ahead" if deviation > 0 else "behind"
            message = f"the clock of rank {rank} on {names[rank]} is {abs(deviation):.3g} s {direction}"
            verdict: Verdict = "bad" if least > CLOCK_BAD_S else "warning"
            findings.append(Finding("clock", verdict, message, "start chrony or ntpd there", (names[rank],)))
    if not findings:
        largest = max(abs(deviation) for _, deviation, _ in deviations)
        error = max(error for _, _, error in deviations)
        message = f"{len(deviations)} clocks agree within {1000 * largest:.2g} ms (measured to {1000 * error:.2g} ms)"
        findings.append(Finding("clock", "good", message))
    return findings


def ring(ranks: Sequence[int]) -> list[list[Pair]]:
    """Pairs each rank with both of its neighbors, in rounds of disjoint pairs."""
    count = len(ranks)
    if count < 3:
        return [[(ranks[0], ranks[1])]] if count == 2 else []
    pairs = [(ranks[i], ranks[(i + 1) % count]) for i in range(count)]
    rounds = [pairs[0 : count - count % 2 : 2], pairs[1::2]]
    return [*rounds, [pairs[-1]]] if count % 2 else rounds


def point_to_point(
    topology: Topology, rounds: Sequence[Sequence[Pair]], bytes_: int, report_stage: ReportStage
) -> list[list[float]]:
    """Measures and returns [a, b, GB/s] of each pair that this rank is the first of."""
    speeds = []
    buffer = torch.empty(bytes_, dtype=torch.uint8, device=topology.device)
    for round_ in rounds:
        for a, b in round_:
            if topology.rank not in (a, b):
                continue
            peer = b if topology.rank == a else a
            report_stage(2, f"sending between rank {a} and rank {b}", [peer])
            times = []
            for _ in range(1 + REPEATS):  # the first one connects
                start = time.perf_counter()
                for sender in (a, b):
                    (dist.send if topology.rank == sender else dist.recv)(buffer, peer)
                _finish(topology)
                times.append((time.perf_counter() - start) / 2)
            if topology.rank == a:
                speeds.append([a, b, bytes_ / min(times[1:]) / 1e9])
    return speeds


def judge_pairs(pairs: Sequence[Sequence[float]], bytes_: int, names: Sequence[str], gpus: bool) -> list[Finding]:
    """Returns findings. `pairs`: [a, b, GB/s]. A rank counts as fast as its faster pair: a slow rank spoils both."""
    if not pairs:
        return []
    best: dict[int, float] = {}
    for a, b, speed in pairs:
        for rank in (int(a), int(b)):
            best[rank] = max(best.get(rank, 0.0), speed)
    a, b, lowest = min(pairs, key=lambda pair: pair[2])
    ends = " and ".join(f"rank {int(rank)} on {names[int(rank)]}" for rank in (a, b))
    message = f"point to point, {size(bytes_)}: {median(p[2] for p in pairs):.3g} GB/s"
    message += f", at least {lowest:.3g} (between {ends})" if len(pairs) > 1 else ""
    across_nodes = len({names[int(rank)] for rank in (a, b)}) > 1
    findings = slower({str(rank): speed for rank, speed in best.items()}, "point to point", "GB/s", names)
    if gpus and across_nodes and lowest < SLOW_NETWORK:
        advice = "NCCL may not use the fast network: NCCL_DEBUG=INFO tells; see NCCL_IB_HCA and NCCL_SOCKET_IFNAME"
        return [Finding("bandwidth", "warning", message, advice), *findings]
    return [Finding("bandwidth", "good", message), *findings]


def all_reduce(topology: Topology, sizes: Sequence[int], report_stage: ReportStage) -> list[tuple[int, float]]:
    """Measures (bytes, GB/s of each process's link): a ring has to move 2 (n - 1) / n times the bytes."""
    speeds = []
    for bytes_ in sizes:
        report_stage(3, f"an all-reduce of {size(bytes_)}", [])
        buffer = torch.zeros(bytes_ // 4, device=topology.device)
        times = []
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            dist.all_reduce(buffer)
            _finish(topology)
            times.append(time.perf_counter() - start)
        share = 2 * (topology.world_size - 1) / topology.world_size
        speeds.append((bytes_, share * bytes_ / min(times[1:]) / 1e9))
    return speeds


def computes(topology: Topology) -> float:
    """Measures the TFLOP/s of a matrix product, the fastest of several."""
    on_gpu = topology.device.type == "cuda"
    side, dtype = (4096, torch.bfloat16) if on_gpu else (512, torch.float32)
    a, times = torch.ones(side, side, device=topology.device, dtype=dtype), list[float]()
    deadline = time.perf_counter() + COMPUTES_S
    while len(times) < 8 or time.perf_counter() < deadline:
        start = time.perf_counter()
        a @ a
        _finish(topology)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times) / 1e12


def slower(speeds: Mapping[str, float], measurement: str, unit: str, names: Sequence[str]) -> list[Finding]:
    """Returns findings for ranks that are slower than half the median. On one node, where processes share what they
    use, they are warnings. `speeds`: by rank."""
    middle = median(speeds.values()) if speeds else 0.0
    verdict: Verdict = "bad" if len(set(names)) > 1 else "warning"
    advice = "leave the node out, and see whether it is too hot, shared or has a bad link"
    if verdict == "warning":
        advice = "see with `top` and `nvidia-smi` what else runs here"
    return [
        Finding(
            "slow", verdict, f"{measurement}: rank {rank} on {names[int(rank)]} has {speeds[rank]:.3g} {unit}, the "
            f"median is {middle:.3g}", advice, (names[int(rank)],),
        )
        for rank in slow(speeds)
    ]  # fmt: skip


def sizes(topology: Topology, quick: bool) -> Sequence[int]:
    return QUICK if quick else LARGE if topology.device.type == "cuda" else FULL


def _finish(topology: Topology) -> None:
    if topology.device.type == "cuda":
        torch.cuda.synchronize(topology.device)


def gather_lists(topology: Topology, value: Sequence[Any]) -> list[Any]:
    """Gathers the lists of all ranks into one."""
    return [item for values in topology.gather(list(value)) for item in values]
