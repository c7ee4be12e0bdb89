"""Keeps a run alive on this machine: starts its ranks, restarts them from the newest checkpoint, ends all together.

A restart is paid from a budget that each new checkpoint fills up. A process that fails again and again is left out, and
the run goes on with fewer.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast

import yaml

from launch import failure
from onecurve.paths import python
from trainer.config import Config
from trainer.config.launch import Local
from trainer.config.validate import validate
from trainer.errors import ConfigError
from trainer.tracking.jsonl import STATUS, read_status

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
PEERS_S = 3.0  # what the other ranks get to end by themselves, once one has told why it failed
TOGETHER_S = 0.05  # ranks that are killed within this time were killed together
STRIKES = 2  # lives in a row, without a new checkpoint, that a process may be the first to fail in
LONGEST_PAUSE_S = 30.0
LOST = -1  # instead of a rank, in a life's codes: all were killed together with their server


class Ranks:
    """The processes of a run, forked by a server (launch/forkserver.py) that is as old as this object."""

    def __init__(self, procs: int, output: IO[bytes] | None = None):
        """`procs`: at most. `output`: where all of them write, if not where this process does."""
        if sys.platform != "linux":
            raise ConfigError(
                "onecurve train needs Linux; here: torchrun --standalone --nproc-per-node N -m trainer ..."
            )
        self.procs = procs
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // procs)))
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(
                [*python("launch.forkserver"), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdout=output,
                stderr=output,
            )
        self._unread = b""

    def start(
        self, arguments: list[str], slots: list[int], restart: int, environment: Mapping[str, str] | None = None
    ) -> None:
        """One rank on each slot: of GPUs, the one that has its number. `environment`: what ranks have besides."""
        size = str(len(slots))
        environments = [
            {
                **(environment or {}), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size,
                "LOCAL_WORLD_SIZE": size, "ONECURVE_RESTART": str(restart), **_visible(slots, self.procs),
            }
            for rank in range(len(slots))
        ]  # fmt: skip
        self._send({"start": environments, "arguments": arguments})

    def signal(self, number: int) -> None:
        self._send({"signal": int(number)})

    def ended(self, timeout: float) -> list[tuple[int, int]]:
        """(rank, exit code, or minus a signal) of those that ended. Raises EOFError once the server is gone."""
        if not select.select([self._connection], [], [], timeout)[0]:
            return []
        try:
            received = self._connection.recv(1 << 16)
        except ConnectionResetError:
            received = b""
        if not received:
            raise EOFError
        *lines, self._unread = (self._unread + received).split(b"\n")
        return [(told["rank"], told["code"]) for told in map(json.loads, lines)]

    def close(self) -> int:
        """Nothing of the ranks is left when this returns. Gives the server's exit code: above 0 where it failed."""
        self._connection.close()
        return self._server.wait()

    def _send(self, order: dict[str, Any]) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # `ended` tells of it
            self._connection.sendall((json.dumps(order) + "\n").encode())


@dataclass
class Requests:
    """What the launcher is asked for by signals. The handler only counts."""

    interrupts: int = 0
    stop: bool = False

    def listen(self) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.stop = True
        self.interrupts += number == signal.SIGINT


@dataclass
class Life:
    """How the ranks of one life ended: `codes` by rank; `first`: who failed by itself."""

    codes: dict[int, int] = field(default_factory=dict)
    first: list[int] = field(default_factory=list)
    asked: bool = False  # by a person or the batch system
    grow: bool = False  # by us, to try with more processes


@dataclass
class Budget:
    """Restarts without progress."""

    restarts: int
    used: int = 0
    last: tuple[int, str] | None = None  # step (-1: before it began) and reason of the failure before

    def refused(self, progressed: bool, cause: tuple[int, str] | None) -> str | None:
        """Pays for a restart; or says why there is none. `cause`: where a rank told of its failure."""
        if progressed:
            self.used, self.last = 0, None
        if cause is not None and cause == self.last:
            return f"the same failure twice {f'at step {cause[0]}' if cause[0] >= 0 else 'before the run began'}"
        self.last = cause
        if self.used == self.restarts:
            return f"no new checkpoint in {self.restarts} restarts" if self.restarts else "launch.restarts=0"
        self.used += 1
        return None

    @property
    def pause_s(self) -> float:
        return min(LONGEST_PAUSE_S, 2.0 ** (self.used - 1)) if self.used > 1 else 0.0


class Supervisor:
    def __init__(self, config: Config, procs: int):
        self.config, self.launch, self.procs = config, cast(Local, config.launch), procs
        self.folder, self.min_procs = Path(config.run.dir).expanduser(), min(procs, self.launch.min_procs or procs)
        self.budget, self.requests = Budget(self.launch.restarts), Requests()
        self.strikes = dict.fromkeys(range(procs), 0)
        self.restart, self.life, self.has_reported = 0, "", False
        self.started_at, self.began = time.monotonic(), time.time()
        self.ranks = Ranks(procs)
        # Composed once: each life has the same config, whatever becomes of its files. Nothing of it is left behind.
        self._composed = os.memfd_create("onecurve-config")
        os.write(self._composed, yaml.safe_dump(config.with_secrets()).encode())

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.ranks.close()

    def run(self) -> tuple[int, str]:
        """Exit code of the run, and why it ended where that is not told in its folder."""
        self.requests.listen()
        slots = list(range(self.procs))
        while True:
            before = self._newest()
            life = self._live(slots)
            if LOST in life.codes:  # the server is gone, and its ranks with it
                if self.ranks.close() > 0 and not self.restart and set(life.codes) == {LOST}:
                    return 4, "this Python cannot import the trainer, as it says above; `onecurve doctor` looks closer"
                self.ranks = Ranks(self.procs)
            if (end := self._end(life)) is not None:
                return end
            if life.grow:
                self.strikes = dict.fromkeys(self.strikes, STRIKES - 1)
                told = f"trying {self.procs} processes again"
            elif refused := self._after_failure(life, slots, progressed=self._newest() > before):
                self._tell(life, refused)
                return 4, f"{self._what_failed(life)}: {refused}"
            else:
                told = f"{self._what_failed(life)}, restart {self.budget.used} of {self.budget.restarts}"
            slots = self._choose()
            if len(slots) < self.procs:
                told += f", with {len(slots)} of {self.procs} processes"
            print(f"\nonecurve: {told}", file=sys.stderr, flush=True)
            self._pause()
            self.restart += 1

    def _live(self, slots: list[int]) -> Life:
        """One life of the ranks, to the end of all of them."""
        ranks, life, alive = self.ranks, Life(), set(range(len(slots)))
        self.life, self.began = uuid.uuid4().hex, time.time()
        arguments = ["--config", f"/proc/{os.getpid()}/fd/{self._composed}"]
        ranks.start(arguments, slots, self.restart, {"ONECURVE_LIFE": self.life, "ONECURVE_BORN": str(self.started_at)})
        began, deadline, killed = time.monotonic(), float("inf"), False
        while alive:
            try:
                ended = ranks.ended(timeout=TOGETHER_S)
            except EOFError:
                life.codes[LOST] = 4
                return life
            now = time.monotonic()
            for rank, code in ended:
                alive.discard(rank)
                life.codes[rank] = code
                if code in (0, 75) or killed or (code > 0 and life.first):
                    continue
                life.first.append(rank)
                # A rank that was killed tells nobody why: there is nothing for the others to wait for.
                deadline = min(deadline, now + (PEERS_S if code > 0 else TOGETHER_S))
            if self.requests.stop and not life.asked:
                ranks.signal(signal.SIGTERM)
                life.asked, deadline = True, min(deadline, now + self.launch.grace_s)
            if (
                len(slots) < self.procs
                and now > began + self.launch.grow_s
                and not (life.grow or life.asked or life.first)
            ):
                ranks.signal(signal.SIGTERM)
                life.grow, deadline = True, min(deadline, now + self.launch.grace_s)
            if alive and (now >= deadline or self.requests.interrupts > 1):
                ranks.signal(signal.SIGKILL)
                killed = True
        return life

    def _end(self, life: Life) -> tuple[int, str] | None:
        """Exit code and reason, where there shall be no other life."""
        codes = set(life.codes.values())
        if codes <= {0} or (not codes & {2, 3} and self._is_finished()):
            return 0, ""
        if self.requests.interrupts > 1:
            return 4, "interrupted a second time: what came after the last checkpoint is not saved"
        if 75 in codes and (life.asked or not life.grow):
            return 75, "stopped as asked"
        told = self._failure()
        if told and not told.get("retry"):
            self._tell(life, "")
            return int(told["exit_code"]), str(told["reason"])
        if life.asked:
            return 75, "stopped as asked, before there was anything new to save"
        # Refused before the folder was taken. What was right at first is wrong now for a reason that may pass.
        if not told and not self.restart and (final := sorted(codes & {2, 3})):
            return final[0], ""
        return None

    def _is_finished(self) -> bool:
        """Returns whether this life finished the run: what became of its ranks behind that changes nothing."""
        with suppress(OSError):
            written = (self.folder / STATUS).stat().st_mtime
            return written >= self.began and read_status(self.folder).get("state") == "finished"
        return False

    def _after_failure(self, life: Life, slots: list[int], progressed: bool) -> str | None:
        """Why there is no restart, if so."""
        if progressed:
            self.strikes = dict.fromkeys(self.strikes, 0)
        told = self._failure()
        for rank in [told["rank"]] if told else life.first:
            self.strikes[slots[rank]] += 1
        if len(self._choose()) < len(slots):  # paid with a process
            self.budget = Budget(self.budget.restarts, used=1)
            return None
        cause = (int(told["step"]), str(told["cause"])) if told else None
        if not told and (codes := {life.codes[rank] for rank in life.first}) and min(codes) > 0 and not self._began():
            cause = (-1, f"exit codes {codes}")  # what they said is on the terminal
        return self.budget.refused(progressed, cause)

    def _choose(self) -> list[int]:
        """The slots of the next life: all, or fewer where some had their strikes and the run may do without them."""
        good = [slot for slot, strikes in self.strikes.items() if strikes < STRIKES]
        for size in range(len(good), self.min_procs - 1, -1):
            if self._fits(size):
                return good[:size]
        return list(self.strikes)

    def _fits(self, procs: int) -> bool:
        with suppress(ConfigError):
            return bool(validate(self.config.with_secrets(), procs))
        return False

    def _what_failed(self, life: Life) -> str:
        if told := self._failure():
            return f"rank {told['rank']} failed at step {told['step']} ({str(told['reason']).splitlines()[0]})"
        return failure.describe_end([(rank, life.codes[rank]) for rank in life.first])

    def _tell(self, life: Life, no_restart: str) -> None:
        """The one block of a failed run."""
        self.has_reported = True
        ended = [(rank, life.codes[rank]) for rank in life.first]
        print(failure.failure_block(self.folder, self._failure(), ended, no_restart), file=sys.stderr, flush=True)

    def _failure(self) -> dict[str, Any] | None:
        """What a rank of this life told."""
        from trainer.run_directory import read_failure  # late: it imports torch, as the ranks do meanwhile

        told = read_failure(self.folder)
        return told if told and told.get("life") == self.life else None

    def _began(self) -> bool:
        """Returns whether this life has taken the run's folder."""
        with suppress(OSError):
            return (self.folder / STATUS).stat().st_mtime >= self.began
        return False

    def _newest(self) -> int:
        """The step of the newest checkpoint; -1 if there is none."""
        with suppress(OSError):
            names = os.listdir(self.folder / "checkpoints")
            return max((int(match[1]) for match in map(re.compile(r"step-(\d+)$").match, names) if match), default=-1)
        return -1

    def _pause(self) -> None:
        until = time.monotonic() + self.budget.pause_s
        while time.monotonic() < until and not self.requests.stop:
            time.sleep(0.1)


def _visible(slots: list[int], procs: int) -> dict[str, str]:
    """Where a run goes on without some GPUs, its ranks see only the others."""
    if len(slots) == procs:
        return {}
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    seen = [names[slot] if slot < len(names) and names[slot] else str(slot) for slot in slots]
    return {"CUDA_VISIBLE_DEVICES": ",".join(seen)}
