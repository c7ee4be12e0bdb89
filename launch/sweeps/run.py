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
POLL_S = 0.1


@dataclass
class Running:
    trial: Trial
    process: subprocess.Popen[bytes]
    slot: int
    began: float


class Runner:
    """Runs trials and calls `on_end` with each one that ended and its exit code. Finished trials do not run again."""

    def __init__(self, procs: int, parallel: int, config_dir: str | None, on_end: Callable[[Trial, int], None]):
        """Raises ConfigError if there are too few GPUs for `parallel` trials at a time."""
        self.procs, self.parallel, self.config_dir, self.on_end = procs, parallel, config_dir, on_end
        self.interrupts, self.running = 0, list[Running]()
        self.codes: dict[int, int] = {}
        from launch.doctor.gpus import visible

        self.gpus = list(visible())
        if parallel > 1 and self.gpus and procs * parallel > len(self.gpus):
            raise ConfigError(
                f"--parallel {parallel}: {parallel} x {procs} processes, but {len(self.gpus)} GPUs; one process a GPU"
            )

    def run(self, trials: Iterator[Trial]) -> int:
        """Runs all trials; returns 0 if all are finished, else the worst exit code. `trials` may be a lazy iterator."""
        with self._stop_on_signals():
            has_more = True
            while True:
                while has_more and not self.interrupts and len(self.running) < self.parallel:
                    if (trial := next(trials, None)) is None:
                        has_more = False
                    elif trial.is_finished:
                        self._record_end(trial, 0)
                    else:
                        self._start(trial)
                if not self.running:
                    break
                time.sleep(POLL_S)
                self._poll()
        if self.interrupts and 75 not in self.codes.values():
            self.codes[-1] = Interrupted.exit_code
        return next((code for code in WORST if code in self.codes.values()), 0)

    def _start(self, trial: Trial) -> None:
        slot = min(set(range(self.parallel)) - {running.slot for running in self.running})
        environment, folder = dict(os.environ), Path(trial.folder)
        if self.parallel > 1 and self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[slot * self.procs : (slot + 1) * self.procs])
        if self.parallel > 1:
            cores = (os.cpu_count() or 1) // (self.parallel * self.procs)
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
        config_arguments = ["--config-dir", self.config_dir] if self.config_dir else []
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = ["onecurve", "train", "-n", str(self.procs), *config_arguments, *trial.overrides]
        with log_of(trial).open("ab") as log, tempfile.TemporaryFile("w+") as command:
            json.dump(words, command)
            command.seek(0)
            process = subprocess.Popen(
                [*COMMAND, *map(shown_override, words[1:])], stdin=command, stdout=log,
                stderr=log, env=environment, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        self.running.append(Running(trial, process, slot, time.monotonic()))

    def _poll(self) -> None:
        for running in list(self.running):
            if (code := running.process.poll()) is not None:
                self.running.remove(running)
                self._record_end(running.trial, code if code in (0, *WORST) else 4)

    def _record_end(self, trial: Trial, code: int) -> None:
        self.codes[trial.number] = code
        self.on_end(trial, code)

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """Makes the first signal save and stop all trials, and the second kill them."""

        def stop_trials(number: int, _frame: FrameType | None) -> None:
            self.interrupts += 1
            for running in self.running:
                with suppress(ProcessLookupError):
                    running.process.send_signal(signal.SIGTERM if self.interrupts == 1 else signal.SIGKILL)

        handlers = {number: signal.signal(number, stop_trials) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def log_of(trial: Trial) -> Path:
    """Returns the log of a trial's console output. It lies beside the trial's folder, which is the run's alone."""
    folder = Path(trial.folder)
    return folder.with_name(folder.name + ".log")


def describe_end(trial: Trial, code: int, count: int) -> str:
    """Returns the line that the console shows of a trial that ended."""
    result = outcome(trial)
    words = [f"[{trial.number + 1}/{count}]", trial.name, " ", result.state]
    words += [f"loss {result.loss:.4f}"] if result.loss is not None else []
    words += [f"eval {result.best:.4f}"] if result.best is not None else []
    return " ".join(words + ([f"exit code {code}: see {log_of(trial)}"] if code not in (0, 75) else []))
