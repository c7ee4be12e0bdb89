"""Runs the trials of a sweep on this machine: each is an `onecurve train`, some of them at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch.sweeps.summary import outcome
from launch.sweeps.trials import Trial
from onecurve.paths import python
from trainer.errors import ConfigError, Interrupted
from trainer.processes import die_with_parent
from trainer.secrets import shown_override

WORST = (4, 3, 2, 75)  # of the contract's exit codes, the first one that a trial ended with is the sweep's
COMMAND = python("launch.sweeps.start")
LOOK_S = 0.1


@dataclass
class Running:
    trial: Trial
    process: subprocess.Popen[bytes]
    slot: int
    began: float


class Runner:
    """`done` is told of each trial that ended, with its exit code; trials that are finished already are left out."""

    def __init__(self, procs: int, parallel: int, config_dir: str | None, done: Callable[[Trial, int], None]):
        """Raises ConfigError where there are too few GPUs for so many at a time."""
        self.procs, self.parallel, self.config_dir, self.done = procs, parallel, config_dir, done
        self.interrupts, self.running = 0, list[Running]()
        self.codes: dict[int, int] = {}
        from launch.doctor.gpus import visible

        self.gpus = list(visible())
        if parallel > 1 and self.gpus and procs * parallel > len(self.gpus):
            raise ConfigError(
                f"--parallel {parallel}: {parallel} x {procs} processes, but {len(self.gpus)} GPUs; one process a GPU"
            )

    def run(self, trials: Iterator[Trial]) -> int:
        """Exit code: 0 if all are finished, else the worst. `trials` may be made as they are asked for."""
        with self._listening():
            waiting = True
            while True:
                while waiting and not self.interrupts and len(self.running) < self.parallel:
                    if (trial := next(trials, None)) is None:
                        waiting = False
                    elif trial.finished:
                        self._ended(trial, 0)
                    else:
                        self._start(trial)
                if not self.running:
                    break
                time.sleep(LOOK_S)
                self._look()
        if self.interrupts and 75 not in self.codes.values():
            self.codes[-1] = Interrupted.exit_code
        return next((code for code in WORST if code in self.codes.values()), 0)

    def _start(self, trial: Trial) -> None:
        slot = min(set(range(self.parallel)) - {one.slot for one in self.running})
        environment, folder = dict(os.environ), Path(trial.folder)
        if self.parallel > 1 and self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[slot * self.procs : (slot + 1) * self.procs])
        if self.parallel > 1:
            cores = (os.cpu_count() or 1) // (self.parallel * self.procs)
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
        own = ["--config-dir", self.config_dir] if self.config_dir else []
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = ["onecurve", "train", "-n", str(self.procs), *own, *trial.overrides]
        with log_of(trial).open("ab") as log, tempfile.TemporaryFile("w+") as command:
            json.dump(words, command)
            command.seek(0)
            process = subprocess.Popen(
                [*COMMAND, *map(shown_override, words[1:])], stdin=command, stdout=log,
                stderr=log, env=environment, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        self.running.append(Running(trial, process, slot, time.monotonic()))

    def _look(self) -> None:
        for one in list(self.running):
            if (code := one.process.poll()) is not None:
                self.running.remove(one)
                self._ended(one.trial, code if code in (0, *WORST) else 4)

    def _ended(self, trial: Trial, code: int) -> None:
        self.codes[trial.number] = code
        self.done(trial, code)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """The first signal stops all trials, saved; the second at once."""

        def note(number: int, _frame: FrameType | None) -> None:
            self.interrupts += 1
            for one in self.running:
                with suppress(ProcessLookupError):
                    one.process.send_signal(signal.SIGTERM if self.interrupts == 1 else signal.SIGKILL)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def log_of(trial: Trial) -> Path:
    """What the trial printed, in all its lives: beside its folder, which is the run's alone."""
    folder = Path(trial.folder)
    return folder.with_name(folder.name + ".log")


def line(trial: Trial, code: int, count: int) -> str:
    """What the console shows of a trial that ended."""
    came = outcome(trial)
    told = [f"[{trial.number + 1}/{count}]", trial.name, " ", came.state]
    told += [f"loss {came.loss:.4f}"] if came.loss is not None else []
    told += [f"eval {came.best:.4f}"] if came.best is not None else []
    return " ".join(told + ([f"exit code {code}: see {log_of(trial)}"] if code not in (0, 75) else []))
