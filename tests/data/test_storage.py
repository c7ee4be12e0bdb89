"""Local shards, what URLs mean and how they are shown, the cache on disk, the pool of fetching threads."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from trainer.data.storage import Storage, default_cache, is_remote, is_url, shown
from trainer.data.storage.cache import MEMORY_BYTES, Cache
from trainer.data.storage.fetch import Pool
from trainer.data.storage.local import LocalBlob
from trainer.errors import ConfigError, DataError
from trainer.secrets import without_secrets

CONTENT = Random(1).randbytes(100_000)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_local_file_is_read_at_any_place_by_many_threads(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "a b.tar"
    path.write_bytes(CONTENT)
    storage = Storage(tmp_path / "cache", mmap=mmap)
    blob = pickle.loads(pickle.dumps(storage)).open(f"file://{str(path).replace(' ', '%20')}")
    assert blob.size == len(CONTENT)
    assert blob.stamp == storage.stamp(str(path)) == storage.open(str(path)).stamp
    places = [(Random(i).randrange(98_000), Random(i).randrange(2000)) for i in range(500)]
    places += [(0, len(CONTENT)), (len(CONTENT), 0), (0, 0), (len(CONTENT) - 1, 1)]
    with ThreadPoolExecutor(8) as pool:
        pieces = [bytes(piece) for piece in pool.map(lambda place: blob.read(*place), places)]
    assert pieces == [CONTENT[at : at + size] for at, size in places]
    blob.prefetch(0, 1 << 40)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("mmap", [False, True])
def test_what_lies_past_the_end_of_a_file_is_refused(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"abc")
    with pytest.raises(DataError, match=r"a\.tar: byte 3: the file ends here, 2 bytes are missing") as caught:
        Storage(tmp_path, mmap=mmap).open(str(path)).read(1, 4)
    assert (caught.value.shard, caught.value.byte) == (str(path), 3)
    (tmp_path / "empty.tar").write_bytes(b"")
    assert Storage(tmp_path, mmap=mmap).open(str(tmp_path / "empty.tar")).size == 0


def test_a_file_cut_short_under_the_reader_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    blob = Storage(tmp_path).open(str(path))
    os.truncate(path, 1000)
    with pytest.raises(DataError, match=r"a\.tar: byte 1000: the file ends here"):
        blob.read(900, 500)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_replaced_file_is_never_mixed_with_the_one_that_was_opened(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"old" * 100)
    blob = Storage(tmp_path, mmap=mmap).open(str(path))
    copy = pickle.dumps(blob)
    (tmp_path / "new").write_bytes(b"new" * 100)
    os.replace(tmp_path / "new", path)
    os.utime(path, (1, 1))
    assert bytes(blob.read(3, 3)) == b"old"  # the open file is still the old one
    blob.close()
    for reader in (blob, pickle.loads(copy)):
        with pytest.raises(DataError, match=r"a\.tar: was changed after it had been opened"):
            reader.read(3, 3)
    assert Storage(tmp_path).stamp(str(path)) != blob.stamp


def test_a_closed_file_opens_again_and_leaves_no_open_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    before = os.listdir("/proc/self/fd")
    blob = LocalBlob(str(path))
    stop = threading.Event()

    def close() -> None:
        while not stop.is_set():
            blob.close()

    closing = threading.Thread(target=close)
    closing.start()
    for i in range(2000):  # no read from a closed or another file's number
        assert blob.read(i, 10) == CONTENT[i : i + 10]
    stop.set()
    closing.join()
    blob.close()
    assert os.listdir("/proc/self/fd") == before


def test_an_open_file_is_read_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    blob = LocalBlob(str(path), mmap=True)
    assert bytes(blob.read(5, 5)) == CONTENT[5:10]
    script = "import pickle, sys; print(bytes(pickle.load(sys.stdin.buffer).read(5, 5)).hex())"
    done = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(blob), capture_output=True, check=True)
    assert bytes.fromhex(done.stdout.decode()) == CONTENT[5:10]


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for url in (str(tmp_path / "none.tar"), f"file://{tmp_path}/none.tar", f"{tmp_path}/a\0b"):
        for use in (Storage(tmp_path).open, Storage(tmp_path).stamp):
            with pytest.raises(DataError, match=r"cannot be read: (No such file|(\w+: )?embedded null)"):
                use(url)
    with pytest.raises(DataError, match="Is a directory"):
        Storage(tmp_path).open(str(tmp_path)).read(0, 1)


def test_what_is_a_url() -> None:
    places = [
        "s3://b/k",
        "HTTPS://h/a",
        "gs://b/k",
        "memory://a",
        "file:///a",
        "pipe:cat a",
        "/a://b",
        "a::s3://b",
        "a.tar",
        "c:/x",
    ]
    assert [is_url(p) for p in places] == [True] * 6 + [False, True, False, False]
    assert [is_remote(p) for p in places] == [True] * 4 + [False] * 3 + [True, False, False]


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("pipe:cat a.tar", "allow that with data.allow_pipe=true"),
        ("ftq://host/a.tar", r"cannot be read; what works: local paths, .*s3://"),
        ("simplecache::s3://bucket/a.tar", "cannot be read"),
        ("zip://a.tar::s3://bucket/a.zip", "cannot be read"),
        ("local:///etc/passwd", "cannot be read"),
    ],
)
def test_what_cannot_be_opened_is_refused_before_anything_is_done(tmp_path: Path, url: str, problem: str) -> None:
    for use in (Storage(tmp_path / "cache").open, Storage(tmp_path / "cache").stamp):
        with pytest.raises(ConfigError, match=problem):
            use(url)
    assert not (tmp_path / "cache").exists()


def test_an_empty_name_of_the_cache_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECURVE_CACHE", "")
    assert default_cache() == Path("~/.cache/onecurve").expanduser()


def test_an_empty_command_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no command"):
        Storage(tmp_path, allow_pipe=True).open("pipe: ")


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hush@host:8080/a.tar",
        "https://hush@host/a.tar",
        "https://host/a.tar?X-Amz-Signature=hush&X-Amz-Credential=hush",
        "pipe:curl -s 'https://me:hush@host/a.tar?sig=hush' | zcat",
        "pipe:curl -H 'Authorization: Bearer hush' https://host/a.tar",
        "pipe:curl -u me:hush https://host/a.tar",
        "pipe:curl --user=me:hush https://host/a.tar",
        "pipe:AWS_SECRET_ACCESS_KEY=hush aws s3 cp s3://bucket/a.tar -",
        "pipe:gsutil -o token=hush cat gs://bucket/a.tar",
        "pipe:wget --password hush -O - https://host/a.tar",
        "pipe:curl -H 'X-Api-Key: hush' https://host/a.tar",
        "pipe:curl -u 'me:hush' https://host/a.tar",
        'pipe:curl -u "me:hush" https://host/a.tar',
        "pipe:curl -ume:hush https://host/a.tar",
        "pipe:TOKEN='hush' MORE=hush ./get a.tar",
        'pipe:curl -H "Authorization: Token hush" https://host/a.tar',
        "pipe:curl -H 'X-Mine: hush' https://host/a.tar",
        'pipe:curl -d \'{"token": "hush"}\' https://host/a.tar',
        "pipe:mysql -phush a.tar",
        "pipe:gpg --passphrase hush -d a.tar",
        "pipe:./get 'hush hush a.tar; cat a.tar",  # a quote without an end
        "https:/me:hush@host/a.tar?sig=hush",
    ],
)
def test_secrets_are_not_shown(url: str) -> None:
    assert "hush" not in shown(url)
    assert shown(url)[:7] == url[:7]
    assert "a.tar" in shown(url)


@pytest.mark.parametrize(
    "url", ["s3://bucket/a=b/x@y.tar", "/data/what?.tar", "https://host:80/a.tar", "pipe:cat /data/tokens/a.tar | zcat"]
)
def test_what_is_no_secret_is_shown(url: str) -> None:
    assert shown(url) == url


def test_commands_whose_words_are_masked_are_told_apart() -> None:
    """By what they do, not by a secret, which another life of a run may have another one of."""
    commands = [f"pipe:curl -u me:hush -H 'Part: {i}' https://host/a.tar" for i in range(9)]
    assert len({shown(command) for command in commands}) == 9
    assert shown(commands[0]) == shown(commands[0].replace("me:hush", "me:changed"))
    assert [shown(shown(command)) for command in commands] == [*map(shown, commands)]


@pytest.mark.parametrize(
    "text",
    [
        "{'token': 'hush'}",
        "curl: -u 'me:hush' is wrong",
        "Authorization: Token hush",
        "password='hush hush'",
        "http:/me:hush@a/b",
    ],
)
def test_secrets_in_the_words_of_others_are_not_shown(text: str) -> None:
    assert "hush" not in without_secrets(text)


# The cache.


def disk_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*/*"):
        with suppress(FileNotFoundError):  # others make and remove them
            total += path.stat().st_size
    return total


def test_the_budget_is_kept_and_what_was_used_last_stays(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), 100_000)
    for number in range(50):
        cache.put("ab", number, bytes([number]) * 9_000)
        os.utime(tmp_path / "ab" / f"ab-{number:08x}", (number, number))
        if number % 5 == 0:  # used by another process between the others
            assert Cache(str(tmp_path), 100_000).get("ab", 0, 0, 1) == b"\0"
        assert disk_bytes(tmp_path) <= 100_000
    assert cache.get("ab", 0, 10, 5) == bytes(5)
    assert cache.get("ab", 49, 0, 9_000) == bytes([49]) * 9_000
    assert cache.get("ab", 1, 0, 5) is None
    assert disk_bytes(tmp_path) > 80_000
    assert not list(tmp_path.glob("*.tmp"))


def test_a_chunk_is_found_by_another_process_and_budgets_hold_for_all_of_them(tmp_path: Path) -> None:
    script = """
import glob, os, sys
from filelock import FileLock
from trainer.data.storage.cache import Cache
cache, who = Cache(sys.argv[1], 300_000), int(sys.argv[2])
for number in range(60):
    cache.put(f"{who}x", number, bytes([who, number]) * 5_000)
    with FileLock(sys.argv[1] + "/.lock"):  # nobody writes meanwhile
        sizes = [os.stat(path).st_size for path in glob.glob(sys.argv[1] + "/*/*")]
    assert sum(sizes) <= 300_000, sizes
    for back in range(number + 1):
        found = cache.get(f"{who}x", back, 100, 50)
        assert found in (None, bytes([who, back]) * 25), found
print(cache.on_disk)
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(who)], stdout=subprocess.PIPE)
        for who in range(3)
    ]
    assert [run.communicate()[0] for run in runs] == [b"True\n"] * 3
    used = disk_bytes(tmp_path)
    assert 200_000 < used <= 300_000
    assert int((tmp_path / ".used").read_text()) == used
    last = max(tmp_path.glob("*/*"), key=lambda path: path.stat().st_mtime_ns)
    key, number = last.name.split("-")
    assert Cache(str(tmp_path), 300_000).get(key, int(number, 16), 0, 2) == bytes([int(key[0]), int(number, 16)])


def test_damaged_chunks_are_not_given_out(tmp_path: Path) -> None:
    chunk = CONTENT[:5000]
    path = tmp_path / "ab" / "ab-00000000"
    for damage in (
        lambda old: old[:-1],
        lambda old: old[:2000] + bytes([old[2000] ^ 1]) + old[2001:],
        lambda old: old + b"x",
        lambda old: b"",
        lambda old: b"x" * len(old),
        lambda old: bytes(len(old)),
    ):
        Cache(str(tmp_path), 100_000).put("ab", 0, chunk)
        assert Cache(str(tmp_path), 100_000).get("ab", 0, 10, 100) == chunk[10:110]
        path.write_bytes(damage(path.read_bytes()))
        fresh = Cache(str(tmp_path), 100_000)
        assert fresh.get("ab", 0, 10, 100) is None
        assert not path.exists()  # so that it is fetched again, and kept


def test_a_chunk_replaced_by_another_process_is_looked_at_again(tmp_path: Path) -> None:
    Cache(str(tmp_path), 100_000).put("ab", 0, CONTENT[:5000])
    cache = Cache(str(tmp_path), 100_000)
    assert cache.get("ab", 0, 10, 100) == CONTENT[10:110]
    path = tmp_path / "ab" / "ab-00000000"
    (tmp_path / "new").write_bytes(path.read_bytes()[:-1] + b"?")
    os.replace(tmp_path / "new", path)
    assert cache.get("ab", 0, 10, 100) is None


def test_what_a_killed_writer_left_is_counted_right(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), 50_000)
    for number in range(3):
        cache.put("ab", number, bytes(9_000))
    (tmp_path / "ab-00000009.tmp").write_bytes(bytes(30_000))
    for told in ("49000", "", "rubbish"):  # too high, cut off, damaged
        (tmp_path / ".used").write_text(told)
        cache.put("ab", 3, bytes(9_000))
        assert cache.get("ab", 0, 0, 1) == b"\0", told
        assert int((tmp_path / ".used").read_text()) == disk_bytes(tmp_path)
        (tmp_path / "ab" / "ab-00000003").unlink()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("place", ["/proc/none", "file/in/a/file", None])
def test_without_a_usable_folder_chunks_are_kept_in_memory(tmp_path: Path, place: str | None) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = Cache(str(tmp_path / place) if place else str(tmp_path / "none"), 1 << 30 if place else 0)
    size = MEMORY_BYTES // 4
    for number in range(6):
        cache.put("ab", number, bytes([number]) * size)
        assert cache.get("ab", number, 7, 3) == bytes([number]) * 3
    assert not cache.on_disk
    assert [cache.has("ab", number) for number in range(6)] == [False, False, True, True, True, True]
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_only_means_no_cache(tmp_path: Path) -> None:
    def limit() -> None:  # files of at most 8,000 bytes: a write fails in the middle, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))

    script = """
import sys
from trainer.data.storage.cache import Cache
cache = Cache(sys.argv[1], 1 << 20)
for number in range(3):
    cache.put("ab", number, bytes([number]) * 9_000)
    assert cache.get("ab", number, 5, 2) == bytes([number]) * 2
print(cache.on_disk)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], preexec_fn=limit, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
    assert disk_bytes(tmp_path) == 0
    assert not list(tmp_path.glob("*.tmp"))


# The pool.


def test_work_of_one_name_is_done_once_and_its_error_comes_to_all() -> None:
    pool, gate, done = Pool(3), threading.Event(), []

    def work() -> bytes:
        gate.wait()
        done.append(1)
        raise DataError("broken")

    pool.foresee("a", work)
    futures = [pool.result("a", work) for _ in range(5)]
    gate.set()
    for future in futures:
        with pytest.raises(DataError, match="broken"):
            future.result(5)
    assert done == [1]
    assert pool.result("a", lambda: b"again").result(5) == b"again"  # a failure is not kept


def test_what_is_waited_for_goes_before_what_was_foreseen_and_what_is_forgotten_is_not_done() -> None:
    pool, gate, order = Pool(1), threading.Event(), []

    def work(name: str) -> bytes:
        gate.wait()
        order.append(name)
        return b""

    first = pool.result("first", lambda: work("first"))
    for name in "abcd":
        pool.foresee(name, lambda name=name: work(name))
    asked = [pool.result(name, lambda name=name: work(name)) for name in ("d", "e")]
    pool.forget(lambda name: name in ("b", "d"))
    gate.set()
    for future in (first, *asked, pool.result("a", lambda: b"")):
        future.result(5)
    time.sleep(0.05)
    assert order[:3] == ["first", "d", "e"]
    assert sorted(order[3:]) == ["a", "c"]


def test_as_many_threads_as_connections_work_also_after_a_rest() -> None:
    pool, most = Pool(4), []
    lock, running = threading.Lock(), []

    def work() -> bytes:
        with lock:
            running.append(1)
            most.append(len(running))
        time.sleep(0.05)
        with lock:
            running.pop()
        return b""

    pool.result("one", work).result(5)
    time.sleep(0.05)  # now one thread rests
    for future in [pool.result(i, work) for i in range(12)]:
        future.result(5)
    assert max(most) == 4


def test_only_so_many_hints_wait() -> None:
    pool, gate, done = Pool(1), threading.Event(), []

    def work(i: int) -> bytes:
        gate.wait()
        done.append(i)
        return b""

    blocker = pool.result("x", lambda: work(-1))
    while not pool._jobs["x"].is_started:
        time.sleep(0.001)
    for i in range(100):
        pool.foresee(i, lambda i=i: work(i), 5)
    gate.set()
    blocker.result(5)
    time.sleep(0.1)
    assert done == [-1, 0, 1, 2, 3, 4]
