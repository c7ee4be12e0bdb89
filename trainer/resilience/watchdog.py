"""Hangs: work that takes far longer than ever before. All ranks report where they are, one sentence says which ranks
hold up which, and the run ends, to be restarted.

A thread of each rank watches what that rank does and since when. The ranks communicate through files in the run
directory: the first rank that notices a hang creates one. The others wait for the rank that hangs, so each looks for
the file only once it is late itself: a healthy run does not use the shared storage for this.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import outage
from trainer.config import schema
from trainer.errors import Crashed
from trainer.files import create_file, replace_file
from trainer.processes import boot_id, start_time
from trainer.resilience.hang_verdict import verdict
from trainer.resilience.stacks import report
from trainer.resilience.time_ledger import TimeLedger
from trainer.run_directory import RunDirectory
from trainer.topology import Topology

LEAST_S = 5.0
LOOK_S = 0.5
GATHER_S = 2.5  # time for the other ranks to report, once one has noticed a hang
STATES = {"T": "is stopped (SIGSTOP)", "D": "is stuck in the kernel (storage that does not answer?)", "Z": "is dead"}


@dataclass(frozen=True)
class Activity:
    """Work that can hang. `now` returns its kind and since when it runs (`time.monotonic()`), or None if it is idle;
    `spells` returns how long that kind took before; `thread` is the name of the thread that does it."""

    now: Callable[[], tuple[str, float] | None]
    spells: Callable[[str], Sequence[float]]
    thread: str


def budget(spells: Sequence[float], config: schema.Watchdog) -> float:
    """Returns the seconds that the next spell may take. The first one of an attempt, which compiles, is ignored."""
    durations = sorted(spells[1:] if len(spells) > 8 else spells)
    if not durations:
        return max(config.first_s, LEAST_S)
    return max(LEAST_S, 3 * durations[min(len(durations) - 1, int(0.99 * len(durations)))]) + config.grace_s


def patience(config: schema.Watchdog) -> float:
    """Returns the seconds after which a rank looks for another's alarm: half of the time that has passed at least when
    there is one, since a rank begins to wait soon after the other begins to hang."""
    return min(budget([], config), LEAST_S + config.grace_s) / 2


@contextmanager
def _ignore_outages() -> Iterator[None]:
    """Ignores an outage of the run's own storage, which is tried again in a moment."""
    try:
        yield
    except OSError as error:
        if not outage.is_outage(error):
            raise


class Watchdog:
    """Watches the main thread, by `clock`, and the `activities` that are added."""

    def __init__(
        self,
        config: schema.Watchdog,
        topology: Topology,
        folder: RunDirectory,
        clock: TimeLedger,
        compiles: bool = False,
    ):
        """`compiles`: any step may have a new shape for torch.compile, and then take as long as the first one."""
        if compiles:
            config = config.model_copy(update={"grace_s": max(config.grace_s, config.first_s)})
        self.config, self.topology, self.folder, self.clock = config, topology, folder, clock
        self._patience = patience(config)
        steps = Activity(
            self._current_step, lambda kind: () if kind == "startup" else clock.seconds(kind), "MainThread"
        )
        self.activities = [steps]
        self.files = folder.path / "logs" / f"hang-{topology.broadcast(uuid.uuid4().hex[:8])}"
        self._outage_file = self.files.with_name(f"{self.files.name}-waits-{topology.rank}")
        self._is_outage_shared = False
        self._stop = threading.Event()
        if not config.enabled:
            return
        # Written by a signal handler of C, which also works while Python's lock is held; read by others through /proc.
        self._stacks_fd = os.memfd_create("stacks") if hasattr(os, "memfd_create") else None
        if self._stacks_fd is not None:
            faulthandler.register(signal.SIGUSR2, file=self._stacks_fd, all_threads=True)
        peer = {"host": socket.gethostname(), "boot": boot_id(), "pid": os.getpid(), "started": start_time(os.getpid())}
        peer["stacks"] = self._stacks_fd
        self.peers: list[dict[str, Any]] = topology.gather(peer)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._is_outage_shared:
            self._outage_file.unlink(missing_ok=True)
        if self.config.enabled and self._stacks_fd is not None:
            faulthandler.unregister(signal.SIGUSR2)
            os.close(self._stacks_fd)
            self._stacks_fd = None

    def _current_step(self) -> tuple[str, float] | None:
        return None if self.clock.is_paused else (self.clock.kind, self.clock.since)

    def _watch(self) -> None:
        try:
            self._watch_activities()
        except OSError as error:  # no report is possible: the other ranks will see that this process is dead
            print(f"\nonecurve: the watchdog cannot use {self.files}: {error}", file=sys.stderr, flush=True)
            os._exit(4)

    def _watch_activities(self) -> None:
        checked_at, excused = time.monotonic(), defaultdict[int, tuple[float, float]](lambda: (0.0, 0.0))
        while not self._stop.wait(LOOK_S):
            with _ignore_outages():
                self._share_outage()
            now = time.monotonic()
            asleep_s, checked_at, oldest = now - checked_at - LOOK_S, now, 0.0
            for number, activity in enumerate(self.activities):
                if (current := activity.now()) is None:
                    continue
                kind, since = current
                oldest = max(oldest, now - since)
                counted_since, excused_s = excused[number]
                excused_s = excused_s if counted_since == since else 0.0
                # This thread did not run either: the whole process was stopped, and goes on.
                excused[number] = since, excused_s + (asleep_s if asleep_s > 1 else 0.0)
                seconds, allowed = now - since - excused[number][1], budget(activity.spells(kind), self.config)
                with _ignore_outages():
                    if seconds > allowed and self._waits_for_data():
                        excused[number] = since, excused[number][1] + seconds
                    elif seconds > allowed:
                        self._raise_alarm(number, seconds, allowed)
            if oldest > self._patience and self._is_alarmed():
                self._end_process()
                return

    def _share_outage(self) -> None:
        """Creates a file while this rank waits for storage, so that the other ranks wait, too."""
        if (is_on := outage.is_ongoing()) != self._is_outage_shared:
            self._outage_file.touch() if is_on else self._outage_file.unlink(missing_ok=True)
            self._is_outage_shared = is_on

    def _is_alarmed(self) -> bool:
        with _ignore_outages():
            return (self.files / "alarm.json").exists()
        return False

    def _waits_for_data(self) -> bool:
        return outage.is_ongoing() or any(self.files.parent.glob(f"{self.files.name}-waits-*"))

    def _raise_alarm(self, number: int, seconds: float, allowed: float) -> None:
        self.files.mkdir(parents=True, exist_ok=True)
        alarm = {"activity": number, "rank": self.topology.rank, "seconds": seconds, "budget": allowed}
        create_file(self.files / "alarm.json", json.dumps(alarm).encode())

    def _end_process(self) -> None:
        """Reports, waits for the other reports, lets one rank announce the verdict, and ends this process."""
        try:
            self._report()
            deadline = time.monotonic() + GATHER_S
            while len(self._reporting_ranks()) < self.topology.world_size and time.monotonic() < deadline:
                time.sleep(0.05)
            ranks = self._reporting_ranks()
            if self.topology.rank == min(ranks, default=self.topology.rank):
                self._announce_verdict(ranks)
            else:
                self._wait_for(self.files / "verdict.txt")
        finally:
            os._exit(4)

    def _report(self) -> None:
        alarm = json.loads((self.files / "alarm.json").read_text())
        activity = self.activities[alarm["activity"]]
        kind, since = activity.now() or ("nothing", time.monotonic())
        contents = {
            "kind": kind,
            "seconds": time.monotonic() - since,
            "step": self.clock.step + 1,
            **report(activity.thread),
        }
        replace_file(self.files / f"rank-{self.topology.rank}.json", json.dumps(contents, indent=1).encode())

    def _reporting_ranks(self) -> list[int]:
        names = [path.stem.removeprefix("rank-") for path in self.files.glob("rank-*.json")]
        return sorted(int(name) for name in names if name.isdigit())

    def _announce_verdict(self, ranks: list[int]) -> None:
        reports = {rank: json.loads((self.files / f"rank-{rank}.json").read_text()) for rank in ranks}
        silent = {rank: self._inspect_rank(rank) for rank in range(self.topology.world_size) if rank not in reports}
        culprits, sentence = verdict(reports, silent)
        alarm = json.loads((self.files / "alarm.json").read_text())
        reason = f"hang: {sentence}. Stacks: {self.files}"
        self.folder.fail(culprits[0], Crashed(reason), lost_peer=False, step=self.clock.step)
        allowed = f"after {alarm['seconds']:.1f} s, where {alarm['budget']:.1f} s were allowed"
        print(f"\nonecurve: {reason} ({allowed})", file=sys.stderr, flush=True)
        (self.files / "verdict.txt").write_text(sentence + "\n")
        for rank in silent:
            if self._is_local_process(rank):
                with suppress(OSError):
                    os.kill(self.peers[rank]["pid"], signal.SIGKILL)

    def _inspect_rank(self, rank: int) -> str:
        """Describes what can be seen from outside of a rank that does not report."""
        if not self._is_local_process(rank):
            return f"does not answer (host {self.peers[rank]['host']})"
        peer = self.peers[rank]
        try:
            state = Path(f"/proc/{peer['pid']}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "is dead"
        if state in STATES:
            return STATES[state]
        with suppress(OSError):
            os.kill(peer["pid"], signal.SIGUSR2)
            time.sleep(0.3)
            stacks = Path(f"/proc/{peer['pid']}/fd/{peer['stacks']}").read_text()
            (self.files / f"rank-{rank}.txt").write_text(stacks)
            place = next((line for line in stacks.split("Current thread")[-1].splitlines() if "File" in line), "")
            return f"holds Python's lock in foreign code, at {place.strip()}" if place else "does not answer"
        return "does not answer"

    def _is_local_process(self, rank: int) -> bool:
        this_peer, peer = self.peers[self.topology.rank], self.peers[rank]
        same_machine = (this_peer["host"], this_peer["boot"]) == (peer["host"], peer["boot"])
        return same_machine and start_time(peer["pid"]) == peer["started"]

    @staticmethod
    def _wait_for(path: Path) -> None:
        deadline = time.monotonic() + 2 * GATHER_S
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
