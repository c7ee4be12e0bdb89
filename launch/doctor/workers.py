"""Starts the members of an examination, on this machine or one on each node of a Slurm job, and listens to them.

Nobody is waited for longer than the limit: who has not told of its node by then is named and left out, and the others
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

CLOSING_S = 3.0  # for a step of Slurm to end, once it was asked to
ERRORS = 5  # last lines of a member's stderr that are kept


@dataclass
class Worker:
    node: str
    process: subprocess.Popen[str]
    heard: NodeReport
    answers: dict[str, Any] = field(default_factory=dict)
    errors: deque[str] = field(default_factory=lambda: deque(maxlen=ERRORS))
    gone: bool = False

    def order(self, **values: Any) -> None:
        with suppress(OSError, ValueError):  # it is gone, which is told where it was heard last
            assert self.process.stdin
            self.process.stdin.write(json.dumps(values) + "\n")
            self.process.stdin.flush()


def on_this_machine(options: Options, procs: int, node: str) -> Report:
    """`procs` processes, which meet in a file: nothing listens on the network."""
    arguments = [[*_command(options), "--member", f"{number},{procs},{procs},1"] for number in range(procs)]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // procs))}
    with tempfile.TemporaryDirectory(prefix="onecurve-doctor-") as private:
        meet = {"store": str(Path(private) / "store"), "local_world_size": procs}
        return _examined(options, [(node, one) for one in arguments], environment | os.environ, meet)


def on_all_nodes(options: Options, nodes: Sequence[str]) -> Report:
    """One process on each node, each by an srun of its own: the one that hangs names its node."""
    alone = ["srun", "--nodes=1", "--ntasks=1", "--overlap", "--export=ALL"]
    commands = [
        (node, [*alone, f"--nodelist={node}", *_command(options), "--member", f"{number},1,{len(nodes)},0"])
        for number, node in enumerate(nodes)
    ]
    return _examined(options, commands, os.environ, {"local_world_size": 1})


def _command(options: Options) -> list[str]:
    command = [*python("launch.doctor"), "--dir", str(options.folder), "--limit", str(options.limit_s)]
    return [*command, "--quick"] if options.quick else command


def _examined(
    options: Options, commands: Sequence[tuple[str, list[str]]], environment: Mapping[str, str], meet: dict[str, Any]
) -> Report:
    examination, inbox = Examination(), queue.Queue[tuple[Worker, str | None]]()
    members = [_started(node, command, environment, inbox) for node, command in commands]
    try:
        _listen(inbox, members, options.limit_s, lambda: all(m.heard.answer is not None or m.gone for m in members))
        here = [member for member in members if member.heard.answer is not None]
        for member in members:
            if member not in here:
                examination.absent.append(_absent(member, options.limit_s))
        examination.heard = [member.heard for member in here]
        if here and "store" not in meet:
            here[0].order(lead=True)
            _listen(inbox, here, options.limit_s, lambda: "meet" in here[0].answers or here[0].gone)
            if "meet" not in here[0].answers:
                here[0].heard.failure = next(reversed(here[0].errors), "the first process could not open a port")
                return examination.report()
            meet = meet | {"meet": here[0].answers["meet"]}
        for rank, member in enumerate(here):
            local_rank = rank if "store" in meet else 0
            member.order(rank=rank, world_size=len(here), local_rank=local_rank, **meet)
        _listen(inbox, here, options.limit_s, lambda: all("common" in m.answers or m.gone for m in here))
        if here and all("common" in member.answers for member in here):
            examination.common = [Finding(**finding) for finding in here[0].answers["common"]]
        return examination.report()
    finally:
        _close(members)


def _started(node: str, command: list[str], environment: Mapping[str, str], inbox: Any) -> Worker:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        env=environment, start_new_session=True,
    )  # fmt: skip
    member = Worker(node, process, NodeReport(node))

    def read() -> None:
        assert process.stdout
        for line in process.stdout:
            inbox.put((member, line))
        inbox.put((member, None))

    def read_errors() -> None:
        assert process.stderr
        member.errors.extend(line.strip() for line in process.stderr if line.strip())

    for target in (read, read_errors):
        threading.Thread(target=target, daemon=True).start()
    return member


def _listen(inbox: Any, members: Sequence[Worker], limit_s: float, done: Any) -> None:
    """Until `done()`, or the limit, or shortly after one of the members has failed."""
    deadline = time.monotonic() + limit_s
    while not done() and (left := deadline - time.monotonic()) > 0:
        try:
            member, line = inbox.get(timeout=left)
        except queue.Empty:
            return
        if line is None:
            member.gone = True
            if "common" not in member.answers and member.heard.answer is not None:
                deadline = min(deadline, time.monotonic() + CLOSING_S)  # the others may tell why
            continue
        try:
            values = json.loads(line)
        except ValueError:
            continue  # a line of somebody else's
        if isinstance(values, dict):
            _note(member, values)


def _note(member: Worker, values: dict[str, Any]) -> None:
    member.heard.node = str(values.get("node", member.node))
    if "told" in values:
        member.heard.answer = values["told"]
    if "failure" in values:
        member.heard.failure = str(values["failure"])
    if "stage" in values:
        order, text, awaited = values["stage"]
        member.heard.stage = (int(order), str(text), list(awaited))
    member.answers |= values


def _absent(member: Worker, limit_s: float) -> Finding:
    why = "; ".join([*member.errors][-2:])
    if member.gone:
        member.process.wait()
        told = f"ended with code {member.process.returncode} before it told anything"
    elif member.answers:
        told = f"was reached, but had not examined itself within {limit_s:.0f} s"
    else:
        told = f"did not answer within {limit_s:.0f} s"
    advice = "leave it out (sbatch --exclude), and have it looked at; `sinfo -R` may know more"
    if "SLURM_JOB_ID" not in os.environ:
        advice = "see with `top` and `dmesg` what ended or holds it"
    return Finding("node", "bad", f"{told}{f': {why}' if why else ''}"[:400], advice, (member.node,))


def _close(members: Sequence[Worker]) -> None:
    """Ends what is still there. srun ends its step when it is asked to; killed, it would leave it behind."""
    for number, patience in ((None, 0.2), (signal.SIGTERM, CLOSING_S), (signal.SIGKILL, CLOSING_S)):
        for member in members:
            if number is None and member.process.stdin:
                with suppress(OSError):
                    member.process.stdin.close()
            elif number is not None and member.process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(member.process.pid, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and any(member.process.poll() is None for member in members):
            time.sleep(0.02)
