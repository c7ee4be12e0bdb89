"""The reports of the processes that are examined, and the findings that follow from all of them."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.doctor.verdict import Finding, Report, from_json, merged, unequal


@dataclass(frozen=True)
class Options:
    folder: Path
    quick: bool
    limit_s: float
    json: bool


@dataclass
class NodeReport:
    """The report of one process: its node, its stage (number, text, ranks that it waits for), what went wrong."""

    node: str
    answer: dict[str, Any] | None = None
    stage: tuple[int, str, list[int]] = (0, "meeting the others", [])
    failure: str = ""


@dataclass
class Examination:
    """What rank 0, or the process that started the workers, knows. `reports` is by rank."""

    reports: list[NodeReport] = field(default_factory=list)
    absences: list[Finding] = field(default_factory=list)
    common_findings: list[Finding] | None = None  # None: the common checks did not end
    start: float = field(default_factory=time.monotonic)

    def report(self) -> Report:
        nodes = list(dict.fromkeys(report.node for report in self.reports))
        findings_by_node = [
            (report.node, from_json(report.answer.get("findings", ()))) for report in self.reports if report.answer
        ]
        facts = {
            report.node: report.answer["facts"]
            for report in self.reports
            if report.answer and report.answer.get("facts")
        }
        findings = [*merged(findings_by_node), *unequal(facts), *self.absences]
        if self.common_findings is not None:
            findings += self.common_findings
        elif self.reports and not (self.absences and all(report.stage[0] == 0 for report in self.reports)):
            findings += self._interruption()
        nodes += [node for finding in self.absences for node in finding.nodes if node not in nodes]
        return Report(nodes, findings, time.monotonic() - self.start)

    def _interruption(self) -> list[Finding]:
        """Names the ranks that held up the others: those that are awaited, else those at the earliest stage."""
        earliest = min(report.stage[0] for report in self.reports)
        behind = [report for report in self.reports if report.stage[0] == earliest]
        awaited = sorted({rank for report in behind for rank in report.stage[2]}) or [
            rank for rank, report in enumerate(self.reports) if report in behind
        ]
        reason = next((f": {report.failure}" for report in self.reports if report.failure), "")
        message = f"the common checks broke off in {behind[0].stage[1]}, for want of "
        message += ", ".join(f"rank {rank} on {self.reports[rank].node}" for rank in awaited[:8])
        if len(awaited) == len(self.reports):
            message = f"the common checks broke off in {behind[0].stage[1]}, on all processes"
        advice = "see whether the nodes reach each other (firewall, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        return [
            Finding(
                "group", "bad", message + reason, advice, tuple({self.reports[rank].node: None for rank in awaited})
            )
        ]


def examine_node(options: Options, ranks: int, processes: int, alone: bool, is_first: bool) -> dict[str, Any]:
    """Examines this node, once per node. `is_first`: the first of all processes also examines what all share."""
    from launch.doctor import extras, gpus, machine, slurm

    findings, facts = machine.examine(ranks, processes, alone)
    if "torch" in facts:
        gpu_findings, gpu_facts = gpus.examine()
        findings += gpu_findings
        facts |= gpu_facts
        findings += extras.examine(options.quick) if is_first else [extras.apex()]
    if is_first:
        findings += slurm.examine()
    return {"findings": [vars(finding) for finding in findings], "facts": facts}


def print_report(report: Report, options: Options) -> int:
    """Prints the report and returns its exit code."""
    if options.json:
        print(report.to_json(), flush=True)
    else:
        report.print()
    return report.exit_code


def give_up_after(seconds: float, finish: Callable[[], int] = lambda: 1) -> threading.Timer:
    """Ends this process after that time, whatever it hangs in, with the exit code that `finish` returns."""

    def give_up() -> None:
        code = finish()
        sys.stdout.flush()
        os._exit(code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    return timer
