"""Shared by all tests: the packed default data set (made once), and quiet, deterministic processes."""

from __future__ import annotations

import os
import signal
import tempfile
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
