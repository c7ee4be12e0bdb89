"""One life of a run, on every rank: join, open the data, take the folder, train, and tell how it ended."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from trainer import fault_points, loop, sampling
from trainer.build import build
from trainer.config import Config
from trainer.config.compose import recipe_message
from trainer.data.tokenizer import Tokenizer
from trainer.diagnosis import advice_for
from trainer.errors import ConfigError, Crashed, Interrupted, OnecurveError, PeerLost, TrainingError
from trainer.files import replace_file
from trainer.frozen_models import build_frozen, open_frozen
from trainer.job import Job
from trainer.machine import check_machine
from trainer.models import pretrained_files
from trainer.models.factory import check_transforms
from trainer.plugin_checks import check_plugins, rehearse
from trainer.pretrained import open_pretrained
from trainer.processes import record_attempt
from trainer.resilience import interruption
from trainer.resilience.time_ledger import GOODPUT, TimeLedger
from trainer.resilience.watchdog import Watchdog
from trainer.run_data import open_run_data, open_shards
from trainer.run_directory import RunDirectory, will_restart, write_final_status
from trainer.secrets import prose
from trainer.topology import Topology, join, world_size
from trainer.tracking.report import write_report
from trainer.tracking.run_files import RunFiles

log = logging.getLogger("onecurve")

# Of code that has never worked, these come again: there is no use in a restart.
MISTAKES = (TypeError, AttributeError, NameError, ImportError, NotImplementedError, KeyError, IndexError)


def run(config: Config, started_at: float) -> None:
    """Trains as `config` says. `started_at` is the `time.monotonic()` of the process's start.

    Raises OnecurveError: Interrupted (saved), ConfigError (nothing was started), DataError, TrainingError, PeerLost.
    """
    topology = join(config.launch.timeout_s, config.layout(world_size()))
    interruption.listen()
    if topology.is_main:
        record_attempt(Path(config.run.dir).expanduser())  # of one that goes on; a new one says so with its status
    check_machine(config, topology.device)
    check_plugins(config)
    found = open_shards(config, topology)
    check_transforms(config, found.tokenizer)
    pretrained = open_pretrained(config, topology, found.tokenizer)
    frozen = open_frozen(config, topology, found.tokenizer)
    prints = {name: model.fingerprint for name, model in frozen.items()}
    identity = partial(found.identity, config, pretrained.fingerprint if pretrained else None, prints)
    folder = RunDirectory(config, identity, topology, started_at)
    with folder, _log(folder.path, topology.rank):
        job, stopped = None, None
        if topology.is_main:
            interruption.before_leaving_at_once(partial(write_final_status, folder.path))
            _tell_recipe(config)
        fault_points.arm(config.debug.faults, folder.path, topology.rank)
        run_files = RunFiles(folder.path)
        clock = TimeLedger(run_files.open_appender(GOODPUT) if topology.is_main else None, started_at)
        watchdog = Watchdog(config.watchdog, topology, folder, clock, config.train.compile)
        try:
            run_data = open_run_data(config, topology, found)
            folder.keep(run_data.tokenizer, run_data.catalog)
            if pretrained and topology.is_main:
                pretrained_files.keep(folder.path, pretrained.beside)
            job = build(
                config, topology, run_data, folder, identity, run_files, clock, watchdog,
                pretrained.fill if pretrained else None, build_frozen(config, topology, run_data, frozen),
            )  # fmt: skip
            fault_points.point("start.built")
            rehearse(job)
            try:
                loop.train(job)
                job.logger.close("finished")
            except Interrupted as stop:
                stopped = stop
                job.logger.close("interrupted", str(stop), stop.exit_code)
        except BaseException as failure:
            log.error("%s", "".join(traceback.format_exception(failure)))
            try:
                raise _report_failure(failure, config, topology, folder, job) from failure
            finally:
                if job is not None:
                    with clock.watched_elsewhere():  # a save in flight, which waits for ranks that may be gone
                        job.close()
                watchdog.close()
        watchdog.close()
        # The status is the last word: nothing that follows can change it, nor the exit code.
        exit_code = stopped.exit_code if stopped else 0
        interruption.before_leaving_at_once(lambda *_: os._exit(exit_code))
        with _ignore_failure(folder.path, "samples or report"):
            try:
                if not stopped:
                    fault_points.point("end.finished")
                    model = sampling.trained_model(config, job.strategy, found.tokenizer, topology)
            finally:
                job.close()
            topology.close()
            if topology.is_main and not stopped:
                _show(config, folder.path, found.tokenizer, model)
        if stopped:
            raise stopped


def _tell_recipe(config: Config) -> None:
    """Says which recipe the config was composed with, as nobody may have named it; a launcher has told of its own."""
    if config.track.console and (told := recipe_message()):
        with suppress(BrokenPipeError):  # the console looks after that
            print(f"{'recipe':12}{told}", flush=True)


def _report_failure(
    failure: BaseException, config: Config, topology: Topology, folder: RunDirectory, job: Job | None
) -> OnecurveError:
    """Tells of a failure once for all ranks; gives the error that this rank ends with."""
    begun = job is not None and job.clock.step > 0
    error, lost_peer = _explain(failure, config, folder.path, topology, begun)
    first = folder.fail(topology.rank, error, lost_peer, job.clock.step if job else 0)
    error.recorded = True
    if topology.is_main:
        with suppress(Exception):  # the disk may be what failed
            if first["retry"] and will_restart():
                pass  # the next life tells of it
            elif job is not None:
                job.logger.close("failed", first["reason"], first["exit_code"])
            else:
                write_final_status(folder.path, first["reason"], first["exit_code"])
    return error if first["rank"] == topology.rank else PeerLost(first["reason"], first["exit_code"])


def _explain(
    failure: BaseException, config: Config, folder: Path, topology: Topology, begun: bool
) -> tuple[OnecurveError, bool]:
    """The cause and what to change, where we know it; and whether it is only that another rank is gone. `begun`: the
    run has done a step, so its code has worked once."""
    if isinstance(failure, ConfigError):  # found too late to be a refusal: told by whoever was first, as a failure
        return OnecurveError(str(failure), failure.exit_code), False
    if isinstance(failure, OnecurveError):
        return failure, False
    no_memory = isinstance(failure, (torch.OutOfMemoryError, MemoryError))
    if no_memory or "can't allocate memory" in str(failure):  # torch's words on a CPU
        micro_batch = config.train.micro_batch or config.train.global_batch // topology.dp_size
        ways = ["train.activation_checkpointing=full"] if config.train.activation_checkpointing != "full" else []
        if micro_batch > 1:
            ways.append(
                f"train.micro_batch below {micro_batch} (the global batch of {config.train.global_batch} stays)"
            )
        return TrainingError(f"out of memory: try {' or '.join(ways or ['a smaller model'])}. {failure}"), False
    first_line = f"{type(failure).__name__}: {failure}".partition("\n")[0]
    trace = f"(traceback: {folder}/logs/rank-{topology.rank}.log)"
    if known := advice_for(str(failure)):
        first_line += f": {known}"
    lost_peer = isinstance(failure, dist.DistError) or "gloo" in str(failure) or "Connection closed" in str(failure)
    if topology.world_size > 1 and lost_peer:
        return Crashed(f"lost another process, or the way to it: {first_line} {trace}"), True
    fails_again = isinstance(failure, MISTAKES) and not begun
    return (TrainingError if fails_again else Crashed)(f"{first_line} {trace}"), False


def _show(config: Config, folder: Path, tokenizer: Tokenizer, model: nn.Module | None) -> None:
    """Samples (where there is a model to draw them from) and report of a finished run, until somebody asks to end."""
    texts = sampling.sample(config, model, tokenizer, interruption.is_stop_requested) if model is not None else []
    if interruption.is_stop_requested():
        return
    if texts:
        replace_file(folder / "samples.txt", ("\n\n---\n\n".join(texts) + "\n").encode())
    if config.track.report:
        write_report(folder)
    if texts and config.track.console:  # last: a terminal may fail
        print(f"\nsample (more in {Path(config.run.dir) / 'samples.txt'}):\n\n{texts[0]}")


@contextmanager
def _ignore_failure(folder: Path, what: str) -> Iterator[None]:
    """Trouble behind the end of a run is reported, and changes nothing about it."""
    try:
        yield
    except Exception as error:
        log.exception(what)
        print(
            f"onecurve: the run in {folder} has ended and is saved, but {what} failed: {prose(str(error))}",
            file=sys.stderr,
        )


class _Formatter(logging.Formatter):
    """Leaves credentials out of what others wrote into their exceptions."""

    def format(self, record: logging.LogRecord) -> str:
        return prose(super().format(record))


@contextmanager
def _log(folder: Path, rank: int) -> Iterator[None]:
    """Warnings and tracebacks of each rank in a file of its own, `logs/rank-N.log`; under `onecurve train` all else
    that ranks other than the main one write, too."""
    handler = logging.FileHandler(folder / "logs" / f"rank-{rank}.log")
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [log, logging.getLogger("py.warnings")]
    logging.captureWarnings(True)
    log.setLevel(logging.INFO)
    log.propagate = False
    for logger in loggers:
        logger.addHandler(handler)
    log.info("rank %d started: python %s, torch %s", rank, sys.version.split()[0], torch.__version__)
    errors = os.dup(2)
    if rank and "ONECURVE_LIFE" in os.environ:
        with open(handler.baseFilename, "ab") as file:
            os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(errors, 2)
        os.close(errors)
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
