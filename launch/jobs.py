"""`onecurve status|logs|cancel RUN_DIR`: of a run here, a job of Slurm, or a sweep's job array."""

from __future__ import annotations

import argparse
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from launch import liveness, slurm_queue
from launch.slurm_queue import jobs_of
from launch.submit import CANCELLED
from launch.sweep import is_sweep
from trainer.errors import ConfigError
from trainer.resilience.interruption import STOP
from trainer.tracking.jsonl import display_text, read, read_status

POLL_S = 0.5


def add_commands(commands: Any) -> None:
    status = commands.add_parser("status", help="how far a run is, and its jobs of Slurm")
    status.set_defaults(func=print_status)
    logs = commands.add_parser("logs", help="what a run wrote")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it writes, until the run ends")
    logs.add_argument("-n", "--lines", type=int, default=40, help="of the end (default: 40)")
    logs.add_argument("--rank", type=int, help="the log of one process, instead of the job's or the main one's")
    logs.set_defaults(func=print_logs)
    stop = commands.add_parser("cancel", help="save and stop; what is queued is taken from the queue")
    stop.add_argument("--now", action="store_true", help="do not wait for it to save")
    stop.set_defaults(func=cancel)
    for parser in (status, logs, stop):
        parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")


def print_status(arguments: argparse.Namespace) -> int:
    folder = _run_folder(arguments.run_dir)
    for run in runs_in(folder):
        print(f"{run.relative_to(folder.parent)}: {summary(run)}")
    states = slurm_queue.states(jobs_of(folder))
    for job, (state, where) in states.items():
        print(f"job {job}: {state} {where}".rstrip())
    active = any(state in slurm_queue.ACTIVE for state, _ in states.values())
    if jobs_of(folder) and not active and slurm_queue.is_here():
        running = [run for run in runs_in(folder) if read_status(run).get("state") == "running"]
        print(f"no job of it is queued or runs{'; it ended without a word' if running else ''}")
        if running:
            print(f"  sbatch {_newest_script(folder)}   # goes on from the newest checkpoint")
    return 0


def summary(run: Path) -> str:
    """Returns a run's state, step, loss and remaining time in one line."""
    status = read_status(run)
    if not status:
        return "has not begun"
    if (since := liveness.dead_since(run)) is not None:
        status |= {"state": "dead", "reason": liveness.describe_death(since)}
    line = f"{status['state']}, step {status['step']}/{status['steps']}"
    with suppress(ConfigError, OSError, KeyError, IndexError, TypeError):
        rows = read(run / "metrics.jsonl")[-20:]
        row, left = rows[-1], status["steps"] - rows[-1]["step"]
        line = f"{status['state']}, step {row['step']}/{status['steps']}, loss {row['loss']:.4f}"
        if status["state"] == "running" and left:
            pace = sum(row["step_s"] for row in rows) / len(rows)
            line += f", {row['tokens_per_s']:,.0f} tok/s, about {_duration(left * pace)} left"
    reason = status.get("reason")
    return f"{line}{f' ({display_text(reason)})' if reason else ''}"


def print_logs(arguments: argparse.Namespace) -> int:
    folder = _run_folder(arguments.run_dir)
    log = _log(folder, arguments.rank)
    with log.open(errors="replace") as file:
        print(f"==> {log} <==")
        print(*deque(file, arguments.lines), sep="", end="", flush=True)
        if arguments.follow:
            for text in _follow(file, folder):
                print(text, end="", flush=True)
    return 0


def cancel(arguments: argparse.Namespace) -> int:
    folder = _run_folder(arguments.run_dir)
    for run in runs_in(folder):
        if jobs := jobs_of(run):  # they are not queued again
            with (run / CANCELLED).open("a") as file:
                file.writelines(f"{job}\n" for job in jobs)
        if (since := liveness.dead_since(run)) is not None:
            print(f"{run}: nothing to stop, it is dead {liveness.describe_death(since)}")
        elif read_status(run).get("state") == "running" and not arguments.now:
            (run / STOP).touch()
            print(f"{run}: is asked to save and stop")
    queued = slurm_queue.active(jobs_of(folder))
    waiting = [job for job, state in queued.items() if state == "PENDING"]
    slurm_queue.cancel(list(queued) if arguments.now else waiting)
    if running := [job for job in queued if job not in waiting and not arguments.now]:
        # Also one that is only starting: its script asks the run until it stops.
        slurm_queue.cancel(running, "--batch", "--signal=USR1")
    for job in queued:
        print(f"job {job}: {'saves and stops' if job in running else 'cancelled'}")
    return 0


def runs_in(folder: Path) -> list[Path]:
    """Returns the folder itself if it is a run's, or the folders of a sweep's runs."""
    if is_sweep(folder):
        return sorted(child for child in folder.iterdir() if (child / "slurm").is_dir() or read_status(child))
    return [folder]


def _run_folder(folder: Path) -> Path:
    folder = folder.expanduser().absolute()
    if not read_status(folder) and not (folder / "slurm").is_dir() and not is_sweep(folder):
        raise ConfigError(f"{folder}: is not a run's folder: it has neither status.json nor a job")
    return folder


def _log(folder: Path, rank: int | None) -> Path:
    if rank is not None:
        pattern, problem = f"logs/rank-{rank}.log", f"no log of rank {rank}"
    elif jobs_of(folder):
        pattern, problem = "logs/slurm-*.log", "no log yet: its job has not started"
    else:
        pattern, problem = "logs/rank-0.log", "no log yet"
    logs = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise ConfigError(f"{folder / pattern}: {problem}")
    return logs[-1]


def _follow(file: IO[str], folder: Path) -> Iterator[str]:
    """Yields what is written from now on, until the run has ended or died and none of its jobs is left."""
    last_check = -math.inf  # at once, where nothing is written
    while True:
        if text := file.read():
            yield text
        elif time.monotonic() > last_check + 5:
            last_check = time.monotonic()
            queued = True
            with suppress(ConfigError):  # Slurm may be busy
                queued = bool(slurm_queue.active(jobs_of(folder)))
            if not queued and read_status(folder).get("state") != "running":
                return
            if (since := liveness.dead_since(folder)) is not None:
                yield f"==> dead {liveness.describe_death(since)} <==\n"
                return
        else:
            time.sleep(POLL_S)


def _newest_script(folder: Path) -> Path:
    numbers = [int(child.name) for child in (folder / "slurm").iterdir() if child.name.isdigit()]
    return folder / "slurm" / str(max(numbers)) / "job.sbatch"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "a minute"
