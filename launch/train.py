"""`onecurve train -n PROCS [overrides]`: checks first, then starts the ranks and restarts them when one dies."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trainer.config import Config
from trainer.config.compose import load
from trainer.errors import ConfigError
from trainer.tracking.jsonl import read_status

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # a rank that died of these was asked to end: no restart


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("train", help="train on this machine", prefix_chars="-")
    parser.add_argument("-n", "--procs", type=int, help="processes (default: launch.procs, else one a GPU, else 1)")
    parser.add_argument("--config-dir", help="folder with config groups of your own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see `python -m trainer --help`")
    parser.set_defaults(func=train)


def train(arguments: argparse.Namespace) -> int:
    """Exit code of the run: 0 finished, 2 config, 3 data, 4 failed, 75 interrupted."""
    overrides, procs = list(arguments.overrides), arguments.procs
    if procs is None:
        procs = _default_procs(load(overrides, config_dir=arguments.config_dir))
    if procs < 1:
        raise ConfigError(f"-n {procs}: at least one process is needed")
    config = load(overrides, procs, arguments.config_dir)
    from trainer.folder import settle  # late: it imports torch, and the config's problems should show at once
    from trainer.given import open_given
    from trainer.inputs import open_shards
    from trainer.topology import ALONE

    open_given(config, ALONE, open_shards(config, ALONE).tokenizer)
    folder = Path(config.run.dir).expanduser()
    if arguments.config_dir:
        overrides += ["--config-dir", arguments.config_dir]
    restarts = config.launch.restarts
    for restart in range(restarts + 1):
        # A restart continues; it must not start over again.
        code = _life([*overrides, "run.fresh=false"] if restart else overrides, procs, config)
        if code >= 0 or -code in ASKED:
            break
        if restart < restarts:
            counted = f"restart {restart + 1} of {restarts}"
            print(f"\nonecurve: a process was killed (signal {-code}), {counted}", file=sys.stderr)
    reason = f"a process ended with code {code}"
    if code < 0:
        reason, code = f"a process was killed (signal {-code})", 4
        print(f"\nonecurve: {reason}", file=sys.stderr)
    if code == 0:
        _what_next(folder, procs, overrides)
    elif folder.is_dir():
        with suppress(Timeout, OSError), FileLock(folder / ".lock", blocking=False):  # unless somebody trains there
            settle(folder, reason, code)
    return code


def _life(overrides: list[str], procs: int, config: Config) -> int:
    """One start of all ranks under torch's elastic agent. Its exit code; minus the signal if a rank was killed."""
    from torch.distributed.elastic.agent.server.api import SignalException  # type: ignore[attr-defined]
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // procs)))
    with tempfile.TemporaryDirectory(prefix="onecurve-") as scratch:
        ranks = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=procs,
            run_id=Path(scratch).name,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{scratch}/rendezvous",
            rdzv_configs={"store_type": "file"},  # nothing listens on the network
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=scratch, redirects=dict.fromkeys(range(1, procs), Std.OUT)),
            signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            shutdown_timeout=config.launch.grace_s,
        )
        started = time.time()
        try:
            elastic_launch(ranks, sys.executable)("-m", "trainer", *overrides)
        except ChildFailedError as error:
            return error.get_first_failure()[1].exitcode
        except SignalException:
            return _status_code(Path(config.run.dir).expanduser(), started)
    return 0


def _status_code(folder: Path, since: float) -> int:
    """What the run's own status says, after the launcher itself was told to stop."""
    if not (folder / "status.json").exists() or (folder / "status.json").stat().st_mtime < since:
        return -signal.SIGTERM  # stopped before the run had begun
    status = read_status(folder)
    return int(status.get("exit_code") or 0) if status.get("state") != "running" else -signal.SIGTERM


def _default_procs(config: Config) -> int:
    if config.launch.procs:
        return config.launch.procs
    import torch

    return max(1, torch.cuda.device_count())


def _what_next(folder: Path, procs: int, overrides: list[str]) -> None:
    """The next commands to try, ready to paste."""
    program = Path(sys.argv[0])
    near = program.absolute().is_relative_to(Path.cwd())  # such as .venv/bin/onecurve: say it so that it can be pasted
    name = os.path.relpath(program) if near else "onecurve"
    longer = f"train.steps={2 * read_status(folder)['steps']}"
    same = [part for part in overrides if not part.startswith(("train.steps=", "run.fresh="))]
    again = shlex.join([name, "train", "-n", str(procs), *same, longer])
    print(f"\nreport  {folder / 'report.html'}\n\nnext:")
    print(f"  {name} sample {folder} --prompt 'JULIET:'   # more text from the model")
    print(f"  {again}   # go on: the same run, twice as long")
    print(f"  {name} data pack my_texts/ --out my_shards   # your own text as shards")
