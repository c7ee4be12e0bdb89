"""Finds the ranks that hang from the reports of all ranks, and says it in one sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]


def verdict(reports: Mapping[int, Report], silent: Mapping[int, str]) -> tuple[list[int], str]:
    """Returns the ranks that hold up the others, and a sentence about it. `silent` describes those without a report."""
    culprits = sorted({*silent, *(rank for rank, report in reports.items() if not report["waits"])})
    reason = ""
    if not culprits and len(reports) > 1:
        culprits, reason = _find_missing_ranks(reports)
    if not culprits:
        culprits = sorted(reports)
    parts = [
        f"rank {rank} {silent[rank] if rank in silent else _describe_culprit(reports[rank])}{reason}"
        for rank in culprits
    ]
    waiting: dict[str, list[int]] = {}
    for rank, report in sorted(reports.items()):
        if rank not in culprits:
            waiting.setdefault(_describe_wait(report), []).append(rank)
    parts += [
        f"{_ranks(ranks)} {'wait' if len(ranks) > 1 else 'waits'} {location}" for location, ranks in waiting.items()
    ]
    return culprits, "; ".join(parts)


def _describe_culprit(report: Report) -> str:
    description = f"has been in {report['where']} for {report['seconds']:.0f} s"
    if report["reader"]:
        description += f", while its reader is in {report['reader']}"
    return f"{description} (step {report['step']}, {report['kind'].replace('_', ' ')})"


def _describe_wait(report: Report) -> str:
    if report["collective"]:
        return f"in {report['collective']} of step {report['step']}"
    if report["backward"]:
        return f"for the gradients of others in step {report['step']}"
    return f"in {report['where']} (step {report['step']})"


def _find_missing_ranks(reports: Mapping[int, Report]) -> tuple[list[int], str]:
    """Returns the ranks that are missing while all wait: those that have not reached the collective of the majority, or
    else of the first rank that waits, or that are elsewhere than the majority; and the words for it."""
    last_collectives = {rank: report["last"] for rank, report in reports.items() if report["last"]}
    if last_collectives:
        arrivals = Counter((last["group"], last["number"]) for last in last_collectives.values())
        common_collective, count = arrivals.most_common(1)[0]
        first = min(last_collectives.values(), key=lambda last: last["time"])
        if count * 2 > len(reports):
            first = next(
                last for last in last_collectives.values() if (last["group"], last["number"]) == common_collective
            )
        group, number = first["group"], first["number"]
        missing_ranks = [rank for rank, report in reports.items() if report["counts"].get(group, number) < number]
        if missing_ranks and len(missing_ranks) < len(reports):
            return sorted(missing_ranks), f", and left out {first['name'].partition(':')[2]} that others wait in"
    places = Counter((report["step"], report["where"]) for report in reports.values())
    (majority, count), *minorities = places.most_common()
    if minorities and count * 2 > len(reports):
        return sorted(rank for rank, report in reports.items() if (report["step"], report["where"]) != majority), ""
    return [], ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
