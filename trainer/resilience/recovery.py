"""Handles bad steps and wrong weights, and restores checkpoints. All ranks do the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trainer.checkpoint.load import OPTIONAL, FoundCheckpoint, read_state
from trainer.checkpoint.state import local_values, model_of
from trainer.data.stream import StepData
from trainer.errors import Crashed, TrainingError
from trainer.job import Job
from trainer.resilience.guard import Rollback
from trainer.run_models import RunModels
from trainer.strategies.base import Strategy

OPTIMIZER = "optimizer/"
NAMED = 20  # parameters in an event


def restore(job: Job, checkpoint: FoundCheckpoint) -> None:
    """Loads a checkpoint into the models, the guard and the saver."""
    same_optimizer = checkpoint.manifest["config"]["optimizer"]["name"] == job.config.optimizer.name
    reset = load_models(job.models, checkpoint, same_optimizer=same_optimizer)
    names = sorted(
        {name for names_of_rank in job.topology.gather(reset if same_optimizer else []) for name in names_of_rank}
    )
    if names:
        job.logger.event(kind="optimizer_state_reset", count=len(names), parameters=names[:NAMED])
    job.resilience.guard.load_state(checkpoint.manifest.get("guard", {}))
    job.saver.resume_from(checkpoint.manifest["step"])


def load_models(models: Strategy | RunModels, checkpoint: FoundCheckpoint, *, same_optimizer: bool) -> list[str]:
    """Loads models from a checkpoint. State of another optimizer is useless: if the checkpoint has other kinds of state
    for a parameter than are needed now (`optimizer.adamw_modules` or the optimizer was changed), its state is reset.
    Returns the names of these parameters."""
    state = dict(models.state())
    current_kinds, saved_kinds = _collect_kinds(state), _collect_kinds(checkpoint.index)
    reset = {
        name: kinds
        for name, kinds in current_kinds.items()
        if kinds != saved_kinds.get(name)
        or not (same_optimizer or "/" in name)  # another model has an optimizer of its own
    }
    reset_paths = {
        path
        for path in state
        if (parameter_and_kind := _split_path(path)) and parameter_and_kind[1] in reset.get(parameter_and_kind[0], ())
    }
    for path in reset_paths:
        local_values(state[path]).zero_()
    read_state(checkpoint, {path: tensor for path, tensor in state.items() if path not in reset_paths})
    models.load_state(state)
    return list(reset)


def _collect_kinds(paths: Iterable[str]) -> dict[str, set[str]]:
    """Returns the kinds of optimizer state of each parameter, without those that may be switched on and off."""
    kinds: dict[str, set[str]] = {}
    for path in paths:
        if parameter_and_kind := _split_path(path):
            parameter, kind = parameter_and_kind
            parameter_kinds = kinds.setdefault(parameter, set())
            if not model_of(path)[1].startswith(OPTIONAL):
                parameter_kinds.add(kind)
    return kinds


def _split_path(path: str) -> tuple[str, str] | None:
    """Returns the parameter and the kind of an optimizer's state, or None for other paths. In another model than the
    run's the parameter begins with the model's name, as in `critic/`."""
    model, local_path = model_of(path)
    if not local_path.startswith(OPTIMIZER):
        return None
    _, kind, name = local_path.split("/", 2)
    return f"{model}/{name}" if model else name, kind


def handle_bad_steps(job: Job, rows: list[dict[str, Any]], bad: list[bool], steps: list[StepData]) -> None:
    """Handles the bad steps among these. Raises Rollback or TrainingError if the guard decides so."""
    if any(bad):
        wait_for_save(job)
    for i, row in enumerate(rows):
        if not bad[i]:
            job.resilience.guard.note_good_step(row["step"])
            continue
        try:
            event = job.resilience.guard.judge(row, may_go_back=job.saver.newest is not None)
        except TrainingError:
            job.logger.ledger(steps[: i + 1])
            job.logger.rows(rows[: i + 1])
            raise
        job.logger.event(**event)
        if event["action"] == "rollback":
            raise Rollback


def raise_ranks_disagree(job: Job, step: int, count: int) -> None:
    """Raises Rollback, Crashed or TrainingError, because some ranks did an update that others did not: one of them
    computes wrongly."""
    _go_back(job, step, [], f"{count} of {job.topology.world_size} processes left a step out")


def compare_replicas(job: Job, step: int) -> None:
    """Raises Rollback, Crashed or TrainingError if a rank has other weights than its replicas."""
    if differing := job.resilience.replicas.find_differing(job.models.state(everything=True)):
        _go_back(job, step, differing, "replicas differ")


def _go_back(job: Job, step: int, differing: list[int], reason: str) -> None:
    wait_for_save(job)
    event = job.resilience.guard.handle_corruption(step, differing, may_go_back=job.saver.newest is not None)
    job.logger.event(**event)
    if job.models.state(everything=True).keys() - job.models.state().keys():  # not in the checkpoint: maybe those
        raise Crashed(f"{event['reason']}. A new start reads frozen weights again; run the same command to continue")
    raise Rollback(reason)


def wait_for_save(job: Job) -> None:
    with job.clock.pause_watchdog():
        events = job.saver.wait()
    job.logger.events(events)
