"""Starts the workers of an examination, on this machine or one on each node of a Slurm job, and reads their reports.

No worker is waited for longer than the limit: one that has not reported by then is named and left out, and the others
do the common checks without it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.doctor.examination import Examination, NodeReport, Options
from launch.doctor.verdict import Finding, Report
from onecurve.paths import python

CLOSING_S = 3.0  # for a Slurm step to end after SIGTERM
ERRORS = 5  # last lines of a worker's stderr that are kept


@dataclass
class Worker:
    node: str
    process: subprocess.Popen[str]
    report: NodeReport
    answers: dict[str, Any] = field(default_factory=dict)
    errors: deque[str] = field(default_factory=lambda: deque(maxlen=ERRORS))
    has_ended: bool = False

    def order(self, **values: Any) -> None:
        with suppress(OSError, ValueError):  # it has ended: its stage is reported anyway
            assert self.process.stdin
            self.process.stdin.write(json.dumps(values) + "\n")
            self.process.stdin.flush()


def on_this_machine(options: Options, procs: int, node: str) -> Report:
    """Examines this machine with `procs` processes, which meet in a file: nothing listens on the network."""
    commands = [[*_command(options), "--member", f"{number},{procs},{procs},1"] for number in range(procs)]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // procs))}
    with tempfile.TemporaryDirectory(prefix="onecurve-doctor-") as private:
        meet = {"store": str(Path(private) / "store"), "local_world_size": procs}
        return _examine(options, [(node, command) for command in commands], environment | os.environ, meet)


def on_all_nodes(options: Options, nodes: Sequence[str]) -> Report:
    """Examines all nodes with one process on each, started by a separate srun: one that hangs names its node."""
    srun = ["srun", "--nodes=1", "--ntasks=1", "--overlap", "--export=ALL"]
    commands = [
        (node, [*srun, f"--nodelist={node}", *_command(options), "--member", f"{number},1,{len(nodes)},0"])
        for number, node in enumerate(nodes)
    ]
    return _examine(options, commands, os.environ, {"local_world_size": 1})


def _command(options: Options) -> list[str]:
    command = [*python("launch.doctor"), "--dir", str(options.folder), "--limit", str(options.limit_s)]
    return [*command, "--quick"] if options.quick else command


def _examine(
    options: Options, commands: Sequence[tuple[str, list[str]]], environment: Mapping[str, str], meet: dict[str, Any]
) -> Report:
    examination, inbox = Examination(), queue.Queue[tuple[Worker, str | None]]()
    workers = [_start(node, command, environment, inbox) for node, command in commands]
    try:
        _listen(
            inbox,
            workers,
            options.limit_s,
            lambda: all(worker.report.answer is not None or worker.has_ended for worker in workers),
        )
        responders = [worker for worker in workers if worker.report.answer is not None]
        for worker in workers:
            if worker not in responders:
                examination.absences.append(_absence(worker, options.limit_s))
        examination.reports = [worker.report for worker in responders]
        if responders and "store" not in meet:
            responders[0].order(lead=True)
            _listen(
                inbox, responders, options.limit_s, lambda: "meet" in responders[0].answers or responders[0].has_ended
            )
            if "meet" not in responders[0].answers:
                responders[0].report.failure = next(
                    reversed(responders[0].errors), "the first process could not open a port"
                )
                return examination.report()
            meet = meet | {"meet": responders[0].answers["meet"]}
        for rank, worker in enumerate(responders):
            local_rank = rank if "store" in meet else 0
            worker.order(rank=rank, world_size=len(responders), local_rank=local_rank, **meet)
        _listen(
            inbox,
            responders,
            options.limit_s,
            lambda: all("common" in worker.answers or worker.has_ended for worker in responders),
        )
        if responders and all("common" in worker.answers for worker in responders):
            examination.common_findings = [Finding(**finding) for finding in responders[0].answers["common"]]
        return examination.report()
    finally:
        _close(workers)


def _start(node: str, command: list[str], environment: Mapping[str, str], inbox: Any) -> Worker:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        env=environment, start_new_session=True,
    )  # fmt: skip
    worker = Worker(node, process, NodeReport(node))

    def read() -> None:
        assert process.stdout
        for line in process.stdout:
            inbox.put((worker, line))
        inbox.put((worker, None))

    def read_errors() -> None:
        assert process.stderr
        worker.errors.extend(line.strip() for line in process.stderr if line.strip())

    for target in (read, read_errors):
        threading.Thread(target=target, daemon=True).start()
    return worker


def _listen(inbox: Any, workers: Sequence[Worker], limit_s: float, is_done: Any) -> None:
    """Reads what workers send until `is_done()`, or the limit, or shortly after one of them has failed."""
    deadline = time.monotonic() + limit_s
    while not is_done() and (remaining := deadline - time.monotonic()) > 0:
        try:
            worker, line = inbox.get(timeout=remaining)
        except queue.Empty:
            return
        if line is None:
            worker.has_ended = True
            if "common" not in worker.answers and worker.report.answer is not None:
                deadline = min(deadline, time.monotonic() + CLOSING_S)  # the others may tell why
            continue
        try:
            values = json.loads(line)
        except ValueError:
            continue  # printed by something else
        if isinstance(values, dict):
            _record(worker, values)


def _record(worker: Worker, values: dict[str, Any]) -> None:
    worker.report.node = str(values.get("node", worker.node))
    if "told" in values:
        worker.report.answer = values["told"]
    if "failure" in values:
        worker.report.failure = str(values["failure"])
    if "stage" in values:
        order, text, awaited = values["stage"]
        worker.report.stage = (int(order), str(text), list(awaited))
    worker.answers |= values


def _absence(worker: Worker, limit_s: float) -> Finding:
    errors = "; ".join([*worker.errors][-2:])
    if worker.has_ended:
        worker.process.wait()
        message = f"ended with code {worker.process.returncode} before it reported anything"
    elif worker.answers:
        message = f"was reached, but had not examined itself within {limit_s:.0f} s"
    else:
        message = f"did not answer within {limit_s:.0f} s"
    advice = "leave it out (sbatch --exclude), and have it looked at; `sinfo -R` may know more"
    if "SLURM_JOB_ID" not in os.environ:
        advice = "see with `top` and `dmesg` what ended or holds it"
    return Finding("node", "bad", f"{message}{f': {errors}' if errors else ''}"[:400], advice, (worker.node,))


def _close(workers: Sequence[Worker]) -> None:
    """Ends the workers that still run. srun ends its step on SIGTERM; killed, it would leave the step behind."""
    for number, patience in ((None, 0.2), (signal.SIGTERM, CLOSING_S), (signal.SIGKILL, CLOSING_S)):
        for worker in workers:
            if number is None and worker.process.stdin:
                with suppress(OSError):
                    worker.process.stdin.close()
            elif number is not None and worker.process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(worker.process.pid, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and any(worker.process.poll() is None for worker in workers):
            time.sleep(0.02)
