"""One attempt of a run, on every rank: join, open the data, take the run directory, train, and report the end."""

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

# Errors that a restart cannot help against, if the code has never worked before.
MISTAKES = (TypeError, AttributeError, NameError, ImportError, NotImplementedError, KeyError, IndexError)


def run(config: Config, started_at: float) -> None:
    """Trains as `config` says. `started_at` is the `time.monotonic()` of the process's start.

    Raises OnecurveError: Interrupted (saved), ConfigError (nothing was started), DataError, TrainingError, PeerLost.
    """
    topology = join(config.launch.timeout_s, config.layout(world_size()))
    interruption.listen()
    if topology.is_main:
        record_attempt(Path(config.run.dir).expanduser())  # of a resumed run; a new one reports itself by its status
    check_machine(config, topology.device)
    check_plugins(config)
    data = open_shards(config, topology)
    check_transforms(config, data.tokenizer)
    pretrained = open_pretrained(config, topology, data.tokenizer)
    frozen = open_frozen(config, topology, data.tokenizer)
    fingerprints = {name: model.fingerprint for name, model in frozen.items()}
    identity = partial(data.identity, config, pretrained.fingerprint if pretrained else None, fingerprints)
    folder = RunDirectory(config, identity, topology, started_at)
    with folder, _log_to_file(folder.path, topology.rank):
        job, interruption_error = None, None
        if topology.is_main:
            interruption.set_exit_callback(partial(write_final_status, folder.path))
            _print_recipe(config)
        fault_points.arm(config.debug.faults, folder.path, topology.rank)
        run_files = RunFiles(folder.path)
        clock = TimeLedger(run_files.open_appender(GOODPUT) if topology.is_main else None, started_at)
        watchdog = Watchdog(config.watchdog, topology, folder, clock, config.train.compile)
        try:
            run_data = open_run_data(config, topology, data)
            folder.keep(run_data.tokenizer, run_data.catalog)
            if pretrained and topology.is_main:
                pretrained_files.keep(folder.path, pretrained.other_files)
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
                interruption_error = stop
                job.logger.close("interrupted", str(stop), stop.exit_code)
        except BaseException as failure:
            log.error("%s", "".join(traceback.format_exception(failure)))
            try:
                raise _report_failure(failure, config, topology, folder, job) from failure
            finally:
                if job is not None:
                    with clock.pause_watchdog():  # a save in flight may wait for ranks that are gone
                        job.close()
                watchdog.close()
        watchdog.close()
        # The status is the last word: nothing that follows can change it, nor the exit code.
        exit_code = interruption_error.exit_code if interruption_error else 0
        interruption.set_exit_callback(lambda *_: os._exit(exit_code))
        with _ignore_failure(folder.path, "samples or report"):
            try:
                if not interruption_error:
                    fault_points.point("end.finished")
                    model = sampling.trained_model(config, job.strategy, data.tokenizer, topology)
            finally:
                job.close()
            topology.close()
            if topology.is_main and not interruption_error:
                _show(config, folder.path, data.tokenizer, model)
        if interruption_error:
            raise interruption_error


def _print_recipe(config: Config) -> None:
    """Prints the recipe that the config was composed with, as nobody may have named it; a launcher prints its own."""
    if config.track.console and (message := recipe_message()):
        with suppress(BrokenPipeError):  # the console tracker handles that
            print(f"{'recipe':12}{message}", flush=True)


def _report_failure(
    failure: BaseException, config: Config, topology: Topology, folder: RunDirectory, job: Job | None
) -> OnecurveError:
    """Reports a failure once for all ranks; returns the error that this rank ends with."""
    has_done_steps = job is not None and job.clock.step > 0
    error, lost_peer = _explain(failure, config, folder.path, topology, has_done_steps)
    first = folder.fail(topology.rank, error, lost_peer, job.clock.step if job else 0)
    error.recorded = True
    if topology.is_main:
        with suppress(Exception):  # the disk may be what failed
            if first["retry"] and will_restart():
                pass  # the next attempt reports it
            elif job is not None:
                job.logger.close("failed", first["reason"], first["exit_code"])
            else:
                write_final_status(folder.path, first["reason"], first["exit_code"])
    return error if first["rank"] == topology.rank else PeerLost(first["reason"], first["exit_code"])


def _explain(
    failure: BaseException, config: Config, folder: Path, topology: Topology, has_done_steps: bool
) -> tuple[OnecurveError, bool]:
    """Returns the cause and, if known, what to change; and whether this rank only lost another one. `has_done_steps`:
    the run has done a step, so its code has worked once."""
    if isinstance(failure, ConfigError):  # found too late to refuse the start: a failure that the first rank reports
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
    if advice := advice_for(str(failure)):
        first_line += f": {advice}"
    lost_peer = isinstance(failure, dist.DistError) or "gloo" in str(failure) or "Connection closed" in str(failure)
    if topology.world_size > 1 and lost_peer:
        return Crashed(f"lost another process, or the way to it: {first_line} {trace}"), True
    fails_again = isinstance(failure, MISTAKES) and not has_done_steps
    return (TrainingError if fails_again else Crashed)(f"{first_line} {trace}"), False


def _show(config: Config, folder: Path, tokenizer: Tokenizer, model: nn.Module | None) -> None:
    """Writes samples (if there is a model) and the report of a finished run, unless a stop is requested meanwhile."""
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
def _ignore_failure(folder: Path, work: str) -> Iterator[None]:
    """Prints a failure after the end of a run instead of raising it."""
    try:
        yield
    except Exception as error:
        log.exception(work)
        print(
            f"onecurve: the run in {folder} has ended and is saved, but {work} failed: {prose(str(error))}",
            file=sys.stderr,
        )


class _Formatter(logging.Formatter):
    """Removes credentials from the texts of exceptions."""

    def format(self, record: logging.LogRecord) -> str:
        return prose(super().format(record))


@contextmanager
def _log_to_file(folder: Path, rank: int) -> Iterator[None]:
    """Logs warnings and tracebacks of each rank to its own file, `logs/rank-N.log`; under `onecurve train` also all
    other stderr output of ranks other than the main one."""
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
