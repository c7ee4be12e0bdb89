"""What the doctor makes of measurements, also of those that this machine cannot give."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from itertools import chain
from pathlib import Path

import pytest

from launch.doctor import filesystem, gpus, machine, network
from launch.doctor.examination import Examination, NodeReport
from launch.doctor.verdict import Finding, Report, merged, slow, unequal
from trainer.topology import ALONE

NODES = ["n1", "n2", "n3", "n4"]


def bad(findings: list[Finding]) -> dict[tuple[str, ...], str]:
    """Verdict and nodes of what is not good."""
    return {finding.nodes: finding.verdict for finding in findings if finding.verdict != "good"}


def test_a_clock_that_is_off() -> None:
    assert not bad(network.judge_clocks([(1, 0.01, 0.02), (2, -0.2, 0.001)], NODES))
    assert bad(network.judge_clocks([(1, 0.01, 0.0), (2, -30.0, 0.1)], NODES)) == {("n3",): "bad"}
    assert bad(network.judge_clocks([(1, 0.9, 0.1), (2, 0.0, 0.1)], NODES)) == {("n2",): "warning"}
    assert not bad(network.judge_clocks([(1, 0.9, 0.6)], NODES))  # that may be the way there
    assert bad(network.judge_clocks([(1, 30.0, 0.1), (2, 30.1, 0.1)], NODES)) == {("n1",): "bad"}


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_each_rank_is_measured_with_both_neighbors(count: int) -> None:
    rounds = network.ring(range(count))
    pairs = list(chain(*rounds))
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == (1 if count == 2 else count)
    for round_ in rounds:
        assert len(set(chain(*round_))) == 2 * len(round_)
    assert network.ring([7]) == []


def test_a_slow_node_is_told_from_its_neighbors() -> None:
    pairs = [[0, 1, 10.0], [1, 2, 1.0], [2, 3, 1.1], [3, 0, 9.0]]
    findings = network.judge_pairs(pairs, 1 << 20, NODES, gpus=False)
    assert bad(findings) == {("n3",): "bad"}
    assert slow({"a": 1.0, "b": 1.9, "c": 4.0, "d": 4.0}) == ["a"]
    on_one = network.judge_pairs(pairs, 1 << 20, ["n1"] * 4, gpus=False)
    assert bad(on_one) == {("n1",): "warning"}  # processes of a node share what they use


def test_limits() -> None:
    assert machine.open_files(4096, 1024).verdict == "good"
    few = machine.open_files(1024, 1024)
    assert few.verdict == "bad"
    assert "limits.conf" in few.advice
    assert machine.locked_memory(65536, rdma=False).verdict == "good"
    assert machine.locked_memory(65536, rdma=True).verdict == "bad"
    assert machine.locked_memory(float("inf"), rdma=True).verdict == "good"
    assert [machine.shared_memory(64 << 20, free).verdict for free in (32 << 20, 512 << 20, 8 << 30)] == [
        "bad", "warning", "good",
    ]  # fmt: skip


def measured(rank: int, **more: object) -> dict:
    fine = {"fsync_s": 0.001, "clock": 0.0, "not_seen": [], "seen_s": 0.1, "link": "lost" if rank else "won"}
    where = {"rank": rank, "takes_part": True, "folder": "/data", "free": 1 << 40, "files": None, "type": "nfs4"}
    return {**where, **fine, **more}


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ([{}, {}, {}], {}),
        ([{"problem": "Read-only file system"}, {}, {}], {("n1",): "bad"}),
        ([{}, {"problem": "Permission denied"}, {}], {("n2",): "bad"}),
        ([{}, {"blind": True}, {}], {("n2",): "bad"}),
        ([{"not_seen": [2]}, {}, {}], {("n3",): "bad"}),
        ([{}, {"not_seen": [0]}, {}], {("n2",): "bad"}),
        ([{}, {"link": "won"}, {}], {(): "bad"}),
        ([{}, {}, {"link": "Operation not permitted"}], {("n3",): "warning"}),
        ([{}, {}, {"lock": "two processes get the same lock"}], {("n3",): "bad"}),
        ([{}, {"leases": True}, {"leases": True}], {("n2", "n3"): "warning"}),
        ([{"leases": False}, {}, {"leases": True}], {("n3",): "bad"}),
        ([{}, {}, {"names": "Invalid argument"}], {("n3",): "warning"}),
        ([{}, {}, {"clock": -7.0}], {("n3",): "warning"}),
        ([{}, {"seen_s": 5.0}, {}], {("n2",): "warning"}),
        ([{}, {"fsync_s": 2.0}, {}], {(): "warning"}),
        ([{}, {"free": 1 << 20}, {}], {("n2",): "bad"}),
        ([{}, {"files": 3}, {}], {("n2",): "bad"}),
    ],
)
def test_the_folder(faults: list[dict], expected: dict) -> None:
    assert bad(filesystem.judge([measured(rank, **fault) for rank, fault in enumerate(faults)], NODES)) == expected


def test_gpus() -> None:
    line = "{}, NVIDIA H100 80GB HBM3, 550.54.15, 81559, {}, 33, {}, No, No, {}, Not Active"
    sound = "\n".join(line.format(number, 0, 0, "Not Active") for number in range(2))
    findings, facts = gpus.judge(sound)
    assert not bad(findings)
    assert facts == {"GPUs": "2 x NVIDIA H100 80GB HBM3", "driver": "550.54.15"}
    ill = [line.format(0, 20000, 0, "Not Active"), line.format(1, 0, 3, "Not Active"), line.format(2, 0, 0, "Active")]
    told = [finding.found for finding in gpus.judge("\n".join(ill))[0][1:]]
    assert [text.split(":")[0] for text in told] == ["GPU 0", "GPU 1", "GPU 2"]
    old = "0, Tesla T4, 418.67, 15079, 0, 40, [N/A]"  # of a driver that does not know all fields
    assert not bad(gpus.judge(old)[0])


def test_how_gpus_are_connected() -> None:
    topology = """
\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0
GPU1\tNV18\t X \tSYS\tSYS\t0-47\t0
GPU2\tSYS\tSYS\t X \tSYS\t0-47\t0
NIC0\tPIX\tSYS\tSYS\t X \t\t

Legend:
  X    = Self
"""
    assert gpus.connections(topology) == "between NUMA nodes (2), NVLink (1)"


def test_what_the_kernel_told_of_gpus() -> None:
    kernel = "[1.0] NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus\n[2.0] NVRM: Xid (PCI:0000:86:00): 31, x"
    assert [finding.verdict for finding in gpus.xids(kernel)] == ["bad", "warning"]
    assert gpus.xids("") == []


def test_alike_findings_of_nodes_become_one() -> None:
    good = [Finding("memory", "good", f"{number} GiB") for number in range(3)]
    ill = Finding("memory", "warning", "1 GiB")
    told = merged([("n1", [good[0]]), ("n2", [good[1]]), ("n3", [ill]), ("n4", [ill])])
    assert [(finding.found, finding.nodes) for finding in told] == [("0 GiB", ("n1", "n2")), ("1 GiB", ("n3", "n4"))]


def test_the_odd_one_out() -> None:
    facts = {node: {"torch": "2.13", "driver": "550"} for node in NODES}
    assert unequal(facts) == []
    facts["n3"] = {"torch": "2.12", "driver": "550"}
    (finding,) = unequal(facts)
    assert finding.nodes == ("n3",)
    assert finding.found == "torch is 2.12, on most nodes 2.13"


def test_bad_nodes_and_exit_codes() -> None:
    report = Report(
        NODES, [Finding("a", "bad", "x", nodes=("n3", "n2")), Finding("b", "warning", "y", nodes=("n1",))], 1
    )
    assert (report.bad_nodes, report.exit_code) == (["n2", "n3"], 4)
    assert Report(NODES, [Finding("b", "warning", "y", nodes=("n1",))], 1).exit_code == 0


def test_who_held_up_the_others() -> None:
    def broken(*stages: tuple[int, str, list[int]]) -> tuple[str, ...]:
        heard = [NodeReport(node, {}, stage) for node, stage in zip(NODES, stages, strict=False)]
        return Examination(heard).report().findings[-1].nodes

    waits, done = (1, "the clock of rank 2", [2]), (2, "sending", [3])
    assert broken(waits, done, (1, "its clock", []), done) == ("n3",)
    assert broken(done, (0, "meeting the others", []), done) == ("n2",)
    assert broken(*[(3, "an all-reduce", [])] * 3) == ("n1", "n2", "n3")


def test_a_folder_without_flock_and_synced_names_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_fd: int, _how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(filesystem, "remove_afterwards", lambda path: None)
    assert not bad(filesystem.judge([filesystem.measure(ALONE, tmp_path, quick=True, takes_part=True)], ["n1"])[:1])
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(os, "fsync", fsync)
    told = filesystem.judge([filesystem.measure(ALONE, tmp_path, quick=True, takes_part=True)], ["n1"])
    flockless, names = told[:2]
    assert (flockless.verdict, names.verdict) == ("warning", "warning")
    assert "has no flock: a lock is a lease, which is taken over 60 s after" in flockless.found
    assert "mount with -o flock" in flockless.advice
    assert "cannot be made durable (fsync of a folder): Invalid argument" in names.found
