"""Shared by all tests: the packed default data set (made once), and quiet, deterministic processes."""

from __future__ import annotations

import os
import signal
import tempfile
from collections import Counter
from pathlib import Path

import pytest

# One cache for all tests and workers: the data set is packed once, under a lock.
os.environ.setdefault("ONECURVE_CACHE", str(Path(tempfile.gettempdir()) / f"onecurve-tests-{os.getuid()}"))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "disabled"

# Started in the background of a shell, this process ignores SIGINT, and so would all that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run only when asked for: `make test-all`, or -m slow."""
    if config.getoption("-m"):
        return
    skip = pytest.mark.skip(reason="slow: run by `make test-all`")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says what `make test-all` consists of: tests and minutes of each part."""
    if "slow" not in config.getoption("-m"):
        return
    tests, seconds = Counter[str](), Counter[str]()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            part = "/".join(Path(report.nodeid.partition("::")[0]).parts[:2])
            tests[part] += report.when == "call"
            seconds[part] += report.duration
    for part, its in seconds.most_common():
        terminalreporter.write_line(f"{part:40} {tests[part]:5} tests {its / 60:6.1f} min")
    terminalreporter.write_line(f"{'all':40} {tests.total():5} tests {seconds.total() / 60:6.1f} min of a worker")
