"""Who hangs, in one sentence, from what the ranks report of where they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]


def verdict(reports: Mapping[int, Report], silent: Mapping[int, str]) -> tuple[list[int], str]:
    """The ranks that hold up the others, and the sentence. `silent`: what is known of those that did not report."""
    culprits = sorted({*silent, *(rank for rank, report in reports.items() if not report["waits"])})
    why = ""
    if not culprits and len(reports) > 1:
        culprits, why = _who_is_missing(reports)
    if not culprits:
        culprits = sorted(reports)
    parts = [f"rank {rank} {silent[rank] if rank in silent else _at(reports[rank])}{why}" for rank in culprits]
    waiting: dict[str, list[int]] = {}
    for rank, report in sorted(reports.items()):
        if rank not in culprits:
            waiting.setdefault(_waits_in(report), []).append(rank)
    parts += [f"{_ranks(ranks)} {'wait' if len(ranks) > 1 else 'waits'} {what}" for what, ranks in waiting.items()]
    return culprits, "; ".join(parts)


def _at(report: Report) -> str:
    doing = f"has been in {report['where']} for {report['seconds']:.0f} s"
    if report["reader"]:
        doing += f", while its reader is in {report['reader']}"
    return f"{doing} (step {report['step']}, {report['kind'].replace('_', ' ')})"


def _waits_in(report: Report) -> str:
    if report["collective"]:
        return f"in {report['collective']} of step {report['step']}"
    if report["backward"]:
        return f"for the gradients of others in step {report['step']}"
    return f"in {report['where']} (step {report['step']})"


def _who_is_missing(reports: Mapping[int, Report]) -> tuple[list[int], str]:
    """All wait. Right are most of them, else the first to wait; who has not come to the same collective is missed."""
    known = {rank: report["last"] for rank, report in reports.items() if report["last"]}
    if known:
        came = Counter((last["group"], last["number"]) for last in known.values())
        usual, count = came.most_common(1)[0]
        first = min(known.values(), key=lambda last: last["time"])
        if count * 2 > len(reports):
            first = next(last for last in known.values() if (last["group"], last["number"]) == usual)
        group, number = first["group"], first["number"]
        missing = [rank for rank, report in reports.items() if report["counts"].get(group, number) < number]
        if missing and len(missing) < len(reports):
            return sorted(missing), f", and left out {first['name'].partition(':')[2]} that others wait in"
    places = Counter((report["step"], report["where"]) for report in reports.values())
    (most, count), *others = places.most_common()
    if others and count * 2 > len(reports):
        return sorted(rank for rank, report in reports.items() if (report["step"], report["where"]) != most), ""
    return [], ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
