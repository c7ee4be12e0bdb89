"""What was found, whether that is good, and what to do; of one node, and of all of them together."""

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
    """One line of the table. `nodes`: where; none: it is of no node alone."""

    area: str
    verdict: Verdict
    found: str
    advice: str = ""
    nodes: tuple[str, ...] = ()


def from_json(values: Iterable[Any]) -> list[Finding]:
    """What another process told, as far as it is a finding."""
    found = []
    for value in values:
        if isinstance(value, dict) and value.get("verdict") in ORDER:
            texts = {name: str(value.get(name, "")) for name in ("area", "found", "advice")}
            nodes = tuple(str(node) for node in value.get("nodes") or ())
            found.append(Finding(**texts, verdict=value["verdict"], nodes=nodes))
    return found


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
        """One line for machines."""
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
        """The table; then, where there are any, a line `bad nodes: a,b` that a script can read."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in self.findings:
            where = "" if set(finding.nodes) >= set(self.nodes) else f"{_few(finding.nodes)}: " if finding.nodes else ""
            told = Text(f"{where}{finding.found}")
            if finding.advice:
                told.append(f"\n→ {finding.advice}", style="" if finding.verdict == "bad" else "dim")
            table.add_row(finding.area, Text(finding.verdict, style=LOOKS[finding.verdict]), told)
        width = None if sys.stdout.isatty() else 120  # a log
        console = Console(markup=False, highlight=False, emoji=False, width=width)
        with console.capture() as drawn:
            console.print(table)
        print("\n".join(line.rstrip() for line in drawn.get().splitlines()))
        counts = Counter(finding.verdict for finding in self.findings)
        counted = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ORDER if counts[verdict])
        console.print(f"\n{counted}; {len(self.nodes)} node{'s' * (len(self.nodes) != 1)}, {self.seconds:.0f} s")
        if self.bad_nodes:
            print(f"bad nodes: {','.join(self.bad_nodes)}", flush=True)


def merged(told: Iterable[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """The findings of each node, (node, findings): alike ones become one. Good ones count as alike if their area is,
    and are told as the first node has them."""
    together: dict[tuple[str, ...], Finding] = {}
    for node, findings in told:
        seen: Counter[str] = Counter()
        for finding in findings:
            seen[finding.area] += 1
            nth = str(seen[finding.area])
            same = (nth,) if finding.verdict == "good" else (finding.found, finding.advice)
            key = (finding.area, finding.verdict, *same)
            before = together.get(key, replace(finding, nodes=()))
            if node not in before.nodes:
                before = replace(before, nodes=(*before.nodes, node))
            together[key] = before
    return list(together.values())


def unequal(facts: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """`facts` of each node, name -> value: what must be the same on all, and is not. The fewer are the odd ones."""
    findings = []
    for name in dict.fromkeys(name for values in facts.values() for name in values):
        values = {node: mine.get(name, "none") for node, mine in facts.items()}
        (usual, _), *others = Counter(values.values()).most_common()
        for odd, _ in others:
            nodes = tuple(node for node, value in values.items() if value == odd)
            told, advice = f"{name} is {odd}, on most nodes {usual}", "make all nodes alike, or leave these out"
            findings.append(Finding("same everywhere", "bad", told, advice, nodes))
    return findings


def slow(speeds: Mapping[str, float]) -> list[str]:
    """Who is slower than half the median."""
    middle = median(speeds.values()) if speeds else 0.0
    return [who for who, speed in speeds.items() if speed < middle / 2]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"
