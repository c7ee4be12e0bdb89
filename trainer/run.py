"""One life of a run, on every rank: join, build, train, and the end that its folder and exit code will tell."""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from trainer import loop, sampling
from trainer.build import build
from trainer.config import Config
from trainer.errors import Interrupted, OnecurveError, PeerLost, TrainingError
from trainer.topology import join
from trainer.tracking.report import write_report

log = logging.getLogger("onecurve")


def run(config: Config, born: float) -> None:
    """Trains as `config` says. `born` is the `time.monotonic()` of the process's start.

    Raises OnecurveError: Interrupted (saved), ConfigError (nothing was started), DataError, TrainingError.
    """
    topology = join(config.launch.timeout_s)
    job = build(config, topology, born)
    _open_log(job.folder.path, topology.rank)
    try:
        loop.train(job)
        finish(job)
    except Interrupted as stop:
        job.journal.close("interrupted", str(stop), stop.exit_code)
        raise
    except BaseException as failure:
        log.error("%s", "".join(traceback.format_exception(failure)))
        error = _explained(failure, job)
        if not isinstance(error, PeerLost):
            job.journal.close("failed", str(error), error.exit_code)
        raise error from failure
    finally:
        job.stream.close()
        job.saver.close()
        job.strategy.close()
        job.folder.close()
    topology.close()


def finish(job: loop.Job) -> None:
    """Samples and report, on the main rank."""
    config, folder = job.config, job.folder.path
    weights = dict(job.strategy.full_weights())
    if not job.topology.is_main:
        return
    if config.sample.count:
        tokenizer = job.tokenizer
        texts = sampling.sample(config, sampling.with_weights(config, tokenizer, weights), tokenizer)
        (folder / "samples.txt").write_text("\n\n---\n\n".join(texts) + "\n")
    job.journal.close("finished")
    if config.track.report:
        write_report(folder)


def _explained(failure: BaseException, job: loop.Job) -> OnecurveError:
    """What to tell of a failure: the cause and what to change, where we know it."""
    config = job.config
    if isinstance(failure, OnecurveError):
        return failure
    if isinstance(failure, dist.DistError) or "gloo" in str(failure) or "Connection" in str(failure):
        if status := job.journal.told_elsewhere():
            return PeerLost(status)
        return TrainingError(f"lost the other processes: {_first_line(failure)}")
    if isinstance(failure, (torch.OutOfMemoryError, MemoryError)):
        return TrainingError(
            f"out of memory: set train.micro_batch below {config.train.micro_batch or 'the whole share'} (the global "
            f"batch of {config.train.global_batch} stays), or train.activation_checkpointing=full. {failure}"
        )
    return TrainingError(f"{_first_line(failure)} (traceback: {job.folder.path}/logs/rank-{job.topology.rank}.log)")


def _first_line(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {failure}".partition("\n")[0]


def _open_log(folder: Path, rank: int) -> None:
    """Warnings and tracebacks of each rank in a file of its own."""
    (folder / "logs").mkdir(exist_ok=True)
    handler = logging.FileHandler(folder / "logs" / f"rank-{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)
    for name in ("onecurve", "py.warnings"):
        logging.getLogger(name).addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    log.info("rank %d started: python %s, torch %s", rank, sys.version.split()[0], torch.__version__)
