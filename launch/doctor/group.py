"""The checks that all processes do together. The first one judges."""

from __future__ import annotations

from pathlib import Path

from launch.doctor import filesystem, network
from launch.doctor.machine import node_name
from launch.doctor.verdict import Finding
from trainer.topology import Topology


def examine(topology: Topology, place: Path, quick: bool, tell: network.Tell) -> list[Finding]:
    """Findings on rank 0, none on the others. Raises what torch raises where another process is gone or hangs."""
    names = topology.gather(node_name())
    apart = len(set(names)) > 1
    # Of each node the first process, where there are several.
    leaders = [names.index(name) for name in dict.fromkeys(names)] if apart else list(range(len(names)))
    findings: list[Finding] = []
    if topology.world_size > 1:
        clocks = network.clocks(topology, leaders, tell)
        pairs = [network.ring(leaders)] if apart else []
        largest = network.sizes(topology, quick)[-1]
        within = [rank for rank, name in enumerate(names) if name == names[topology.rank]]
        pairs.append(network.ring(within))
        sent = [network.point_to_point(topology, rounds, largest, tell) for rounds in pairs]
        reduced = network.all_reduce(topology, network.sizes(topology, quick), tell)
        for mine in sent:
            together = network.gathered(topology, mine)
            gpus = topology.device.type == "cuda"
            findings += network.judge_pairs(together, largest, names, gpus)
        findings += network.judge_clocks(clocks, names)
        told = ", ".join(f"{speed:.3g} GB/s at {network.size(bytes_)}" for bytes_, speed in reduced)
        findings.append(Finding("bandwidth", "good", f"all-reduce over {topology.world_size} processes: {told}"))
    tell(4, "a matrix product", [])
    speeds = topology.gather(network.computes(topology))
    findings.append(Finding("compute", "good", f"matrix product: {min(speeds):.3g} to {max(speeds):.3g} TFLOP/s"))
    findings += network.slower({str(rank): speed for rank, speed in enumerate(speeds)}, "compute", "TFLOP/s", names)
    tell(5, f"the folder {place}", [])
    measured = topology.gather(filesystem.measure(topology, place, quick, topology.rank in leaders))
    tell(6, "the end", [])
    return [*findings, *filesystem.judge(measured, names)] if topology.is_main else []
