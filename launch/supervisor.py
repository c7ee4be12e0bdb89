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
PEERS_S = 3.0  # what the other ranks get to end by themselves, once one has reported why it failed
TOGETHER_S = 0.05  # ranks that are killed within this time were killed together
STRIKES = 2  # lives in a row, without a new checkpoint, that a process may be the first to fail in
LONGEST_PAUSE_S = 30.0
LOST = -1  # instead of a rank, in a life's codes: all were killed together with their server


class Ranks:
    """The processes of a run, forked by a server (launch/forkserver.py) that is as old as this object."""

    def __init__(self, procs: int, output: IO[bytes] | None = None):
        """Starts the server of at most `procs` ranks, which write to `output`, or where this process writes."""
        if sys.platform != "linux":
            raise ConfigError(
                "onecurve train needs Linux; here: torchrun --standalone --nproc-per-node N -m trainer ..."
            )
        self.procs = procs
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // procs)))
        self._connection, server_end = socket.socketpair()
        with server_end:
            self._server = subprocess.Popen(
                [*python("launch.forkserver"), str(server_end.fileno())],
                pass_fds=[server_end.fileno()],
                env=environment,
                stdout=output,
                stderr=output,
            )
        self._unread = b""

    def start(
        self, arguments: list[str], slots: list[int], restart: int, environment: Mapping[str, str] | None = None
    ) -> None:
        """Starts one rank on each slot, which is the number of a GPU. `environment` adds variables for the ranks."""
        size = str(len(slots))
        environments = [
            {
                **(environment or {}), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size,
                "LOCAL_WORLD_SIZE": size, "ONECURVE_RESTART": str(restart), **_visible_gpus(slots, self.procs),
            }
            for rank in range(len(slots))
        ]  # fmt: skip
        self._send({"start": environments, "arguments": arguments})

    def signal(self, number: int) -> None:
        self._send({"signal": int(number)})

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        """Returns (rank, exit code or minus a signal) of ranks that ended. Raises EOFError once the server is gone."""
        if not select.select([self._connection], [], [], timeout)[0]:
            return []
        try:
            received = self._connection.recv(1 << 16)
        except ConnectionResetError:
            received = b""
        if not received:
            raise EOFError
        *lines, self._unread = (self._unread + received).split(b"\n")
        return [(report["rank"], report["code"]) for report in map(json.loads, lines)]

    def close(self) -> int:
        """Ends the server and all ranks; returns the server's exit code, which is above 0 if it failed."""
        self._connection.close()
        return self._server.wait()

    def _send(self, order: dict[str, Any]) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # `poll` reports it
            self._connection.sendall((json.dumps(order) + "\n").encode())


@dataclass
class Requests:
    """The requests that the launcher gets by signals. The handler only counts them."""

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
    """How the ranks of one life ended: exit `codes` by rank, and which ranks were the `first_failures`."""

    codes: dict[int, int] = field(default_factory=dict)
    first_failures: list[int] = field(default_factory=list)
    stop_requested: bool = False  # by a person or the batch system
    should_grow: bool = False  # the supervisor stopped it to try with more processes


@dataclass
class Budget:
    """The restarts that a run may take without progress."""

    restarts: int
    used: int = 0
    last_failure: tuple[int, str] | None = None  # step (-1: before the run began) and cause

    def spend(self, progressed: bool, cause: tuple[int, str] | None) -> str | None:
        """Pays for a restart, or returns why there is none. `cause` is the (step, reason) that a rank reported."""
        if progressed:
            self.used, self.last_failure = 0, None
        if cause is not None and cause == self.last_failure:
            return f"the same failure twice {f'at step {cause[0]}' if cause[0] >= 0 else 'before the run began'}"
        self.last_failure = cause
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
        """Runs to the end; returns the exit code, and why the run ended where its folder does not say it."""
        self.requests.listen()
        slots = list(range(self.procs))
        while True:
            step_before = self._newest_step()
            life = self._run_life(slots)
            if LOST in life.codes:  # the server is gone, and its ranks with it
                if self.ranks.close() > 0 and not self.restart and set(life.codes) == {LOST}:
                    return 4, "this Python cannot import the trainer, as it says above; `onecurve doctor` looks closer"
                self.ranks = Ranks(self.procs)
            if (outcome := self._decide_exit(life)) is not None:
                return outcome
            if life.should_grow:
                self.strikes = dict.fromkeys(self.strikes, STRIKES - 1)
                message = f"trying {self.procs} processes again"
            elif refusal := self._charge_failure(life, slots, progressed=self._newest_step() > step_before):
                self._print_failure(life, refusal)
                return 4, f"{self._describe_failure(life)}: {refusal}"
            else:
                message = f"{self._describe_failure(life)}, restart {self.budget.used} of {self.budget.restarts}"
            slots = self._choose_slots()
            if len(slots) < self.procs:
                message += f", with {len(slots)} of {self.procs} processes"
            print(f"\nonecurve: {message}", file=sys.stderr, flush=True)
            self._pause()
            self.restart += 1

    def _run_life(self, slots: list[int]) -> Life:
        """Starts the ranks and waits for the end of all of them."""
        ranks, life, alive = self.ranks, Life(), set(range(len(slots)))
        self.life, self.began = uuid.uuid4().hex, time.time()
        arguments = ["--config", f"/proc/{os.getpid()}/fd/{self._composed}"]
        ranks.start(arguments, slots, self.restart, {"ONECURVE_LIFE": self.life, "ONECURVE_BORN": str(self.started_at)})
        start, deadline, killed = time.monotonic(), float("inf"), False
        while alive:
            try:
                exits = ranks.poll(timeout=TOGETHER_S)
            except EOFError:
                life.codes[LOST] = 4
                return life
            now = time.monotonic()
            for rank, code in exits:
                alive.discard(rank)
                life.codes[rank] = code
                if code in (0, 75) or killed or (code > 0 and life.first_failures):
                    continue
                life.first_failures.append(rank)
                # A rank that was killed reports no reason: there is nothing for the others to wait for.
                deadline = min(deadline, now + (PEERS_S if code > 0 else TOGETHER_S))
            if self.requests.stop and not life.stop_requested:
                ranks.signal(signal.SIGTERM)
                life.stop_requested, deadline = True, min(deadline, now + self.launch.grace_s)
            if (
                len(slots) < self.procs
                and now > start + self.launch.grow_s
                and not (life.should_grow or life.stop_requested or life.first_failures)
            ):
                ranks.signal(signal.SIGTERM)
                life.should_grow, deadline = True, min(deadline, now + self.launch.grace_s)
            if alive and (now >= deadline or self.requests.interrupts > 1):
                ranks.signal(signal.SIGKILL)
                killed = True
        return life

    def _decide_exit(self, life: Life) -> tuple[int, str] | None:
        """Returns the exit code and the reason if the run must not be restarted, else None."""
        codes = set(life.codes.values())
        if codes <= {0} or (not codes & {2, 3} and self._is_finished()):
            return 0, ""
        if self.requests.interrupts > 1:
            return 4, "interrupted a second time: what came after the last checkpoint is not saved"
        if 75 in codes and (life.stop_requested or not life.should_grow):
            return 75, "stopped as asked"
        event = self._read_failure_event()
        if event and not event.get("retry"):
            self._print_failure(life, "")
            return int(event["exit_code"]), str(event["reason"])
        if life.stop_requested:
            return 75, "stopped as asked, before there was anything new to save"
        # Refused before the folder was taken. What was right at first is wrong now for a reason that may pass.
        if not event and not self.restart and (final := sorted(codes & {2, 3})):
            return final[0], ""
        return None

    def _is_finished(self) -> bool:
        """Returns whether this life finished the run: how its ranks ended after that changes nothing."""
        with suppress(OSError):
            status_time = (self.folder / STATUS).stat().st_mtime
            return status_time >= self.began and read_status(self.folder).get("state") == "finished"
        return False

    def _charge_failure(self, life: Life, slots: list[int], progressed: bool) -> str | None:
        """Counts a failed life against its slots and the budget; returns why there is no restart, or None."""
        if progressed:
            self.strikes = dict.fromkeys(self.strikes, 0)
        event = self._read_failure_event()
        for rank in [event["rank"]] if event else life.first_failures:
            self.strikes[slots[rank]] += 1
        if len(self._choose_slots()) < len(slots):  # paid with a process
            self.budget = Budget(self.budget.restarts, used=1)
            return None
        cause = (int(event["step"]), str(event["cause"])) if event else None
        codes = {life.codes[rank] for rank in life.first_failures}
        if not event and codes and min(codes) > 0 and not self._has_taken_folder():
            cause = (-1, f"exit codes {codes}")  # what they said is on the terminal
        return self.budget.spend(progressed, cause)

    def _choose_slots(self) -> list[int]:
        """Returns the slots of the next life: all, or without those that failed too often if `min_procs` allows it."""
        good = [slot for slot, strikes in self.strikes.items() if strikes < STRIKES]
        for size in range(len(good), self.min_procs - 1, -1):
            if self._fits(size):
                return good[:size]
        return list(self.strikes)

    def _fits(self, procs: int) -> bool:
        with suppress(ConfigError):
            return bool(validate(self.config.with_secrets(), procs))
        return False

    def _describe_failure(self, life: Life) -> str:
        if event := self._read_failure_event():
            return f"rank {event['rank']} failed at step {event['step']} ({str(event['reason']).splitlines()[0]})"
        return failure.describe_end([(rank, life.codes[rank]) for rank in life.first_failures])

    def _print_failure(self, life: Life, no_restart: str) -> None:
        """Prints the one block of a failed run."""
        self.has_reported = True
        exits = [(rank, life.codes[rank]) for rank in life.first_failures]
        block = failure.failure_block(self.folder, self._read_failure_event(), exits, no_restart)
        print(block, file=sys.stderr, flush=True)

    def _read_failure_event(self) -> dict[str, Any] | None:
        """Returns the failure that a rank of this life reported, if any."""
        from trainer.run_directory import read_failure  # late: it imports torch, as the ranks do meanwhile

        event = read_failure(self.folder)
        return event if event and event.get("life") == self.life else None

    def _has_taken_folder(self) -> bool:
        """Returns whether this life has taken the run's folder."""
        with suppress(OSError):
            return (self.folder / STATUS).stat().st_mtime >= self.began
        return False

    def _newest_step(self) -> int:
        """Returns the step of the newest checkpoint, or -1 if there is none."""
        with suppress(OSError):
            names = os.listdir(self.folder / "checkpoints")
            return max((int(match[1]) for match in map(re.compile(r"step-(\d+)$").match, names) if match), default=-1)
        return -1

    def _pause(self) -> None:
        deadline = time.monotonic() + self.budget.pause_s
        while time.monotonic() < deadline and not self.requests.stop:
            time.sleep(0.1)


def _visible_gpus(slots: list[int], procs: int) -> dict[str, str]:
    """Returns the variable that hides the GPUs that a run goes on without."""
    if len(slots) == procs:
        return {}
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = [names[slot] if slot < len(names) and names[slot] else str(slot) for slot in slots]
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible)}
