"""The folder that runs are written to: whether all see what one writes, how fast it is, what its file system can."""

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
SEE_S, QUICK_SEE_S, SLOW_S = 10.0, 3.0, 2.0  # how long others may take to see a file, and from when on that is told
FSYNC_WARNS_S = 0.5
FEW_FILES = 1000
WRITE_WARNS = 50e6  # bytes a second
CLOCK_WARNS_S = 2.0
TAKEN = "held by another process"
FULL, NEARLY = GIB, 10 * GIB


def measure(topology: Topology, folder: Path, quick: bool, takes_part: bool) -> dict[str, Any]:
    """What this rank found of `folder`, or of the nearest one above it that exists. Leaves nothing behind there."""
    base, limit_s = folder, QUICK_SEE_S if quick else SEE_S
    while not base.exists() and base != base.parent:
        base = base.parent
    mine: dict[str, Any] = {"rank": topology.rank, "takes_part": takes_part, "folder": str(base), **space(base)}
    place = base / topology.broadcast(f".onecurve-doctor-{secrets.token_hex(6)}")
    problem = _tried(place.mkdir) if topology.is_main else ""
    if topology.is_main and not problem:
        remove_afterwards(place)  # also when a check hangs and is ended
    if topology.broadcast(problem):
        return mine | ({"problem": problem} if problem else {"skipped": True})
    try:
        here = takes_part and (topology.is_main or waited(place, limit_s) is not None)
        if takes_part and not here:
            mine["blind"] = True
        own = place / f"rank-{topology.rank}"
        if here:
            mine |= write(own, quick)
        wrote = [rank for rank, ok in enumerate(topology.gather(here and "problem" not in mine)) if ok]
        if here and wrote:
            expected = wrote if topology.is_main else wrote[:1]
            times = {rank: waited(place / f"rank-{rank}", limit_s, of=rank) for rank in expected}
            mine["not_seen"] = [rank for rank, took in times.items() if took is None]
            mine["seen_s"] = max((took for took in times.values() if took is not None), default=0.0)
        if topology.rank in wrote:
            mine["link"] = link(own, place / "first")
        topology.barrier()
        mine |= lock(topology, place / "lock", here, wrote)
        return mine
    finally:
        topology.barrier()
        if topology.is_main:
            shutil.rmtree(place, ignore_errors=True)


def space(base: Path) -> dict[str, Any]:
    there = os.statvfs(base)
    kind = filesystem(base)
    return {"free": there.f_bavail * there.f_frsize, "files": there.f_favail if there.f_files else None, "type": kind}


def filesystem(path: Path) -> str:
    """The type of the mount that holds it: ext4, nfs4, lustre, ..."""
    path, best = path.resolve(), ("", "unknown")
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, after = line.partition(" - ")
            point = fields.split()[4].encode().decode("unicode_escape")
            if path.is_relative_to(point) and len(point) >= len(best[0]):
                best = (point, after.split()[0])
    return best[1]


def write(path: Path, quick: bool) -> dict[str, Any]:
    """Writes as a checkpoint is: beside, synced, renamed. Times in seconds."""
    beside, times = path.with_suffix(".tmp"), []
    try:
        for _ in range(5):
            with open(beside, "wb") as file:
                file.write(str(path.name).encode())
                file.flush()
                began = time.perf_counter()
                os.fsync(file.fileno())
                times.append(time.perf_counter() - began)
        found: dict[str, Any] = {"fsync_s": median(times), "clock": os.stat(beside).st_mtime - time.time()}
        os.replace(beside, path)
        if problem := _tried(lambda: _sync_names(path.parent)):
            found["names"] = problem
        if not quick and space(path.parent)["free"] > 10 * LARGE:
            content, began = os.urandom(MIB), time.perf_counter()
            with open(beside, "wb") as file:
                for _ in range(LARGE // MIB):
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            found["write"] = LARGE / (time.perf_counter() - began)
            beside.unlink()
    except OSError as error:
        return {"problem": _said(error)}
    return found


def _sync_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def waited(path: Path, limit_s: float, of: int | None = None) -> float | None:
    """Seconds until `path` is there (and holds what rank `of` wrote); None if it is not within the limit."""
    began = time.monotonic()
    while True:
        with suppress(OSError):
            if path.is_dir() if of is None else path.read_bytes() == f"rank-{of}".encode():
                return time.monotonic() - began
        if time.monotonic() > began + limit_s:
            return None
        time.sleep(0.02)


def link(own: Path, common: Path) -> str:
    """`won` for one of all, `lost` for the others, else what went wrong."""
    try:
        os.link(own, common)
    except FileExistsError:
        return "lost"
    except OSError as error:
        return _said(error)
    return "won"


def lock(topology: Topology, path: Path, here: bool, wrote: Sequence[int]) -> dict[str, Any]:
    """Rank 0 holds a lock, which nobody else may get; then the last one that wrote must. Also whether that is the
    kernel's."""
    if not wrote:
        return {}
    held: list[locks.Lock] = []
    kernels, problem = True, ""

    def get(seconds: float) -> str:
        return _tried(lambda: locks.acquire(path, seconds).release())

    if topology.is_main:
        problem = _tried(lambda: held.append(locks.acquire(path, 1)))
    topology.barrier()
    if here and not topology.is_main and (refused := get(0)) != TAKEN:
        problem = refused or "two processes get the same lock"
    topology.barrier()
    for mine in held:
        mine.release()
    topology.barrier()
    if topology.rank == wrote[-1]:
        problem = problem or get(2)
    if here and not problem:
        with suppress(OSError):
            kernels = locks.has_flock(path)
    return {"lock": problem} if problem else {"leases": not kernels} if here else {}


def judge(measured: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Finding]:
    """`measured`: of each rank. `names`: its node."""
    first = measured[0]
    where = f"{first['folder']} ({first['type']})"
    findings: list[Finding] = []

    def add(verdict: Any, told: str, advice: str, rank: int) -> None:
        findings.append(Finding("folder", verdict, told, advice, (names[rank],)))

    if "problem" in first:
        add("bad", f"{where} cannot be written: {first['problem']}", "choose another with --dir and run.dir", 0)
    unseen = first.get("not_seen", [])
    wins = sum(mine.get("link") == "won" for mine in measured)
    for mine in measured:
        rank = mine["rank"]
        who = f"rank {rank} on {names[rank]}"
        if mine.get("blind"):
            other = "" if mine["folder"] == first["folder"] else f" (it looked in {mine['folder']})"
            add("bad", f"{who} does not see what rank 0 makes in {where}{other}", "mount the same storage on it", rank)
        elif rank and "problem" in mine:
            add("bad", f"{who} cannot write to {where}: {mine['problem']}", "see to its mount and permissions", rank)
        elif rank and mine.get("not_seen"):
            add("bad", f"{who} sees the folder but not the file of rank 0 in it", "see to its mount", rank)
        elif rank in unseen:
            add("bad", f"what {who} writes to {where} is not seen by rank 0", "see to its mount", rank)
        if mine.get("link") not in (None, "won", "lost"):
            add("warning", f"{who}: no hard links in {where}: {mine['link']}",
                "files are created exclusively instead", rank)  # fmt: skip
        if mine.get("lock"):
            advice = "two runs in one folder would go unnoticed; Lustre: mount with -o flock, NFS: run lockd"
            add("bad", f"{who}: file locks do not work in {where}: {mine['lock']}", advice, rank)
        if abs(mine.get("clock", 0.0)) > CLOCK_WARNS_S:
            told = f"{who}: files it writes are dated {mine['clock']:+.1f} s off its clock"
            add("warning", told, "start chrony or ntpd on the node and the file server", rank)
    findings += _lacking(measured, names, where)
    if wins > 1:
        findings.append(
            Finding("folder", "bad", f"{wins} processes made the same hard link in {where}", "choose another")
        )
    if not findings and any(mine.get("fsync_s") is not None for mine in measured):
        findings.append(
            Finding("folder", "good", f"{where}: written, renamed, linked, locked by all, {_seen(measured)}")
        )
    return findings + _speed(measured, names) + _room(measured, names)


def _lacking(measured: Sequence[dict[str, Any]], names: Sequence[str], where: str) -> list[Finding]:
    """What the file system does not have, and what is done without."""
    findings = []
    if without := _nodes(measured, names, "leases"):
        told = f"{where} has no flock"
        if any(mine.get("leases") is False for mine in measured):
            told += " on these nodes, and has it on others: two runs in one folder would not see each other"
            findings.append(Finding("folder", "bad", told, "Lustre: mount with -o flock on every node", without))
        else:
            told += f": a lock is a lease, which is taken over {leases.LEASE_S:g} s after its process or node is gone"
            advice = "Lustre: mount with -o flock on every node, then a lock ends with its process"
            findings.append(Finding("folder", "warning", told, advice, without))
    if without := _nodes(measured, names, "names"):
        problem = next(mine["names"] for mine in measured if mine.get("names"))
        told = f"the names in {where} cannot be made durable (fsync of a folder): {problem}"
        advice = "after a power cut the newest checkpoint may be missing, and the one before it is taken"
        findings.append(Finding("folder", "warning", told, advice, without))
    return findings


def _nodes(measured: Sequence[dict[str, Any]], names: Sequence[str], what: str) -> tuple[str, ...]:
    """Returns the nodes of the ranks that found this."""
    return tuple(dict.fromkeys(names[mine["rank"]] for mine in measured if mine.get(what)))


def _seen(measured: Sequence[dict[str, Any]]) -> str:
    count, took = sum(mine["takes_part"] for mine in measured), max(mine.get("seen_s", 0.0) for mine in measured)
    return f"seen by {count} processes within {took:.2f} s"


def _speed(measured: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Finding]:
    syncs = {mine["rank"]: mine["fsync_s"] for mine in measured if "fsync_s" in mine}
    if not syncs:
        return []
    findings, worst = [], max(syncs, key=lambda rank: syncs[rank])
    told = f"fsync takes {1000 * median(syncs.values()):.2g} ms"
    writes = [mine["write"] for mine in measured if "write" in mine]
    if writes:
        told += f", writing {size(LARGE)} {size(sum(writes))}/s by {len(writes)} at once"
    late = [mine["rank"] for mine in measured if mine.get("seen_s", 0.0) > SLOW_S]
    if late:
        seen = max(mine.get("seen_s", 0.0) for mine in measured)
        advice = "a cache of names: mount with a smaller actimeo (NFS)"
        findings.append(Finding("folder", "warning", f"a new file is seen only after {seen:.1f} s", advice,
                                tuple(dict.fromkeys(names[rank] for rank in late))))  # fmt: skip
    if syncs[worst] > FSYNC_WARNS_S or (writes and sum(writes) < WRITE_WARNS):
        told += f"; slowest: rank {worst} on {names[worst]}, {1000 * syncs[worst]:.2g} ms"
        return [
            *findings,
            Finding("folder", "warning", told, "save less often (checkpoint.every), or to faster storage"),
        ]
    return [*findings, Finding("folder", "good", told)]


def _room(measured: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Finding]:
    least = min(measured, key=lambda mine: (not _few(mine), mine["free"]))
    told = f"{size(least['free'])} are free in {least['folder']}"
    few = _few(least)
    if few:
        told += f", and room for {least['files']} files"
    if least["free"] < FULL or few:
        advice = "make room: `onecurve checkpoint prune RUN_DIR`, or choose another run.dir"
        return [Finding("disk", "bad", told, advice, (names[least["rank"]],))]
    if least["free"] < NEARLY:
        return [Finding("disk", "warning", told, "`onecurve plan` says what a run needs")]
    return [Finding("disk", "good", told)]


def _few(mine: dict[str, Any]) -> bool:
    return mine["files"] is not None and mine["files"] < FEW_FILES


def _tried(action: Any) -> str:
    """What the file system has against it; empty if nothing."""
    try:
        action()
    except Timeout:
        return TAKEN
    except (OSError, NotImplementedError) as error:
        return _said(error)
    return ""


def _said(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
