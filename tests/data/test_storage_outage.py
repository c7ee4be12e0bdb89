"""A server of shards that is gone for a while: waited for, told once, and final errors are final all the same."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.servers import Fault, Server, http_server
from tests.data.test_remote_stream import STEPS, folder, local, run, server, whole
from trainer import outage
from trainer.data.shards import Shards
from trainer.data.storage import Storage
from trainer.errors import DataError, Outage

__all__ = ["folder", "local", "server"]  # fixtures
CONTENT = bytes(range(256)) * 4096


def make(cache: Path, **options: Any) -> Storage:
    """Without patience it gives up within a tenth of a second."""
    return Storage(cache, **{"retries": 2, "wait_s": 0.02, "timeout_s": 1, "chunk_bytes": 64 << 10, **options})


@pytest.fixture
def alone() -> Iterator[Server]:
    with http_server() as server:
        yield server


def gone(server: Server, seconds: float) -> threading.Thread:
    """Stops the server now; it comes back after a while."""
    server.stop()
    timer = threading.Timer(seconds, server.start)
    timer.start()
    return timer


def test_a_server_that_is_gone_is_waited_for_and_told_of_once(
    alone: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "onecurve")
    urls = [alone.put(name, CONTENT) for name in ("a.tar", "b.tar")]
    hasty = make(tmp_path / "hasty").open(urls[0])
    blobs = [make(tmp_path / "patient", patience_s=30).open(url) for url in urls]
    back = gone(alone, 2)
    with pytest.raises(Outage, match=r"a\.tar: byte 0: cannot connect: Connection refused \(3 attempts\)"):
        hasty.read(0, 5)
    assert capfd.readouterr().err == ""
    begun = time.monotonic()
    for blob in blobs:
        blob.prefetch(0, blob.size)
    assert [bytes(blob.read(0, blob.size)) for blob in blobs] == [CONTENT, CONTENT]
    assert 1 < time.monotonic() - begun < 15
    back.join()
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2
    assert told[0].startswith(f"onecurve: waiting for {alone.url} (cannot connect: Connection refused), up to 30 s")
    assert told[1].startswith(f"onecurve: {alone.url} is back, after ")
    assert [f"onecurve: {record.getMessage()}" for record in caplog.records] == told


def test_patience_ends(alone: Server, tmp_path: Path) -> None:
    blob = make(tmp_path, patience_s=1).open(alone.put("a.tar", CONTENT))
    alone.stop()
    begun = time.monotonic()
    with pytest.raises(Outage, match=r"a\.tar: byte 0: cannot connect"):
        blob.read(0, 5)
    assert 1 <= time.monotonic() - begun < 4


@pytest.mark.parametrize("status", [404, 403])
def test_what_will_not_change_is_not_waited_for(alone: Server, tmp_path: Path, status: int) -> None:
    url = alone.put("a.tar", CONTENT)
    blob = make(tmp_path, patience_s=60).open(url)
    alone.fault = lambda request: Fault(status=status)
    begun = time.monotonic()
    with pytest.raises(DataError):
        blob.read(0, 5)
    alone.fault = lambda request: None
    alone.put("a.tar", CONTENT[::-1])
    with pytest.raises(DataError, match="was changed"):
        blob.read(0, 5)
    assert time.monotonic() - begun < 2


def test_at_the_start_nothing_is_waited_for_long(alone: Server, tmp_path: Path) -> None:
    url = alone.put("a.tar", CONTENT)
    alone.stop()
    begun = time.monotonic()
    with pytest.raises(Outage, match="cannot connect"):
        Shards.open(url, "txt", make(tmp_path, patience_s=60))
    assert time.monotonic() - begun < 5


@pytest.mark.slow
def test_a_stream_goes_on_where_its_server_was_gone(
    server: Server,
    tmp_path: Path,
    local: dict[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In the middle of a run on two ranks; without any of its shards in the cache."""
    monkeypatch.setattr(outage, "REPORT_AFTER_S", 0.5)
    spec = f"{server.url}/s-{{0..4}}.tar"
    Shards.open(spec, "txt", Storage(tmp_path))  # indexed: the start of the run asks for little
    server.forget()

    def fault(request: Any) -> None:
        if len(server.requests) == 60:
            threading.Thread(target=lambda: gone(server, 3)).start()

    server.fault = fault
    began = time.monotonic()
    got = run(spec, tmp_path, whole, cache_bytes=0, storage={"retries": 1, "patience_s": 60})
    assert time.monotonic() - began > 3
    assert got == local[whole]
    assert [step for step, *_ in got] == list(range(1, STEPS + 1))
    told = capfd.readouterr().err
    assert told.count(f"waiting for {server.url} (") == 1
    assert told.count(f"{server.url} is back") == 1
