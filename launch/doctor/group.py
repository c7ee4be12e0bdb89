"""The checks that all processes do together. Rank 0 judges."""

from __future__ import annotations

from pathlib import Path

from launch.doctor import filesystem, network
from launch.doctor.machine import node_name
from launch.doctor.verdict import Finding
from trainer.topology import Topology


def examine(topology: Topology, folder: Path, quick: bool, report_stage: network.ReportStage) -> list[Finding]:
    """Returns findings on rank 0, none on the others. Raises what torch raises if another process is gone or hangs."""
    names = topology.gather(node_name())
    across_nodes = len(set(names)) > 1
    # The first process of each node if there are several nodes, else all processes.
    leaders = [names.index(name) for name in dict.fromkeys(names)] if across_nodes else list(range(len(names)))
    findings: list[Finding] = []
    if topology.world_size > 1:
        clocks = network.clocks(topology, leaders, report_stage)
        rings = [network.ring(leaders)] if across_nodes else []
        largest = network.sizes(topology, quick)[-1]
        same_node = [rank for rank, name in enumerate(names) if name == names[topology.rank]]
        rings.append(network.ring(same_node))
        ring_speeds = [network.point_to_point(topology, rounds, largest, report_stage) for rounds in rings]
        reduced = network.all_reduce(topology, network.sizes(topology, quick), report_stage)
        for local_speeds in ring_speeds:
            pairs = network.gather_lists(topology, local_speeds)
            gpus = topology.device.type == "cuda"
            findings += network.judge_pairs(pairs, largest, names, gpus)
        findings += network.judge_clocks(clocks, names)
        message = ", ".join(f"{speed:.3g} GB/s at {network.size(bytes_)}" for bytes_, speed in reduced)
        findings.append(Finding("bandwidth", "good", f"all-reduce over {topology.world_size} processes: {message}"))
    report_stage(4, "a matrix product", [])
    speeds = topology.gather(network.computes(topology))
    findings.append(Finding("compute", "good", f"matrix product: {min(speeds):.3g} to {max(speeds):.3g} TFLOP/s"))
    findings += network.slower({str(rank): speed for rank, speed in enumerate(speeds)}, "compute", "TFLOP/s", names)
    report_stage(5, f"the folder {folder}", [])
    measured = topology.gather(filesystem.measure(topology, folder, quick, topology.rank in leaders))
    report_stage(6, "the end", [])
    return [*findings, *filesystem.judge(measured, names)] if topology.is_main else []
