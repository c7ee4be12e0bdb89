"""Findings: what was found, whether that is good, and what to do; of one node and of all of them together."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

Verdict = Literal["good", "warning", "bad"]
ORDER: tuple[Verdict, ...] = ("good", "warning", "bad")
BAD = 4  # exit code: a job that starts here would fail
LOOKS = {"good": "green", "warning": "yellow", "bad": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the table. `nodes`: where it was found; empty if it is not about single nodes."""

    area: str
    verdict: Verdict
    found: str
    advice: str = ""
    nodes: tuple[str, ...] = ()


def from_json(values: Iterable[Any]) -> list[Finding]:
    """Returns the findings among the values that another process sent."""
    findings = []
    for value in values:
        if isinstance(value, dict) and value.get("verdict") in ORDER:
            texts = {name: str(value.get(name, "")) for name in ("area", "found", "advice")}
            nodes = tuple(str(node) for node in value.get("nodes") or ())
            findings.append(Finding(**texts, verdict=value["verdict"], nodes=nodes))
    return findings


@dataclass
class Report:
    nodes: list[str]
    findings: list[Finding]
    seconds: float

    @property
    def bad_nodes(self) -> list[str]:
        """Returns the nodes that a job should exclude."""
        bad = {node for finding in self.findings if finding.verdict == "bad" for node in finding.nodes}
        return sorted(bad, key=lambda node: self.nodes.index(node) if node in self.nodes else -1)

    @property
    def verdict(self) -> Verdict:
        return max((finding.verdict for finding in self.findings), key=ORDER.index, default="good")

    @property
    def exit_code(self) -> int:
        return BAD if self.verdict == "bad" else 0

    def to_json(self) -> str:
        """Returns the report as one line of JSON."""
        return json.dumps(
            {
                "verdict": self.verdict,
                "bad_nodes": self.bad_nodes,
                "nodes": self.nodes,
                "seconds": round(self.seconds, 1),
                "findings": [asdict(finding) for finding in self.findings],
            }
        )

    def print(self) -> None:
        """Prints the table and, if there are bad nodes, a line `bad nodes: a,b` that a script can read."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in self.findings:
            where = (
                ""
                if set(finding.nodes) >= set(self.nodes)
                else f"{_abbreviated(finding.nodes)}: "
                if finding.nodes
                else ""
            )
            text = Text(f"{where}{finding.found}")
            if finding.advice:
                text.append(f"\n→ {finding.advice}", style="" if finding.verdict == "bad" else "dim")
            table.add_row(finding.area, Text(finding.verdict, style=LOOKS[finding.verdict]), text)
        width = None if sys.stdout.isatty() else 120  # a log
        console = Console(markup=False, highlight=False, emoji=False, width=width)
        with console.capture() as capture:
            console.print(table)
        print("\n".join(line.rstrip() for line in capture.get().splitlines()))
        counts = Counter(finding.verdict for finding in self.findings)
        summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ORDER if counts[verdict])
        console.print(f"\n{summary}; {len(self.nodes)} node{'s' * (len(self.nodes) != 1)}, {self.seconds:.0f} s")
        if self.bad_nodes:
            print(f"bad nodes: {','.join(self.bad_nodes)}", flush=True)


def merged(reports: Iterable[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """Merges equal findings of the nodes, given as (node, findings). Good ones count as equal if their areas are
    equal, and keep the text of the first node."""
    by_key: dict[tuple[str, ...], Finding] = {}
    for node, findings in reports:
        counts: Counter[str] = Counter()
        for finding in findings:
            counts[finding.area] += 1
            nth = str(counts[finding.area])
            content = (nth,) if finding.verdict == "good" else (finding.found, finding.advice)
            key = (finding.area, finding.verdict, *content)
            combined = by_key.get(key, replace(finding, nodes=()))
            if node not in combined.nodes:
                combined = replace(combined, nodes=(*combined.nodes, node))
            by_key[key] = combined
    return list(by_key.values())


def unequal(facts: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Returns findings for facts (name -> value, by node) that differ between nodes: the rarer values are bad."""
    findings = []
    for name in dict.fromkeys(name for values in facts.values() for name in values):
        values = {node: node_facts.get(name, "none") for node, node_facts in facts.items()}
        (usual, _), *others = Counter(values.values()).most_common()
        for odd, _ in others:
            nodes = tuple(node for node, value in values.items() if value == odd)
            message, advice = f"{name} is {odd}, on most nodes {usual}", "make all nodes alike, or leave these out"
            findings.append(Finding("same everywhere", "bad", message, advice, nodes))
    return findings


def slow(speeds: Mapping[str, float]) -> list[str]:
    """Returns the names of those that are slower than half the median."""
    middle = median(speeds.values()) if speeds else 0.0
    return [name for name, speed in speeds.items() if speed < middle / 2]


def _abbreviated(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"
