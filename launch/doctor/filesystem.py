"""Examines the folder of runs: whether all see what one writes, how fast it is, what its file system supports."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from filelock import Timeout

from launch.doctor.verdict import Finding
from launch.sizes import size
from trainer import leases, locks
from trainer.processes import remove_afterwards
from trainer.topology import Topology

GIB, MIB = 1 << 30, 1 << 20
LARGE = 64 * MIB
SEE_S, QUICK_SEE_S, SLOW_S = 10.0, 3.0, 2.0  # how long others may take to see a file, and the warning threshold
FSYNC_WARNS_S = 0.5
FEW_FILES = 1000
WRITE_WARNS = 50e6  # bytes a second
CLOCK_WARNS_S = 2.0
TAKEN = "held by another process"
FULL, NEARLY = GIB, 10 * GIB


def measure(topology: Topology, folder: Path, quick: bool, takes_part: bool) -> dict[str, Any]:
    """Measures `folder` from this rank, or the nearest one above it that exists. Leaves nothing behind there."""
    base, limit_s = folder, QUICK_SEE_S if quick else SEE_S
    while not base.exists() and base != base.parent:
        base = base.parent
    result: dict[str, Any] = {"rank": topology.rank, "takes_part": takes_part, "folder": str(base), **space(base)}
    probe = base / topology.broadcast(f".onecurve-doctor-{secrets.token_hex(6)}")
    problem = _error_of(probe.mkdir) if topology.is_main else ""
    if topology.is_main and not problem:
        remove_afterwards(probe)  # also when a check hangs and is ended
    if topology.broadcast(problem):
        return result | ({"problem": problem} if problem else {"skipped": True})
    try:
        sees_probe = takes_part and (topology.is_main or wait_for_path(probe, limit_s) is not None)
        if takes_part and not sees_probe:
            result["blind"] = True
        rank_file = probe / f"rank-{topology.rank}"
        if sees_probe:
            result |= write(rank_file, quick)
        writers = [rank for rank, ok in enumerate(topology.gather(sees_probe and "problem" not in result)) if ok]
        if sees_probe and writers:
            expected = writers if topology.is_main else writers[:1]
            times = {rank: wait_for_path(probe / f"rank-{rank}", limit_s, rank=rank) for rank in expected}
            result["not_seen"] = [rank for rank, seconds in times.items() if seconds is None]
            result["seen_s"] = max((seconds for seconds in times.values() if seconds is not None), default=0.0)
        if topology.rank in writers:
            result["link"] = link(rank_file, probe / "first")
        topology.barrier()
        result |= lock(topology, probe / "lock", sees_probe, writers)
        return result
    finally:
        topology.barrier()
        if topology.is_main:
            shutil.rmtree(probe, ignore_errors=True)


def space(base: Path) -> dict[str, Any]:
    stats = os.statvfs(base)
    kind = filesystem(base)
    return {"free": stats.f_bavail * stats.f_frsize, "files": stats.f_favail if stats.f_files else None, "type": kind}


def filesystem(path: Path) -> str:
    """Returns the type of the file system that holds the path: ext4, nfs4, lustre, ..."""
    path, closest = path.resolve(), ("", "unknown")
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, source = line.partition(" - ")
            point = fields.split()[4].encode().decode("unicode_escape")
            if path.is_relative_to(point) and len(point) >= len(closest[0]):
                closest = (point, source.split()[0])
    return closest[1]


def write(path: Path, quick: bool) -> dict[str, Any]:
    """Writes a file as a checkpoint is written (temporary file, fsync, rename). Returns times in seconds."""
    temporary, times = path.with_suffix(".tmp"), []
    try:
        for _ in range(5):
            with open(temporary, "wb") as file:
                file.write(str(path.name).encode())
                file.flush()
                start = time.perf_counter()
                os.fsync(file.fileno())
                times.append(time.perf_counter() - start)
        result: dict[str, Any] = {"fsync_s": median(times), "clock": os.stat(temporary).st_mtime - time.time()}
        os.replace(temporary, path)
        if problem := _error_of(lambda: _sync_folder(path.parent)):
            result["names"] = problem
        if not quick and space(path.parent)["free"] > 10 * LARGE:
            content, start = os.urandom(MIB), time.perf_counter()
            with open(temporary, "wb") as file:
                for _ in range(LARGE // MIB):
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            result["write"] = LARGE / (time.perf_counter() - start)
            temporary.unlink()
    except OSError as error:
        return {"problem": _message(error)}
    return result


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def wait_for_path(path: Path, limit_s: float, rank: int | None = None) -> float | None:
    """Waits until `path` exists (and holds what `rank` wrote). Returns the seconds; None if the limit was reached."""
    start = time.monotonic()
    while True:
        with suppress(OSError):
            if path.is_dir() if rank is None else path.read_bytes() == f"rank-{rank}".encode():
                return time.monotonic() - start
        if time.monotonic() > start + limit_s:
            return None
        time.sleep(0.02)


def link(rank_file: Path, common: Path) -> str:
    """Makes a hard link that all ranks try. Returns `won` to one, `lost` to the others, else what went wrong."""
    try:
        os.link(rank_file, common)
    except FileExistsError:
        return "lost"
    except OSError as error:
        return _message(error)
    return "won"


def lock(topology: Topology, path: Path, sees_folder: bool, writers: Sequence[int]) -> dict[str, Any]:
    """Tests locking: rank 0 holds a lock that no other rank may get; afterwards the last writer must get it. Also
    returns whether locks are leases instead of the kernel's flock."""
    if not writers:
        return {}
    acquired: list[locks.Lock] = []
    has_flock, problem = True, ""

    def try_lock(seconds: float) -> str:
        return _error_of(lambda: locks.acquire(path, seconds).release())

    if topology.is_main:
        problem = _error_of(lambda: acquired.append(locks.acquire(path, 1)))
    topology.barrier()
    if sees_folder and not topology.is_main and (error := try_lock(0)) != TAKEN:
        problem = error or "two processes get the same lock"
    topology.barrier()
    for main_lock in acquired:
        main_lock.release()
    topology.barrier()
    if topology.rank == writers[-1]:
        problem = problem or try_lock(2)
    if sees_folder and not problem:
        with suppress(OSError):
            has_flock = locks.has_flock(path)
    return {"lock": problem} if problem else {"leases": not has_flock} if sees_folder else {}


def judge(results: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Finding]:
    """Returns findings. `results`: those of `measure` by rank. `names`: the node of each rank."""
    first = results[0]
    where = f"{first['folder']} ({first['type']})"
    findings: list[Finding] = []

    def add(verdict: Any, message: str, advice: str, rank: int) -> None:
        findings.append(Finding("folder", verdict, message, advice, (names[rank],)))

    if "problem" in first:
        add("bad", f"{where} cannot be written: {first['problem']}", "choose another with --dir and run.dir", 0)
    unseen = first.get("not_seen", [])
    wins = sum(result.get("link") == "won" for result in results)
    for result in results:
        rank = result["rank"]
        process = f"rank {rank} on {names[rank]}"
        if result.get("blind"):
            folder = "" if result["folder"] == first["folder"] else f" (it looked in {result['folder']})"
            add(
                "bad",
                f"{process} does not see what rank 0 makes in {where}{folder}",
                "mount the same storage on it",
                rank,
            )
        elif rank and "problem" in result:
            add(
                "bad",
                f"{process} cannot write to {where}: {result['problem']}",
                "see to its mount and permissions",
                rank,
            )
        elif rank and result.get("not_seen"):
            add("bad", f"{process} sees the folder but not the file of rank 0 in it", "see to its mount", rank)
        elif rank in unseen:
            add("bad", f"what {process} writes to {where} is not seen by rank 0", "see to its mount", rank)
        if result.get("link") not in (None, "won", "lost"):
            add("warning", f"{process}: no hard links in {where}: {result['link']}",
                "files are created exclusively instead", rank)  # fmt: skip
        if result.get("lock"):
            advice = "two runs in one folder would go unnoticed; Lustre: mount with -o flock, NFS: run lockd"
            add("bad", f"{process}: file locks do not work in {where}: {result['lock']}", advice, rank)
        if abs(result.get("clock", 0.0)) > CLOCK_WARNS_S:
            message = f"{process}: files it writes are dated {result['clock']:+.1f} s off its clock"
            add("warning", message, "start chrony or ntpd on the node and the file server", rank)
    findings += _judge_features(results, names, where)
    if wins > 1:
        findings.append(
            Finding("folder", "bad", f"{wins} processes made the same hard link in {where}", "choose another")
        )
    if not findings and any(result.get("fsync_s") is not None for result in results):
        findings.append(
            Finding("folder", "good", f"{where}: written, renamed, linked, locked by all, {_visibility(results)}")
        )
    return findings + _judge_speed(results, names) + _judge_space(results, names)


def _judge_features(results: Sequence[dict[str, Any]], names: Sequence[str], where: str) -> list[Finding]:
    """Returns findings about what the file system does not support."""
    findings = []
    if nodes := _nodes_with(results, names, "leases"):
        message = f"{where} has no flock"
        if any(result.get("leases") is False for result in results):
            message += " on these nodes, and has it on others: two runs in one folder would not see each other"
            findings.append(Finding("folder", "bad", message, "Lustre: mount with -o flock on every node", nodes))
        else:
            message += (
                f": a lock is a lease, which is taken over {leases.LEASE_S:g} s after its process or node is gone"
            )
            advice = "Lustre: mount with -o flock on every node, then a lock ends with its process"
            findings.append(Finding("folder", "warning", message, advice, nodes))
    if nodes := _nodes_with(results, names, "names"):
        problem = next(result["names"] for result in results if result.get("names"))
        message = f"the names in {where} cannot be made durable (fsync of a folder): {problem}"
        advice = "after a power cut the newest checkpoint may be missing, and the one before it is taken"
        findings.append(Finding("folder", "warning", message, advice, nodes))
    return findings


def _nodes_with(results: Sequence[dict[str, Any]], names: Sequence[str], key: str) -> tuple[str, ...]:
    """Returns the nodes of the ranks whose result has this key."""
    return tuple(dict.fromkeys(names[result["rank"]] for result in results if result.get(key)))


def _visibility(results: Sequence[dict[str, Any]]) -> str:
    count, seconds = (
        sum(result["takes_part"] for result in results),
        max(result.get("seen_s", 0.0) for result in results),
    )
    return f"seen by {count} processes within {seconds:.2f} s"


def _judge_speed(results: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Finding]:
    syncs = {result["rank"]: result["fsync_s"] for result in results if "fsync_s" in result}
    if not syncs:
        return []
    findings, slowest = [], max(syncs, key=lambda rank: syncs[rank])
    message = f"fsync takes {1000 * median(syncs.values()):.2g} ms"
    writes = [result["write"] for result in results if "write" in result]
    if writes:
        message += f", writing {size(LARGE)} {size(sum(writes))}/s by {len(writes)} at once"
    late_ranks = [result["rank"] for result in results if result.get("seen_s", 0.0) > SLOW_S]
    if late_ranks:
        latest = max(result.get("seen_s", 0.0) for result in results)
        advice = "a cache of names: mount with a smaller actimeo (NFS)"
        findings.append(Finding("folder", "warning", f"a new file is seen only after {latest:.1f} s", advice,
                                tuple(dict.fromkeys(names[rank] for rank in late_ranks))))  # fmt: skip
    if syncs[slowest] > FSYNC_WARNS_S or (writes and sum(writes) < WRITE_WARNS):
        message += f"; slowest: rank {slowest} on {names[slowest]}, {1000 * syncs[slowest]:.2g} ms"
        return [
            *findings,
            Finding("folder", "warning", message, "save less often (checkpoint.every), or to faster storage"),
        ]
    return [*findings, Finding("folder", "good", message)]


def _judge_space(results: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Finding]:
    least = min(results, key=lambda result: (not _has_few_files(result), result["free"]))
    message = f"{size(least['free'])} are free in {least['folder']}"
    has_few_files = _has_few_files(least)
    if has_few_files:
        message += f", and room for {least['files']} files"
    if least["free"] < FULL or has_few_files:
        advice = "make room: `onecurve checkpoint prune RUN_DIR`, or choose another run.dir"
        return [Finding("disk", "bad", message, advice, (names[least["rank"]],))]
    if least["free"] < NEARLY:
        return [Finding("disk", "warning", message, "`onecurve plan` says what a run needs")]
    return [Finding("disk", "good", message)]


def _has_few_files(result: dict[str, Any]) -> bool:
    return result["files"] is not None and result["files"] < FEW_FILES


def _error_of(action: Any) -> str:
    """Runs the action. Returns the error of the file system; empty if there is none."""
    try:
        action()
    except Timeout:
        return TAKEN
    except (OSError, NotImplementedError) as error:
        return _message(error)
    return ""


def _message(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
