"""How many faults were survived, all tests together."""

from __future__ import annotations

from collections import Counter

FAULTS = "faults survived"


def pytest_terminal_summary(terminalreporter) -> None:  # type: ignore[no-untyped-def]
    kinds: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, value in getattr(report, "user_properties", []):
            if name == FAULTS and report.when == "call":
                kinds.update(value)
    if kinds:
        told = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        terminalreporter.write_line(f"{sum(kinds.values())} {FAULTS}: {told}")
