"""A storm over one run: each of its lives has a fault drawn from a seed, until the run is finished all the same.

Ranks are forked by the product's own fork server, which has imported torch once; a life takes about a second to start.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from launch.supervisor import Ranks
from tests.runs import Run
from trainer.config.faults import POINTS

ACTIONS = ("kill", "kill", "stop", "raise", "nan", "errno")
BLOWS = ("kill one", "kill all", "kill the server", "stop one", "terminate all", "terminate one")
ONCE_A_LIFE = ("start.", "end.")
RARE = ("checkpoint.", "eval.")
ON_MAIN = (
    "checkpoint.before_manifest",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
    "checkpoint.before_prune",
)
LIFE_S = 300.0  # in which a life must end, whatever happens


@dataclass
class Life:
    """How one start of the ranks ended: exit codes by rank; seconds in all, and behind the blow."""

    codes: dict[int, int]
    seconds: float
    after_blow: float | None = None

    @property
    def finished(self) -> bool:
        return set(self.codes.values()) == {0}


class Forked:
    """Lives of a run, one after the other."""

    def __init__(self, run: Run):
        self.run, self.ranks = run, Ranks(run.procs)

    def close(self) -> None:
        self.ranks.close()

    def live(self, *overrides: str, blow: str = "", instant: float = 0.0, draw: random.Random | None = None) -> Life:
        """One life, which is struck after `instant` seconds."""
        procs, codes = self.run.procs, dict[int, int]()
        arguments = [*self.run.base, *self.run.overrides, f"run.dir={self.run.folder}", *overrides]
        began, struck, dead = time.monotonic(), None, float("inf")
        self.ranks.start(arguments, list(range(procs)), restart=0)
        while len(codes) < procs:
            now = time.monotonic()
            assert now < began + LIFE_S, f"{blow} {overrides} {codes}"
            if struck is None and blow and now >= began + instant and self._strike(blow, draw or random.Random(0)):
                struck = now
            if now >= dead:
                self.ranks.signal(signal.SIGKILL)
            try:
                ended = self.ranks.poll(timeout=0.02)
            except EOFError:  # the server is gone, and with it its ranks
                self.ranks.close()
                self.ranks = Ranks(procs)
                codes = dict.fromkeys(range(procs), -signal.SIGKILL)
                break
            for rank, code in ended:
                codes[rank] = code
                if code not in (0, 75):  # the supervisor's patience with the others
                    dead = min(dead, now + (0.1 if code < 0 else 8.0))
        now = time.monotonic()
        return Life(codes, now - began, struck and now - struck)

    def _strike(self, blow: str, draw: random.Random) -> bool:
        """Whether there was anybody to strike."""
        server = self.ranks._server
        children = list(map(int, Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()))
        how = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "terminate": signal.SIGTERM}[blow.partition(" ")[0]]
        victims = {"server": [server.pid], "all": children, "one": draw.sample(children, min(1, len(children)))}
        for process in victims[blow.rpartition(" ")[2]]:
            with suppress(ProcessLookupError):
                os.kill(process, how)
        return bool(children)


@dataclass
class Storm:
    """`survived`: faults by kind. `told`: what happened in each life, to be read when something goes wrong."""

    run: Run
    seed: int
    survived: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)

    def rage(self, faults: int) -> None:
        """Lives with faults, until there were so many or the run is finished; then one without, to the end."""
        draw, lives = random.Random(f"{self.seed} {self.run.folder.name}"), Forked(self.run)
        try:
            while self.survived.total() < faults:
                if draw.random() < 0.5:
                    blow = draw.choice(BLOWS)
                    life = lives.live(blow=blow, instant=draw.uniform(0.0, 4.0), draw=draw)
                    hit = [blow] if life.after_blow is not None else []
                else:
                    planned = [self._drawn(draw) for _ in range(4)]
                    before = self._done()
                    life = lives.live(f"debug.faults=[{','.join(planned)}]")
                    hit = [f"{name.split(':')[1].split('@')[0]} at a point" for name in self._done() - before]
                self.told.append(f"{hit}: {sorted(life.codes.items())}, {life.seconds:.1f} s")
                self.survived.update(hit)
                if life.finished:
                    return
            life = lives.live("debug.faults=[]")
            assert life.finished, life
        finally:
            lives.close()

    def _drawn(self, draw: random.Random) -> str:
        """A fault of the product's own."""
        action, point = draw.choice(ACTIONS), draw.choice(list(POINTS))
        if action == "nan":
            point = "step.loss"
        elif action == "errno":
            point = draw.choice([point for point in POINTS if point.startswith("checkpoint.before_")])
            action = f"errno@{draw.choice(('ENOSPC', 'EIO', 'EROFS'))}"
        number = 1 if point.startswith(ONCE_A_LIFE) else draw.randint(1, 3 if point.startswith(RARE) else 15)
        rank = 0 if point in ON_MAIN else draw.randrange(self.run.procs)
        return f"{point}:{action}:{number}:{rank}"

    def _done(self) -> set[str]:
        return {path.name for path in (self.run.folder / "logs" / "faults").glob("*")}
