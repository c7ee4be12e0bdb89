"""Hangs: what takes far longer than it ever did. All ranks tell where they are, one sentence says who holds up whom,
and the run ends, to be restarted.

A thread of each rank looks at what that rank does and since when. The ranks find each other through files in the run's
folder: whoever notices first makes one. The others wait for the rank that hangs, so each looks for that file only once
it is late itself: a run that goes on asks nothing of the storage that all ranks share.
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
GATHER_S = 2.5  # what the others get to report, once one has noticed a hang
STATES = {"T": "is stopped (SIGSTOP)", "D": "is stuck in the kernel (storage that does not answer?)", "Z": "is dead"}


@dataclass(frozen=True)
class Activity:
    """Something that can hang. `now`: what it is and since when (`time.monotonic()`), None if nothing goes on.
    `spells`: how long that took before. `thread`: the name of the thread that does it."""

    now: Callable[[], tuple[str, float] | None]
    spells: Callable[[str], Sequence[float]]
    thread: str


def budget(spells: Sequence[float], config: schema.Watchdog) -> float:
    """Seconds that the next spell may take. The first of a life does not count: it compiles, connects, fills caches."""
    known = sorted(spells[1:] if len(spells) > 8 else spells)
    if not known:
        return max(config.first_s, LEAST_S)
    return max(LEAST_S, 3 * known[min(len(known) - 1, int(0.99 * len(known)))]) + config.grace_s


def patience(config: schema.Watchdog) -> float:
    """Seconds after which a rank looks for another's alarm: half of what has passed at least when there is one, since
    what a rank waits in began soon after what the other hangs in."""
    return min(budget([], config), LEAST_S + config.grace_s) / 2


@contextmanager
def _patient() -> Iterator[None]:
    """The run's own storage may be away as well: it is looked at again in a moment."""
    try:
        yield
    except OSError as error:
        if not outage.is_outage(error):
            raise


class Watchdog:
    """Looks after what the main thread does, by `clock`, and after the `activities` that are added."""

    def __init__(
        self,
        config: schema.Watchdog,
        topology: Topology,
        folder: RunDirectory,
        clock: TimeLedger,
        compiles: bool = False,
    ):
        """`compiles`: any step may meet a shape that is new to torch.compile, and take as long as the first one."""
        if compiles:
            config = config.model_copy(update={"grace_s": max(config.grace_s, config.first_s)})
        self.config, self.topology, self.folder, self.clock = config, topology, folder, clock
        self._patience = patience(config)
        steps = Activity(self._step, lambda kind: () if kind == "startup" else clock.seconds(kind), "MainThread")
        self.activities = [steps]
        self.files = folder.path / "logs" / f"hang-{topology.broadcast(uuid.uuid4().hex[:8])}"
        self._outage = self.files.with_name(f"{self.files.name}-waits-{topology.rank}")
        self._outage_told = False
        self._stop = threading.Event()
        if not config.enabled:
            return
        # Written by a signal handler of C, which also works while Python's lock is held; read by others through /proc.
        self._stacks = os.memfd_create("stacks") if hasattr(os, "memfd_create") else None
        if self._stacks is not None:
            faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        me = {"host": socket.gethostname(), "boot": boot_id(), "pid": os.getpid(), "started": start_time(os.getpid())}
        me["stacks"] = self._stacks
        self.peers: list[dict[str, Any]] = topology.gather(me)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._outage_told:
            self._outage.unlink(missing_ok=True)
        if self.config.enabled and self._stacks is not None:
            faulthandler.unregister(signal.SIGUSR2)
            os.close(self._stacks)
            self._stacks = None

    def _step(self) -> tuple[str, float] | None:
        return None if self.clock.waits else (self.clock.kind, self.clock.since)

    def _watch(self) -> None:
        try:
            self._look()
        except OSError as error:  # no word can be left for the others: they will find this process gone
            print(f"\nonecurve: the watchdog cannot use {self.files}: {error}", file=sys.stderr, flush=True)
            os._exit(4)

    def _look(self) -> None:
        looked, forgiven = time.monotonic(), defaultdict[int, tuple[float, float]](lambda: (0.0, 0.0))
        while not self._stop.wait(LOOK_S):
            with _patient():
                self._tell_of_outage()
            now = time.monotonic()
            asleep, looked, oldest = now - looked - LOOK_S, now, 0.0
            for number, activity in enumerate(self.activities):
                if (current := activity.now()) is None:
                    continue
                kind, since = current
                oldest = max(oldest, now - since)
                begun, lost = forgiven[number]
                lost = lost if begun == since else 0.0
                # This thread did not run either: the whole process was stopped, and goes on.
                forgiven[number] = since, lost + (asleep if asleep > 1 else 0.0)
                seconds, may = now - since - forgiven[number][1], budget(activity.spells(kind), self.config)
                with _patient():
                    if seconds > may and self._waits_for_data():
                        forgiven[number] = since, forgiven[number][1] + seconds
                    elif seconds > may:
                        self._alarm(number, seconds, may)
            if oldest > self._patience and self._is_alarmed():
                self._end()
                return

    def _tell_of_outage(self) -> None:
        """While this rank waits for storage, all others are patient, too."""
        if (is_on := outage.is_ongoing()) != self._outage_told:
            self._outage.touch() if is_on else self._outage.unlink(missing_ok=True)
            self._outage_told = is_on

    def _is_alarmed(self) -> bool:
        with _patient():
            return (self.files / "alarm.json").exists()
        return False

    def _waits_for_data(self) -> bool:
        return outage.is_ongoing() or any(self.files.parent.glob(f"{self.files.name}-waits-*"))

    def _alarm(self, number: int, seconds: float, may: float) -> None:
        self.files.mkdir(parents=True, exist_ok=True)
        word = {"activity": number, "rank": self.topology.rank, "seconds": seconds, "budget": may}
        create_file(self.files / "alarm.json", json.dumps(word).encode())

    def _end(self) -> None:
        """Reports, waits for the others, lets one speak, ends this process."""
        try:
            self._report()
            deadline = time.monotonic() + GATHER_S
            while len(self._reported()) < self.topology.world_size and time.monotonic() < deadline:
                time.sleep(0.05)
            reported = self._reported()
            if self.topology.rank == min(reported, default=self.topology.rank):
                self._speak(reported)
            else:
                self._wait_for(self.files / "verdict.txt")
        finally:
            os._exit(4)

    def _report(self) -> None:
        alarm = json.loads((self.files / "alarm.json").read_text())
        activity = self.activities[alarm["activity"]]
        kind, since = activity.now() or ("nothing", time.monotonic())
        told = {
            "kind": kind,
            "seconds": time.monotonic() - since,
            "step": self.clock.step + 1,
            **report(activity.thread),
        }
        replace_file(self.files / f"rank-{self.topology.rank}.json", json.dumps(told, indent=1).encode())

    def _reported(self) -> list[int]:
        names = [path.stem.removeprefix("rank-") for path in self.files.glob("rank-*.json")]
        return sorted(int(name) for name in names if name.isdigit())

    def _speak(self, reported: list[int]) -> None:
        reports = {rank: json.loads((self.files / f"rank-{rank}.json").read_text()) for rank in reported}
        silent = {rank: self._look_at(rank) for rank in range(self.topology.world_size) if rank not in reports}
        culprits, sentence = verdict(reports, silent)
        alarm = json.loads((self.files / "alarm.json").read_text())
        reason = f"hang: {sentence}. Stacks: {self.files}"
        self.folder.fail(culprits[0], Crashed(reason), lost_peer=False, step=self.clock.step)
        allowed = f"after {alarm['seconds']:.1f} s, where {alarm['budget']:.1f} s were allowed"
        print(f"\nonecurve: {reason} ({allowed})", file=sys.stderr, flush=True)
        (self.files / "verdict.txt").write_text(sentence + "\n")
        for rank in silent:
            if self._near(rank):
                with suppress(OSError):
                    os.kill(self.peers[rank]["pid"], signal.SIGKILL)

    def _look_at(self, rank: int) -> str:
        """What can be seen from outside of a rank that says nothing."""
        if not self._near(rank):
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

    def _near(self, rank: int) -> bool:
        mine, its = self.peers[self.topology.rank], self.peers[rank]
        same_machine = (mine["host"], mine["boot"]) == (its["host"], its["boot"])
        return same_machine and start_time(its["pid"]) == its["started"]

    @staticmethod
    def _wait_for(path: Path) -> None:
        deadline = time.monotonic() + 2 * GATHER_S
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
