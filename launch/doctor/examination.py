"""What each process tells of itself and of the common checks, and what follows from all of it."""

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
    """What one process told: of its node; how far it came (order, text, for whom it waits); what went wrong."""

    node: str
    answer: dict[str, Any] | None = None
    stage: tuple[int, str, list[int]] = (0, "meeting the others", [])
    failure: str = ""


@dataclass
class Examination:
    """What rank 0, or who started the members, knows. `heard` is by rank."""

    heard: list[NodeReport] = field(default_factory=list)
    absent: list[Finding] = field(default_factory=list)
    common: list[Finding] | None = None  # None: the common checks did not come to their end
    began: float = field(default_factory=time.monotonic)

    def report(self) -> Report:
        nodes = list(dict.fromkeys(heard.node for heard in self.heard))
        told = [(heard.node, from_json(heard.answer.get("findings", ()))) for heard in self.heard if heard.answer]
        facts = {
            heard.node: heard.answer["facts"] for heard in self.heard if heard.answer and heard.answer.get("facts")
        }
        findings = [*merged(told), *unequal(facts), *self.absent]
        if self.common is not None:
            findings += self.common
        elif self.heard and not (self.absent and all(heard.stage[0] == 0 for heard in self.heard)):
            findings += self._broken_off()
        nodes += [node for finding in self.absent for node in finding.nodes if node not in nodes]
        return Report(nodes, findings, time.monotonic() - self.began)

    def _broken_off(self) -> list[Finding]:
        """Who held up the others: for whom somebody waits, else who has come least far."""
        least = min(heard.stage[0] for heard in self.heard)
        behind = [heard for heard in self.heard if heard.stage[0] == least]
        awaited = sorted({rank for heard in behind for rank in heard.stage[2]}) or [
            rank for rank, heard in enumerate(self.heard) if heard in behind
        ]
        why = next((f": {heard.failure}" for heard in self.heard if heard.failure), "")
        told = f"the common checks broke off in {behind[0].stage[1]}, for want of "
        told += ", ".join(f"rank {rank} on {self.heard[rank].node}" for rank in awaited[:8])
        if len(awaited) == len(self.heard):
            told = f"the common checks broke off in {behind[0].stage[1]}, on all processes"
        advice = "see whether the nodes reach each other (firewall, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        return [Finding("group", "bad", told + why, advice, tuple({self.heard[rank].node: None for rank in awaited}))]


def local(options: Options, ranks: int, processes: int, alone: bool, first: bool) -> dict[str, Any]:
    """What this node is, as the first of its processes tells it. `first`: of all; it tells also of what one tells."""
    from launch.doctor import extras, gpus, machine, slurm

    findings, facts = machine.examine(ranks, processes, alone)
    if "torch" in facts:
        found, more = gpus.examine()
        findings += found
        facts |= more
        findings += extras.examine(options.quick) if first else [extras.apex()]
    if first:
        findings += slurm.examine()
    return {"findings": [vars(finding) for finding in findings], "facts": facts}


def tell_all(report: Report, options: Options) -> int:
    """Prints it; gives its exit code."""
    if options.json:
        print(report.to_json(), flush=True)
    else:
        report.print()
    return report.exit_code


def give_up_after(seconds: float, otherwise: Callable[[], int] = lambda: 1) -> threading.Timer:
    """Ends this process after the time, whatever it hangs in."""

    def give_up() -> None:
        code = otherwise()
        sys.stdout.flush()
        os._exit(code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    return timer
