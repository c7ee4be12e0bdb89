"""Shards behind URLs: exactly their bytes from servers that fail in every way, each byte asked for once."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import pytest

from tests.data.servers import Fault, Request, Server, http_server
from trainer.data.storage import Blob, Storage, cache, fetch
from trainer.data.storage.remote import RemoteBlob
from trainer.errors import DataError, Outage

CHUNK = 64 << 10
CONTENT = Random(2).randbytes(10 * CHUNK + 777)


@pytest.fixture(scope="module")
def one_server() -> Iterator[Server]:
    with http_server() as server:
        yield server


@pytest.fixture
def server(one_server: Server) -> Server:
    one_server.objects.clear()
    one_server.ranges, one_server.fault = True, lambda request: None
    one_server.forget()
    return one_server


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return make(tmp_path)


def make(folder: Path, **options: Any) -> Storage:
    defaults = {"cache_bytes": 100 << 20, "chunk_bytes": CHUNK, "wait_s": 0.01, "timeout_s": 5, "retries": 4}
    return Storage(folder / "cache", **{**defaults, **options})


def all_of(blob: Blob) -> bytes:
    return bytes(blob.read(0, blob.size))


def bodies(server: Server) -> list[Request]:
    """The requests but those that only ask what the object is."""
    return [request for request in server.requests if request.end - request.start > 1]


# What is read.


@pytest.mark.parametrize("cache_bytes", [0, 100 << 20])
def test_any_bytes_are_read_by_many_threads_and_each_is_sent_once(
    server: Server, tmp_path: Path, cache_bytes: int
) -> None:
    url = server.put("a.tar", CONTENT)
    blob = make(tmp_path, cache_bytes=cache_bytes).open(url)
    assert (blob.size, blob.stamp) == (len(CONTENT), make(tmp_path).stamp(url))
    random = Random(3)
    places = [
        (at, random.randrange(len(CONTENT) - at + 1)) for at in (random.randrange(len(CONTENT)) for _ in range(60))
    ]
    places += [(CHUNK * i + d, n) for i in (0, 1, 9, 10) for d in (0, 1) for n in (0, 1, 776)]
    places += [(CHUNK - 1, 2), (CHUNK - 1, CHUNK + 2), (len(CONTENT), 0), (0, 0), (0, len(CONTENT))]
    random.shuffle(places)
    with ThreadPoolExecutor(16) as pool:
        pieces = list(pool.map(lambda place: blob.read(*place), places))
    assert pieces == [CONTENT[at : at + size] for at, size in places]
    assert server.sent_again == 0
    assert len(bodies(server)) == 11
    for at, size in ((len(CONTENT) - 1, 2), (0, len(CONTENT) + 1), (len(CONTENT) + 5, 1)):
        with pytest.raises(DataError, match=rf"a\.tar: byte {len(CONTENT)}: the file ends here"):
            blob.read(at, size)


def test_an_open_blob_is_read_in_another_process(server: Server, tmp_path: Path) -> None:
    blob = make(tmp_path, cache_bytes=0).open(server.put("a.tar", CONTENT))
    assert blob.read(5, 5) == CONTENT[5:10]
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read(100_000, 5).hex())"
    done = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(blob), capture_output=True, check=True)
    assert bytes.fromhex(done.stdout.decode()) == CONTENT[100_000:100_005]


def test_a_fork_says_that_it_cannot_instead_of_waiting_for_ever(server: Server, tmp_path: Path) -> None:
    script = """
import os, pickle, sys
blob = pickle.load(sys.stdin.buffer)
blob.read(0, 5)
if os.fork():
    sys.exit(os.wait()[1] != 0)
try:
    blob.read(100_000, 5)
except Exception as error:
    print(error, flush=True)
os._exit(0)
"""
    blob = make(tmp_path, cache_bytes=0).open(server.put("a.tar", CONTENT))
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(blob), capture_output=True, check=True, timeout=20
    )
    assert b"a.tar: byte 65536: a fork of a process that read remote shards cannot" in done.stdout


@pytest.mark.parametrize("name", ["a b+c.tar", "ü日.tar", "x=1/~y'(z)*!,@.tar", "a//b.tar", ".a/..b/c%41.tar"])
def test_names_of_any_signs_are_found(server: Server, storage: Storage, name: str) -> None:
    server.put(name, CONTENT)
    assert all_of(storage.open(f"{server.url}/{quote(name)}")) == CONTENT
    if "%" not in name:
        assert all_of(storage.open(f"{server.url}/{name}")) == CONTENT


def test_empty_objects_and_those_of_one_byte(server: Server, storage: Storage) -> None:
    for content in (b"", b"x"):
        for server.ranges in (True, False):
            blob = storage.open(server.put(f"{len(content)}.tar", content))
            assert (blob.size, all_of(blob)) == (len(content), content)


def test_objects_of_a_server_share_connections(server: Server, storage: Storage) -> None:
    places = [server.put(f"{i}.tar", CONTENT[:1000]) for i in range(20)]
    before = server.connections
    for url in places:
        assert all_of(storage.open(url)) == CONTENT[:1000]
    assert server.connections - before <= 2


# Faults.

FAULTS = {
    "cut": (Fault(after=1), Fault(after=70), Fault(after=40_000), Fault(after=0)),
    "reset": (Fault(after=30_000, reset=True), Fault(after=100, reset=True)),
    "no answer": (Fault(status=0), Fault(status=0, reset=True)),
    "errors": (Fault(status=500), Fault(status=503), Fault(status=429), Fault(status=408)),
    "silence": (Fault(after=20_000, cut=False), Fault(status=0, cut=False)),
    "all": (Fault(status=502), Fault(after=50_000), Fault(after=10_000, cut=False), Fault(status=0)),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_failed_goes_on_from_the_failed_byte(server: Server, tmp_path: Path, kind: str) -> None:
    faults = FAULTS[kind]
    quick = {"timeout_s": 0.3} if any(not fault.cut for fault in faults) else {}
    blob = make(tmp_path, **quick).open(server.put("a.tar", CONTENT))
    server.forget()
    server.once(*faults)
    assert blob.read(10, 100) == CONTENT[10:110]
    assert tuple(server.faults) == faults
    if kind == "reset":  # what lies in the system's buffers is lost with the connection
        assert server.sent <= CHUNK + 30_100
    else:
        assert server.sent == CHUNK
        assert server.sent_again == 0
        assert [request.start for request in server.requests] == starts(faults)
    server.once(*faults)
    assert all_of(blob) == CONTENT


def starts(faults: tuple[Fault, ...]) -> list[int]:
    """Where requests begin of which these fail."""
    return list(accumulate((fault.after or 0 for fault in faults), initial=0))


def test_opening_and_stamping_are_tried_again_too(server: Server, tmp_path: Path) -> None:
    url, faults = server.put("a.tar", CONTENT), [Fault(status=500), Fault(status=0), Fault(status=0, cut=False)]
    storage = make(tmp_path, timeout_s=0.3)
    for use in (storage.open, storage.stamp):
        left = iter(faults)
        server.fault = lambda request, left=left: next(left, None)  # type: ignore[misc]
        use(url)
    assert server.faults == faults * 2


def test_a_slow_server_is_no_failure_while_bytes_come(server: Server, tmp_path: Path) -> None:
    blob = make(tmp_path, timeout_s=0.3).open(server.put("a.tar", CONTENT))
    server.once(Fault(slow_s=0.8))
    assert blob.read(0, CHUNK) == CONTENT[:CHUNK]
    assert len(bodies(server)) == 1


def test_a_server_that_always_breaks_is_read_as_long_as_it_brings_something(server: Server, tmp_path: Path) -> None:
    blob = make(tmp_path, chunk_bytes=1 << 20, retries=1).open(server.put("a.tar", CONTENT))
    server.fault = lambda request: Fault(after=70_000)
    assert all_of(blob) == CONTENT
    assert server.sent_again == 0
    assert len(bodies(server)) == -(-len(CONTENT) // 70_000)


def test_retries_are_exhausted_at_a_byte(server: Server, storage: Storage) -> None:
    blob = storage.open(server.put("a.tar", CONTENT))
    server.fault = lambda request: Fault(after=100)
    with pytest.raises(Outage, match=r"/a\.tar: byte 66036: the connection broke \(5 attempts\)") as caught:
        blob.read(CHUNK + 3, 5)
    assert (caught.value.exit_code, caught.value.retry) == (DataError.exit_code, True)
    assert len(bodies(server)) == 1 + storage.retries
    server.fault = lambda request: None
    assert blob.read(CHUNK + 3, 5) == CONTENT[CHUNK + 3 : CHUNK + 8]  # a failure is not remembered


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (Fault(status=500), "the server answered 500 Internal Server Error"),
        (Fault(status=0), "the connection broke"),
        (Fault(status=0, cut=False), "no bytes came for 0.2 s"),
    ],
)
def test_the_last_failure_is_told(server: Server, tmp_path: Path, fault: Fault, problem: str) -> None:
    server.fault = lambda request: fault
    url = server.put("a.tar", CONTENT)
    with pytest.raises(Outage, match=rf"/a\.tar: {problem} \(2 attempts\)$"):
        make(tmp_path, retries=1, timeout_s=0.2).open(url)


def test_where_no_server_is(tmp_path: Path) -> None:
    with http_server() as server:
        url = f"http://me:hush@{server.host}/a.tar?sig=hush"
    with pytest.raises(
        Outage,
        match=r"^http://\*\*\*@[\d.:]+/a\.tar\?\*\*\*: cannot connect: Connection refused \(3 attempts\)",
    ):
        make(tmp_path, retries=2).open(url)


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (404, "does not exist"),
        (403, "answered 403 Forbidden; are there credentials"),
        (401, "answered 401"),
        (400, "400"),
    ],
)
def test_what_will_not_change_is_told_at_once(server: Server, tmp_path: Path, status: int, problem: str) -> None:
    url = server.put("a.tar", CONTENT)
    blob = make(tmp_path).open(url)
    server.forget()
    server.fault = lambda request: Fault(status=status)
    for use in (make(tmp_path).open, make(tmp_path).stamp):
        with pytest.raises(DataError, match=problem):
            use(url)
    with pytest.raises(DataError, match=f"byte 131072: .*{problem}"):
        blob.read(2 * CHUNK + 5, 5)
    assert len(server.requests) == 3


def test_secrets_reach_the_server_but_no_message(server: Server, tmp_path: Path) -> None:
    server.put("a.tar", CONTENT)
    url = f"http://me:hu%2Fsh@{server.host}/a.tar?X-Sig=hu%2Fsh&b=1"
    blob = make(tmp_path).open(url)
    assert all_of(blob) == CONTENT
    for request in server.requests:
        assert request.path == "/a.tar?X-Sig=hu%2Fsh&b=1"
        assert request.header["authorization"] == "Basic " + b64encode(b"me:hu/sh").decode()
    for fault in (Fault(status=500), Fault(status=403), Fault(status=404), Fault(status=0), Fault(after=0)):
        fresh = make(tmp_path / f"{fault}", retries=1)
        server.fault = lambda request: None
        blob = fresh.open(url)
        server.fault = lambda request, fault=fault: fault  # type: ignore[misc]
        for use in (fresh.open, fresh.stamp, lambda _, blob=blob: blob.read(0, 5)):  # type: ignore[misc]
            with pytest.raises((DataError, Outage)) as caught:
                use(url)
            assert "hu" not in f"{caught.value}{vars(caught.value)}"
            assert "/a.tar?***" in str(caught.value)


# Changed objects.


@pytest.mark.parametrize("content", [CONTENT[::-1], CONTENT + b"x", CONTENT[:100_000], b""])
def test_a_changed_object_is_named_and_never_mixed(server: Server, storage: Storage, content: bytes) -> None:
    blob = storage.open(server.put("a.tar", CONTENT))
    assert blob.read(0, 5) == CONTENT[:5]
    server.put("a.tar", content)
    with pytest.raises(DataError, match=r"/a\.tar: byte 131072: was changed after it had been opened") as caught:
        blob.read(2 * CHUNK + 1, 5)
    assert caught.value.shard == blob.url
    assert storage.stamp(blob.url) != blob.stamp
    assert all_of(storage.open(blob.url)) == content


def test_an_object_that_changes_between_two_attempts_is_not_mixed(server: Server, storage: Storage) -> None:
    blob = storage.open(server.put("a.tar", CONTENT))

    def fault(request: Request) -> Fault | None:
        if request.start == 100:
            server.put("a.tar", CONTENT[::-1])
        return Fault(after=100)

    server.fault = fault
    with pytest.raises(DataError, match=r"byte 100: was changed"):
        blob.read(0, 200)


# The cache and reading ahead.


def forget_process() -> None:
    """As in a new process."""
    cache.shared.cache_clear()


def test_what_was_read_is_not_sent_again_to_another_process(server: Server, storage: Storage) -> None:
    url = server.put("a.tar", CONTENT)
    assert all_of(storage.open(url)) == CONTENT
    forget_process()
    server.forget()
    assert all_of(storage.open(url)) == CONTENT
    assert bodies(server) == []
    blob = storage.open(url)
    assert isinstance(blob, RemoteBlob)
    assert blob._load_chunk(0) == CONTENT[:CHUNK]  # asked for before another process had put it there
    assert bodies(server) == []
    server.put("a.tar", CONTENT[::-1])
    assert all_of(storage.open(url)) == CONTENT[::-1]  # of another version nothing is taken from there


def test_a_damaged_chunk_is_fetched_again(server: Server, storage: Storage) -> None:
    url = server.put("a.tar", CONTENT)
    assert all_of(storage.open(url)) == CONTENT
    forget_process()
    server.forget()
    damaged = sorted((storage.cache / "chunks").glob("*/*"))[3:5]
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)
    assert all_of(storage.open(url)) == CONTENT
    assert sorted(request.start // CHUNK for request in bodies(server)) == [int(path.name[-8:], 16) for path in damaged]


@pytest.mark.parametrize("place", ["/proc/none", "file"])
def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(server: Server, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    storage = Storage(tmp_path / place, cache_bytes=100 << 20, chunk_bytes=CHUNK, wait_s=0.01)
    blob = storage.open(server.put("a.tar", CONTENT))
    assert all_of(blob) == CONTENT
    assert blob.read(5, 5) == CONTENT[5:10]
    assert len(bodies(server)) == 11  # kept in memory


def test_a_small_budget_is_kept(server: Server, tmp_path: Path) -> None:
    blob = make(tmp_path, cache_bytes=4 * CHUNK).open(server.put("a.tar", CONTENT))
    for _ in range(2):
        assert all_of(blob) == CONTENT
        assert sum(path.stat().st_size for path in (tmp_path / "cache" / "chunks").glob("*/*")) <= 4 * CHUNK


@pytest.mark.parametrize("cache_bytes", [0, 100 << 20])
def test_what_is_foreseen_is_fetched_meanwhile(server: Server, tmp_path: Path, cache_bytes: int) -> None:
    blob = make(tmp_path, cache_bytes=cache_bytes).open(server.put("a.tar", CONTENT))
    server.fault = lambda request: Fault(slow_s=0.1)
    begun = time.monotonic()
    blob.prefetch(CHUNK + 5, 1 << 40)
    blob.prefetch(CHUNK + 5, 10)
    blob.prefetch(len(CONTENT) + 5, 10)
    assert time.monotonic() - begun < 0.05
    wait_until(lambda: server.sent >= len(CONTENT) - CHUNK)
    server.fault = lambda request: Fault(status=404)
    wait_until(lambda: not fetch.shared(8)._jobs)
    assert blob.read(CHUNK, len(CONTENT) - CHUNK) == CONTENT[CHUNK:]
    assert sorted(request.start // CHUNK for request in bodies(server)) == list(range(1, 11))


def test_hints_of_a_closed_blob_are_dropped_and_failed_ones_forgotten(server: Server, tmp_path: Path) -> None:
    blob = make(tmp_path, connections=1).open(server.put("a.tar", CONTENT))
    server.fault = lambda request: Fault(status=404)
    blob.prefetch(0, CHUNK)
    wait_until(lambda: bodies(server) and not fetch.shared(1)._jobs)  # its answer came
    server.fault = lambda request: Fault(slow_s=0.2)
    assert blob.read(0, 5) == CONTENT[:5]
    blob.prefetch(CHUNK, 1 << 40)
    wait_until(lambda: len(bodies(server)) == 3)
    blob.close()
    assert blob.read(5 * CHUNK, 5) == CONTENT[5 * CHUNK : 5 * CHUNK + 5]
    time.sleep(0.05)
    assert [request.start // CHUNK for request in bodies(server)] == [0, 0, 1, 5]


@pytest.mark.parametrize("fault", [Fault(slow_s=20), Fault(after=1000, cut=False), Fault(status=500), None])
def test_the_interpreter_ends_with_downloads_in_flight(server: Server, tmp_path: Path, fault: Fault | None) -> None:
    script = """
import pickle, sys, threading, time
blob = pickle.load(sys.stdin.buffer)
blob.prefetch(0, blob.size)
threading.Thread(target=blob.read, args=(0, blob.size), daemon=True).start()
time.sleep(0.1)
print("end", flush=True)
"""
    blob = make(tmp_path, retries=1000, wait_s=0.05, timeout_s=60).open(server.put("a.tar", CONTENT))
    server.fault = lambda request: fault
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(blob), capture_output=True, timeout=15)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"end\n", b"")
    assert time.monotonic() - begun < 5


def wait_until(holds: Callable[[], Any]) -> None:
    end = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


# Servers without ranges.


def test_a_server_without_ranges_is_copied_whole_once(server: Server, storage: Storage) -> None:
    url = server.put("a.tar", CONTENT)
    server.ranges = False
    server.fault = whole_after(server, Fault(after=300_000), Fault(status=503), Fault(after=400_000), Fault(status=0))
    blob = storage.open(url)
    assert all_of(blob) == CONTENT
    assert blob.stamp == storage.stamp(url)
    server.forget()
    assert storage.open(url).read(5, 5) == CONTENT[5:10]
    assert all_of(pickle.loads(pickle.dumps(blob))) == CONTENT
    server.put("a.tar", CONTENT[::-1])
    assert storage.stamp(url) != blob.stamp
    assert all_of(storage.open(url)) == CONTENT[::-1]


def whole_after(server: Server, *faults: Fault) -> Callable[[Request], Fault | None]:
    """Faults for the requests of a body behind the two that ask what the object is."""
    left = iter([None, None, *faults])
    return lambda request: next(left, None)


def test_a_server_without_ranges_that_fails_for_ever(server: Server, storage: Storage) -> None:
    url = server.put("a.tar", CONTENT)
    server.ranges = False
    server.fault = lambda request: Fault(after=1000)
    with pytest.raises(Outage, match=r"/a\.tar: byte 1000: the connection broke \(5 attempts\)"):
        storage.open(url)
    assert list((storage.cache / "unpacked").glob("*.tar")) == []
