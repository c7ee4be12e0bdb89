"""The one training loop. It says verbs to its collaborators and knows none of their kinds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.load import newest
from trainer.checkpoint.plan import fingerprint_of
from trainer.checkpoint.save import Saver
from trainer.config import Config
from trainer.config.interval import Interval
from trainer.data.stream import Batch, StepData, Stream
from trainer.errors import Interrupted, TrainingError
from trainer.fault_points import point
from trainer.folder import Identity, RunFolder
from trainer.objectives import Sums
from trainer.optim.schedule import Schedule
from trainer.resilience.agreement import AgreedStream
from trainer.resilience.guard import Guard, Rollback
from trainer.resilience.interruption import SAVE, STOP, Requests
from trainer.resilience.quarantine import Quarantine
from trainer.resilience.recovery import compare_replicas, judge, part_ways, restore, wait_for_save
from trainer.resilience.replicas import Replicas
from trainer.resilience.stragglers import Stragglers
from trainer.resilience.timeledger import TimeLedger
from trainer.strategies.base import Strategy, Update
from trainer.topology import Topology
from trainer.tracking.journal import Journal
from trainer.utilization import Meter

VOTE_SECONDS = 5.0  # a request from outside waits no longer than this (or one step) for its vote


@dataclass
class Progress:
    """Where the run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    samples: int = 0


@dataclass
class Job:
    """Everything the loop talks to. `build.py` makes it."""

    config: Config
    topology: Topology
    strategy: Strategy
    schedule: Schedule
    stream: Stream | AgreedStream
    validation: Iterable[Batch] | None
    saver: Saver
    requests: Requests
    journal: Journal
    quarantine: Quarantine
    guard: Guard
    replicas: Replicas
    stragglers: Stragglers
    meter: Meter
    clock: TimeLedger
    folder: RunFolder
    identity: Identity  # goes into each checkpoint's manifest
    born: float  # `time.monotonic()` of the start; of the launcher, where it restarts the run
    time_limit: float  # seconds since then; then the run stops as if it was asked to
    closed: bool = False

    def close(self) -> None:
        """Ends threads and lets go of the process group; once."""
        if self.closed:
            return
        self.closed = True
        self.stream.close()
        self.saver.close()
        self.strategy.close()


@dataclass
class Unread:
    """Steps whose numbers still lie on the device."""

    steps: list[StepData] = field(default_factory=list)
    sums: list[Sums] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    fingerprints: list[Tensor] = field(default_factory=list)
    data_wait: float = 0.0
    since: float = field(default_factory=time.monotonic)
    pace: float = VOTE_SECONDS  # seconds a step took when the numbers were last read

    def take(self, data: StepData, sums: Sums, update: Update) -> None:
        self.steps.append(data)
        self.sums.append(sums)
        self.updates.append(update)


def train(job: Job) -> Progress:
    """Trains to the last step. Raises Interrupted (saved), TrainingError or DataError."""
    progress = start(job)
    while True:
        try:
            return go_on(job, progress)
        except Rollback:
            progress = go_back(job)


def go_on(job: Job, progress: Progress) -> Progress:
    """Trains from here to the last step. Raises Rollback where the last checkpoint is to be gone on from instead."""
    config, clock, strategy, guard = job.config, job.clock, job.strategy, job.guard
    saving, saved_at = Interval.parse(config.checkpoint.every), None
    unread, read_every = Unread(), 1
    while progress.step < config.train.steps:
        clock.switch("data_wait")
        point("data.next")
        data = next(job.stream)
        unread.data_wait += clock.switch("productive")
        point("step.weights", strategy.state)
        sums = strategy.train_step(data.micro_batches)
        point("step.after_backward")
        loss = mean_loss(strategy, sums) if guard.watches_loss else None
        update = strategy.update(job.schedule(data.step), guard.limit(loss))
        guard.took(update.grad_norm, loss, update.skipped)
        point("step.after_update")
        unread.take(data, sums, update)
        if config.track.fingerprint:
            unread.fingerprints.append(fingerprint_of(strategy.state()))
        progress.step = clock.step = data.step
        job.journal.events(job.saver.poll())
        if _every(config.guard.replicas_every, progress.step):
            compare_replicas(job, progress.step)

        last = progress.step == config.train.steps
        evaluate_now = last or _every(config.eval.every, progress.step)
        save_now = last or (saving.unit == "steps" and _every(saving.amount, progress.step))
        if not (evaluate_now or save_now or len(unread.steps) >= read_every):
            continue

        votes, rows, bad = read_numbers(job, unread, progress, time.monotonic() - job.born)
        judge(job, rows, bad, unread.steps)
        job.stragglers.took(unread.data_wait, strategy.timer.read())
        job.journal.events(job.stragglers.look(progress.step, votes["elapsed"]))
        read_every = min(config.train.log_every, max(1, int(VOTE_SECONDS / votes["pace"])))
        if evaluate_now and job.validation is not None:
            clock.switch("evaluation")
            rows[-1]["eval"] = evaluate(job)
            clock.switch("productive")
        for event in job.quarantine.steps(unread.steps):
            job.journal.event("quarantined", **event)
        point("track.rows")
        job.journal.rows(rows, unread.steps)
        now = readings(progress, votes["elapsed"])
        stop = votes["stop"] > 0 and not last
        if stop or save_now or votes["save"] > 0 or saving.due(saved_at or now, now):
            save(job, progress, rows[-1].get("eval"), must=stop or last)
        saved_at, unread = now, Unread(pace=rows[-1]["step_s"])
        if stop:
            finish_saving(job)
        clock.write(progress.step)
        if stop:
            job.requests.done(STOP)
            asked = f"as asked{' by SIGUSR1' if votes['give_way'] > 0 else ''}"
            raise Interrupted(f"stopped at step {progress.step} {asked}, saved: run the same command to continue")
    finish_saving(job)
    clock.write(progress.step)
    return progress


def start(job: Job) -> Progress:
    """Takes up the checkpoint that was found, or starts at step 0."""
    found = job.folder.found
    progress = Progress(**found.manifest["progress"]) if found else Progress()
    job.clock.restored(progress.step)
    job.journal.start(progress.step, resumed=found is not None)
    job.journal.events(job.folder.events)
    if found:
        restore(job, found)
    for event in job.quarantine.opened(job.stream.faults):
        job.journal.event("quarantined", **event)
    job.stream.seek(progress.step, job.quarantine.left_out)
    point("start.restored")
    if found is None and job.config.guard.bad_step == "rollback" and Interval.parse(job.config.checkpoint.every).amount:
        save(job, progress, None, must=False)  # where a bad step before the first checkpoint goes back to
    return progress


def go_back(job: Job) -> Progress:
    """Takes up the newest checkpoint, in the middle of the run: what came after it is done again."""
    found, events = newest(job.saver.folder, job.topology)
    if found is None:
        raise TrainingError(f"{job.saver.folder}: there is no checkpoint to go back to any more")
    progress = Progress(**found.manifest["progress"])
    job.clock.restored(progress.step)
    job.journal.rewind(progress.step)
    job.journal.events([*events, {"kind": "rollback"}])
    restore(job, found)
    job.stream.seek(progress.step, job.quarantine.left_out)
    return progress


def read_numbers(
    job: Job, unread: Unread, progress: Progress, elapsed: float
) -> tuple[dict[str, float], list[dict[str, Any]], list[bool]]:
    """Reads the device's numbers since the last reading: the ranks' votes, one row a step, and whether that was bad.
    One collective."""
    point("numbers.read")
    n, main = len(unread.steps), job.topology.is_main
    sums = {f"sum/{name}": torch.stack([part[name] for part in unread.sums]) for name in unread.sums[0]}
    save = job.requests.save() or (main and job.saver.overdue)
    over = main and elapsed > job.time_limit
    own = {
        "stop": job.requests.stop() or over,
        "give_way": job.requests.give_way(),
        "save": save,
        "elapsed": elapsed if main else 0.0,
    }
    own["pace"] = unread.pace / job.topology.world_size
    votes = {f"vote/{name}": torch.full((n,), float(value), dtype=torch.float64) for name, value in own.items()}
    prints = {"fingerprint": torch.stack(unread.fingerprints)} if unread.fingerprints else {}
    judged = {name: torch.stack([getattr(update, name) for update in unread.updates]) for name in ("bad", "skipped")}
    numbers = job.strategy.reduce({**sums, **votes, **prints, **judged})
    norms = torch.stack([update.grad_norm for update in unread.updates]).tolist()
    skipped, bad = ([count > 0 for count in numbers[name]] for name in ("skipped", "bad"))
    if parted := [count for count in numbers["skipped"] if 0 < count < job.topology.world_size]:
        part_ways(job, progress.step, int(parted[0]))

    step_s, memory = (time.monotonic() - unread.since) / n, job.meter.memory()
    rows = []
    for i, data in enumerate(unread.steps):
        count = int(numbers["sum/count"][i])
        loss = numbers["sum/loss"][i] / max(1, count)
        progress.tokens += count
        progress.samples = data.taken
        rows.append({
            "step": data.step, "loss": loss, "grad_norm": norms[i], "lr": job.schedule(data.step),
            "tokens": progress.tokens, "samples": progress.samples, "step_s": round(step_s, 6),
            "data_wait_s": round(unread.data_wait / n, 6), "tokens_per_s": round(count / step_s, 1),
            "skipped": bool(skipped[i]), **job.meter.mfu(data.step, step_s), **memory,
            **{name: f"{int(values[i]):x}" for name, values in numbers.items() if name in prints},
        })  # fmt: skip
        bad[i] |= not math.isfinite(loss)
    return {name: numbers[f"vote/{name}"][-1] for name in own}, rows, bad


def mean_loss(strategy: Strategy, sums: Sums) -> float:
    """Of the step, over all processes, before its update."""
    total = strategy.reduce({name: sums[name].reshape(1) for name in ("loss", "count")})
    return total["loss"][0] / max(1.0, total["count"][0])


def evaluate(job: Job) -> dict[str, float]:
    """One pass over the validation split; the same numbers on every rank."""
    totals: Sums = {}
    for batch in job.validation or ():
        job.clock.progressed()
        point("eval.batch")
        for name, value in job.strategy.eval_step(batch).items():
            totals[name] = totals[name] + value if name in totals else value
    sums = job.strategy.reduce({name: value.reshape(1) for name, value in totals.items()})
    return job.strategy.objective.summary({name: value[0] for name, value in sums.items()})


def save(job: Job, progress: Progress, evaluation: dict[str, float] | None, must: bool) -> None:
    """Saves as of now. A save that fails is reported and does not end the run. `evaluation`: what was measured now;
    `must`: the run ends here."""
    job.clock.switch("checkpoint")
    about = {
        "progress": asdict(progress),
        "identity": job.identity(progress.step),
        "config": job.config.resolved(),
        "topology": job.topology.describe(),
        "evaluation": evaluation,
        "guard": job.guard.state(),
    }
    state = job.strategy.state()
    with job.clock.watched_elsewhere():  # it may wait for the save before
        events = job.saver.save(progress.step, state, about, must)
    job.journal.events(events)
    job.requests.done(SAVE)
    job.clock.switch("productive")


def finish_saving(job: Job) -> None:
    """Waits for the save in flight. Raises TrainingError if the run would end without it."""
    job.clock.switch("checkpoint")
    wait_for_save(job)
    job.clock.switch("finishing")
    if job.saver.problem is not None:
        raise TrainingError(f"the last checkpoint could not be saved: {job.saver.problem}")


def readings(progress: Progress, elapsed: float) -> dict[str, float]:
    return {"steps": progress.step, "tokens": progress.tokens, "seconds": elapsed}


def _every(amount: int, step: int) -> bool:
    return bool(amount) and step % amount == 0
