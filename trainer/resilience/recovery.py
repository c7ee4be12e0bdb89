"""What the loop does about bad steps and wrong weights, and how it takes up a checkpoint. All ranks do the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.checkpoint.load import Found, read
from trainer.data.stream import StepData
from trainer.errors import TrainingError
from trainer.resilience.guard import Rollback

if TYPE_CHECKING:
    from trainer.loop import Job


def restore(job: Job, found: Found) -> None:
    """Fills the strategy with what a checkpoint holds."""
    state = dict(job.strategy.state())
    if found.manifest["config"]["optimizer"]["name"] != job.config.optimizer.name:  # another one begins anew
        state = {name: tensor for name, tensor in state.items() if not name.startswith("optimizer/")}
    read(found, state)
    job.strategy.load_state(state)
    job.guard.load_state(found.manifest.get("guard", {}))
    job.saver.goes_on_from(found.manifest["step"])


def judge(job: Job, rows: list[dict[str, Any]], bad: list[bool], steps: list[StepData]) -> None:
    """Says what follows bad steps. Raises Rollback, or TrainingError."""
    if any(bad):
        wait_for_save(job)
    for i, row in enumerate(rows):
        if not bad[i]:
            job.guard.passed(row["step"])
            continue
        try:
            event = job.guard.judge(row, may_go_back=job.saver.newest is not None)
        except TrainingError:
            job.journal.ledger(steps[: i + 1])
            job.journal.rows(rows[: i + 1])
            raise
        job.journal.event(**event)
        if event["action"] == "rollback":
            raise Rollback


def part_ways(job: Job, step: int, count: int) -> None:
    """Some processes have done an update that others have not: one of them computes wrongly. As `compare_replicas`."""
    wait_for_save(job)
    job.journal.event(**job.guard.corrupted(step, [], may_go_back=job.saver.newest is not None))
    raise Rollback(f"{count} of {job.topology.world_size} processes left a step out")


def compare_replicas(job: Job, step: int) -> None:
    """Raises Rollback where a process has other weights than those it shares them with; or TrainingError."""
    if odd := job.replicas.odd(job.strategy.state()):
        wait_for_save(job)
        job.journal.event(**job.guard.corrupted(step, odd, may_go_back=job.saver.newest is not None))
        raise Rollback


def wait_for_save(job: Job) -> None:
    with job.clock.watched_elsewhere():
        events = job.saver.wait()
    job.journal.events(events)
