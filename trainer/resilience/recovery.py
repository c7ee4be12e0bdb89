"""What the loop does about bad steps and wrong weights, and how it restores a checkpoint. All ranks do the same."""

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


def restore(job: Job, found: FoundCheckpoint) -> None:
    """Fills the strategy with what a checkpoint holds."""
    same = found.manifest["config"]["optimizer"]["name"] == job.config.optimizer.name
    reset = load_models(job.models, found, same_optimizer=same)
    names = sorted({name for others in job.topology.gather(reset if same else []) for name in others})
    if names:
        job.logger.event(kind="optimizer_state_reset", count=len(names), parameters=names[:NAMED])
    job.resilience.guard.load_state(found.manifest.get("guard", {}))
    job.saver.resume_from(found.manifest["step"])


def load_models(models: Strategy | RunModels, found: FoundCheckpoint, *, same_optimizer: bool) -> list[str]:
    """Fills models. State that another optimizer kept is of no use: that of parameters of which the checkpoint has
    other kinds than are kept now (`optimizer.adamw_modules` was changed, or all of it) begins anew. Returns their
    names."""
    state = dict(models.state())
    now, then = _kinds(state), _kinds(found.index)
    reset = {
        name: kinds
        for name, kinds in now.items()
        if kinds != then.get(name) or not (same_optimizer or "/" in name)  # another model has an optimizer of its own
    }
    anew = {path for path in state if (part := _kind_of(path)) and part[1] in reset.get(part[0], ())}
    for path in anew:
        local_values(state[path]).zero_()
    read_state(found, {path: tensor for path, tensor in state.items() if path not in anew})
    models.load_state(state)
    return list(reset)


def _kinds(paths: Iterable[str]) -> dict[str, set[str]]:
    """What an optimizer keeps of each parameter, besides what may be switched on and off."""
    kinds: dict[str, set[str]] = {}
    for path in paths:
        if found := _kind_of(path):
            parameter, kind = found
            of_parameter = kinds.setdefault(parameter, set())
            if not model_of(path)[1].startswith(OPTIONAL):
                of_parameter.add(kind)
    return kinds


def _kind_of(path: str) -> tuple[str, str] | None:
    """Returns of state of an optimizer the parameter, `critic/` before it in another model than the run's, and what it
    is of it."""
    model, rest = model_of(path)
    if not rest.startswith(OPTIMIZER):
        return None
    _, kind, name = rest.split("/", 2)
    return f"{model}/{name}" if model else name, kind


def handle_bad_steps(job: Job, rows: list[dict[str, Any]], bad: list[bool], steps: list[StepData]) -> None:
    """Says what follows bad steps. Raises Rollback, or TrainingError."""
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
    """Raises Rollback, Crashed or TrainingError because some ranks did an update that others did not: one computes
    wrongly."""
    _go_back(job, step, [], f"{count} of {job.topology.world_size} processes left a step out")


def compare_replicas(job: Job, step: int) -> None:
    """Raises Rollback or Crashed where a process has other weights than those it shares them with; or TrainingError."""
    if differing := job.resilience.replicas.find_differing(job.models.state(everything=True)):
        _go_back(job, step, differing, "replicas differ")


def _go_back(job: Job, step: int, differing: list[int], why: str) -> None:
    wait_for_save(job)
    event = job.resilience.guard.handle_corruption(step, differing, may_go_back=job.saver.newest is not None)
    job.logger.event(**event)
    if job.models.state(everything=True).keys() - job.models.state().keys():  # not in the checkpoint: maybe those
        raise Crashed(f"{event['reason']}. A new start reads frozen weights again; run the same command to continue")
    raise Rollback(why)


def wait_for_save(job: Job) -> None:
    with job.clock.watched_elsewhere():
        events = job.saver.wait()
    job.logger.events(events)
