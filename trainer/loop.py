"""The one training loop. It calls its collaborators by their interfaces and knows none of their classes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.load import find_newest
from trainer.checkpoint.plan import fingerprint_of
from trainer.config.interval import Interval
from trainer.data.stream import StepData
from trainer.errors import Interrupted, TrainingError
from trainer.evaluation import Evaluation
from trainer.fault_points import point
from trainer.job import Job, Progress
from trainer.objectives import NUM_TARGETS, Objective, Sums
from trainer.resilience import interruption
from trainer.resilience.guard import Rollback
from trainer.resilience.interruption import SAVE, STOP
from trainer.resilience.recovery import compare_replicas, handle_bad_steps, raise_ranks_disagree, restore, wait_for_save
from trainer.step import MAIN, run_step
from trainer.strategies.base import Strategy, UpdateResult
from trainer.tracking import Row

VOTE_SECONDS = 5.0  # the longest that a request from outside waits for its vote (or one step, if that is longer)


@dataclass
class PendingSteps:
    """Steps whose metrics are still on the device."""

    steps: list[StepData] = field(default_factory=list)
    sums: list[Sums] = field(default_factory=list)
    updates: list[UpdateResult] = field(default_factory=list)
    fingerprints: list[Tensor] = field(default_factory=list)
    objectives: dict[str, Objective] = field(default_factory=dict)  # of the models that were updated
    data_wait: float = 0.0
    since: float = field(default_factory=time.monotonic)
    pace: float = VOTE_SECONDS  # seconds a step took when the metrics were last read

    def take(self, data: StepData, sums: Sums, update: UpdateResult) -> None:
        self.steps.append(data)
        self.sums.append(sums)
        self.updates.append(update)


def train(job: Job) -> Progress:
    """Trains to the last step. Raises Interrupted (saved), TrainingError or DataError."""
    progress = start_run(job)
    while True:
        try:
            return train_steps(job, progress)
        except Rollback:
            progress = roll_back(job)


def train_steps(job: Job, progress: Progress) -> Progress:
    """Trains from here to the last step. Raises Rollback where the run should continue from the last checkpoint."""
    config, clock, strategy = job.config, job.clock, job.strategy
    saving, saved_at = Interval.parse(config.checkpoint.every), None
    unread, read_every = PendingSteps(), 1
    while progress.step < config.train.steps:
        clock.switch("data_wait")
        point("data.next")
        data = job.stream.take(partial(should_give_up, job))
        unread.data_wait += clock.switch("productive")
        finish = partial(finish_update, job, unread, data.step)
        sums, update = run_step(job.models, strategy.objective, data.micro_batches, finish, abandoned=data.abandoned)
        unread.take(data, sums, update)
        if config.track.fingerprint:
            unread.fingerprints.append(fingerprint_of(job.models.state(everything=True)))
        progress.step = clock.step = data.step
        job.logger.events(job.saver.poll())
        if _is_multiple(config.guard.replicas_every, progress.step):
            compare_replicas(job, progress.step)

        save_now = saving.unit == "steps" and _is_multiple(saving.amount, progress.step)
        due = save_now or evaluation_is_due(job, progress.step) or progress.step == config.train.steps
        if not due and len(unread.steps) < read_every:
            continue

        votes, rows, bad = read_numbers(job, unread, progress)
        interruption.allow_immediate_exit(False)  # from here on all ranks have done a step
        handle_bad_steps(job, rows, bad, unread.steps)
        job.resilience.stragglers.record(unread.data_wait, strategy.timer.read())
        job.logger.events(job.resilience.stragglers.compare_ranks(progress.step, votes["elapsed"]))
        read_every = min(config.train.log_every, max(1, int(VOTE_SECONDS / votes["pace"])))
        now, last = interval_readings(progress, votes["elapsed"]), progress.step == config.train.steps
        stop = votes["stop"] + votes["abandoned"] > 0 and not last
        evaluate_now = evaluation_is_due(job, progress.step) and not stop
        for event in job.resilience.quarantine.add_step_faults(unread.steps):
            job.logger.event("quarantined", **event)
        point("track.rows")
        job.logger.ledger(unread.steps)
        job.logger.rows(rows[:-1] if evaluate_now else rows)
        if last or save_now or votes["save"] > 0 or saving.due(saved_at or now, now):
            save(job, progress, rows[-1] if rows else None, must=last)
        if evaluate_now:
            stop = not evaluate_step(job, progress, rows[-1])
        saved_at, unread = now, PendingSteps(pace=rows[-1]["step_s"] if rows else VOTE_SECONDS)
        if stop:
            stop_as_requested(job, progress, rows[-1] if rows else None)
        clock.write(progress.step)
    finish_saving(job)
    clock.write(progress.step)
    return progress


def finish_update(
    job: Job, unread: PendingSteps, step: int, name: str, objective: Objective, sums: Sums
) -> UpdateResult:
    """Ends an update, unless it is a bad one. For the run's own model, loss and norm are watched, too."""
    unread.objectives[name] = objective
    model, rate = job.models[name], job.schedules[name](step)
    if name != MAIN:
        return model.update(rate)
    loss = mean_loss(model, objective, sums) if job.resilience.guard.needs_loss else None
    result = model.update(rate, job.resilience.guard.limit(loss))
    job.resilience.guard.record(result.grad_norm, loss, result.skipped)
    return result


def should_give_up(job: Job) -> bool:
    """Returns whether this rank, which keeps all others waiting, should give up what it waits for."""
    return job.resilience.requests.should_give_up(is_time_over=time.monotonic() - job.started_at > job.time_limit)


def stop_as_requested(job: Job, progress: Progress, row: Row | None) -> None:
    """Saves, unless this step is saved already, and raises Interrupted."""
    request = f"as asked{' by SIGUSR1' if vote(job)['give_way'] > 0 else ''}"
    save(job, progress, row, must=True)
    finish_saving(job)
    job.clock.write(progress.step)
    job.resilience.requests.remove(STOP)
    raise Interrupted(f"stopped at step {progress.step} {request}, saved: run the same command to continue")


def start_run(job: Job) -> Progress:
    """Restores the checkpoint that was found, or starts at step 0."""
    checkpoint = job.folder.checkpoint
    progress = Progress(**checkpoint.manifest["progress"]) if checkpoint else Progress()
    job.clock.note_restore(progress.step)
    job.logger.start(progress.step, resumed=checkpoint is not None)
    job.logger.events(job.folder.events)
    if checkpoint:
        restore(job, checkpoint)
    for event in job.resilience.quarantine.add_opening_faults(job.stream.faults):
        job.logger.event("quarantined", **event)
    job.stream.seek(progress.step, job.resilience.quarantine.left_out)
    point("start.restored")
    if checkpoint:
        finish_step(job, progress, checkpoint.manifest)
    elif job.config.guard.bad_step == "rollback" and Interval.parse(job.config.checkpoint.every).amount:
        save(job, progress, None, must=False)  # the target of a rollback before the first checkpoint
    return progress


def finish_step(job: Job, progress: Progress, manifest: dict[str, Any]) -> None:
    """Completes the step that an earlier attempt saved: the evaluation, and the step's row, which waits for it. Raises
    Interrupted where a stop is asked for meanwhile."""
    row, recorded = manifest.get("row"), job.logger.recorded(progress.step)
    due = evaluation_is_due(job, progress.step)
    if recorded and "eval" in recorded:
        job.saver.record_evaluation(progress.step, recorded["eval"])
    elif row and due:
        job.logger.remove_row(progress.step)
        if not evaluate_step(job, progress, row):
            stop_as_requested(job, progress, row)
        if job.config.train.compile:  # else its sizes would count as those of training, which come first elsewhere
            torch._dynamo.reset()
    elif row and not recorded:
        job.logger.rows([row])


def roll_back(job: Job) -> Progress:
    """Goes back to the newest checkpoint in the middle of the run: the steps after it are done again."""
    interruption.allow_immediate_exit(True)
    checkpoint, events = find_newest(job.saver.folder, job.topology)
    if checkpoint is None:
        raise TrainingError(f"{job.saver.folder}: there is no checkpoint to go back to any more")
    progress = Progress(**checkpoint.manifest["progress"])
    job.clock.note_restore(progress.step)
    job.logger.rewind(progress.step)
    job.logger.events([*events, {"kind": "rollback"}])
    restore(job, checkpoint)
    job.stream.seek(progress.step, job.resilience.quarantine.left_out)
    finish_step(job, progress, checkpoint.manifest)
    return progress


def read_numbers(job: Job, unread: PendingSteps, progress: Progress) -> tuple[dict[str, float], list[Row], list[bool]]:
    """Reads the device's metrics since the last reading: the ranks' votes, one row a step, and whether the step was
    bad. A step that a rank abandoned, and those behind it, were done by no rank: they are removed from `unread` and
    `progress`. Does one collective."""
    point("numbers.read")
    n = len(unread.steps)
    zero = torch.zeros_like(unread.sums[0][NUM_TARGETS])
    # Not every step updates every model.
    names = list(dict.fromkeys(name for step_sums in unread.sums for name in step_sums))
    sums = {f"sum/{name}": torch.stack([step_sums.get(name, zero) for step_sums in unread.sums]) for name in names}
    local = {name: [value] * n for name, value in local_votes(job, unread.pace).items()}
    local["abandoned"] = [float(data.abandoned) for data in unread.steps]
    votes = {f"vote/{name}": torch.tensor(values, dtype=torch.float64) for name, values in local.items()}
    prints = {"fingerprint": torch.stack(unread.fingerprints)} if unread.fingerprints else {}
    verdicts = {name: torch.stack([getattr(update, name) for update in unread.updates]) for name in ("bad", "skipped")}
    numbers = job.strategy.reduce({**sums, **votes, **prints, **verdicts})
    norms = torch.stack([update.grad_norm for update in unread.updates]).tolist()
    skipped, bad = ([count > 0 for count in numbers[name]] for name in ("skipped", "bad"))
    if disagreements := [count for count in numbers["skipped"] if 0 < count < job.topology.world_size]:
        raise_ranks_disagree(job, progress.step, int(disagreements[0]))

    step_s, memory = (time.monotonic() - unread.since) / n, job.meter.memory()
    done = next((i for i, count in enumerate(numbers["vote/abandoned"]) if count > 0), n)
    progress.step = job.clock.step = progress.step - (n - done)
    del unread.steps[done:]
    rows = []
    for i, data in enumerate(unread.steps):
        sums_of_step = {name: numbers[f"sum/{name}"][i] for name in names}
        measured = mean_metrics(unread.objectives, sums_of_step)
        count, loss = int(sums_of_step[NUM_TARGETS]), measured.pop("loss")
        progress.tokens += count
        progress.samples = data.end_position
        rows.append({
            "step": data.step, "loss": loss, "grad_norm": norms[i], "lr": job.schedules[MAIN](data.step),
            "tokens": progress.tokens, "samples": progress.samples, "step_s": round(step_s, 6),
            "data_wait_s": round(unread.data_wait / n, 6), "tokens_per_s": round(count / step_s, 1),
            "skipped": bool(skipped[i]), **measured, **job.meter.mfu(data.step, step_s), **memory,
            **{name: f"{int(values[i]):x}" for name, values in numbers.items() if name in prints},
        })  # fmt: skip
        bad[i] |= not math.isfinite(loss)
    return {name: numbers[f"vote/{name}"][-1] for name in local}, rows, bad[:done]


def local_votes(job: Job, pace: float) -> dict[str, float]:
    """Returns what this rank adds to a vote, which is summed over all ranks: `pace` becomes the mean of the seconds
    that a step, or batch, took; `elapsed` the main rank's seconds since the start."""
    main, elapsed = job.topology.is_main, time.monotonic() - job.started_at
    return {
        "stop": float(job.resilience.requests.is_stop_requested() or (main and elapsed > job.time_limit)),
        "give_way": float(job.resilience.requests.is_requeue_requested()),
        "save": float(job.resilience.requests.is_save_requested() or (main and job.saver.overdue)),
        "elapsed": elapsed if main else 0.0,
        "pace": pace / job.topology.world_size,
    }


def vote(job: Job, pace: float = 0.0) -> dict[str, float]:
    """Returns the sums of `local_votes` over all ranks. Does one collective."""
    local = local_votes(job, pace)
    votes = job.strategy.reduce({name: torch.tensor([value], dtype=torch.float64) for name, value in local.items()})
    return {name: values[0] for name, values in votes.items()}


def mean_metrics(objectives: Mapping[str, Objective], sums: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics that the objectives of a step's models compute of its sums."""
    by_model: dict[str, dict[str, float]] = {}
    for name, value in sums.items():
        model, _, sum_name = name.partition("/")
        if model == MAIN or model not in objectives:
            model, sum_name = MAIN, name
        by_model.setdefault(model, {})[sum_name] = value
    return {
        name if model == MAIN else f"{model}/{name}": value
        for model, model_sums in by_model.items()
        if model == MAIN or model_sums[NUM_TARGETS]
        for name, value in objectives[model].means(model_sums).items()
    }


def mean_loss(model: Strategy, objective: Objective, sums: Sums) -> float:
    """Returns the mean loss of an update over all ranks, before the update is done."""
    totals = model.reduce({name: value.reshape(1) for name, value in sums.items()})
    return objective.means({name: value[0] for name, value in totals.items()})["loss"]


def evaluation_is_due(job: Job, step: int) -> bool:
    last = step == job.config.train.steps
    return job.validation is not None and (last or _is_multiple(job.config.eval.every, step))


def evaluate_step(job: Job, progress: Progress, row: Row) -> bool:
    """Evaluates, then records the step's row. Returns False where a stop is asked for meanwhile: the row is recorded
    without the evaluation, which the next attempt does."""
    job.clock.switch("evaluation")
    evaluation = evaluate(job)
    job.clock.switch("productive")
    job.logger.rows([row if evaluation is None else {**row, "eval": evaluation}])
    job.saver.record_evaluation(progress.step, evaluation)
    return evaluation is not None


def evaluate(job: Job) -> dict[str, float] | None:
    """Returns the metrics of one pass over the validation split, the same on every rank; None where it was broken off
    because a stop is asked for."""
    assert job.validation is not None
    evaluation, pace, voted, next_vote = Evaluation(job.strategy), VOTE_SECONDS, None, 1
    with closing(job.validation.batches(partial(should_give_up, job))) as batches:
        for number, batch in enumerate(batches, 1):
            job.clock.note_progress()
            point("eval.batch")
            evaluation.add(batch)
            if number == next_vote:
                votes = vote(job, pace)
                if votes["stop"] > 0:
                    return None
                if voted:  # from vote to vote: only then is the device done with the batches
                    pace = (time.monotonic() - voted[1]) / (number - voted[0])
                voted = number, time.monotonic()
                next_vote += max(1, int(VOTE_SECONDS / votes["pace"]))
    return evaluation.end(gave_up=job.resilience.requests.has_given_up)


def save(job: Job, progress: Progress, row: Row | None, must: bool) -> None:
    """Saves a checkpoint of this step. A failed save is reported and does not end the run. `row`: that of this step,
    which may not be recorded yet; `must`: the run ends here."""
    job.clock.switch("checkpoint")
    job.logger.step = progress.step
    about = {
        "progress": asdict(progress),
        "identity": job.identity(progress.step),
        "config": job.config.resolved(),
        "topology": job.topology.describe(),
        "evaluation": None,  # comes later: a failure in an evaluation must not lose the step
        "row": row,
        "guard": job.resilience.guard.state(),
    }
    state = job.models.state()
    with job.clock.pause_watchdog():  # it may wait for the previous save
        events = job.saver.save(progress.step, state, about, must)
    job.logger.events(events)
    job.resilience.requests.remove(SAVE)
    job.clock.switch("productive")


def finish_saving(job: Job) -> None:
    """Waits for the save in flight. Raises TrainingError if the run would end without it."""
    job.clock.switch("checkpoint")
    wait_for_save(job)
    job.clock.switch("finishing")
    if job.saver.problem is not None:
        raise TrainingError(f"the last checkpoint could not be saved: {job.saver.problem}")


def interval_readings(progress: Progress, elapsed: float) -> dict[str, float]:
    return {"steps": progress.step, "tokens": progress.tokens, "seconds": elapsed}


def _is_multiple(amount: int, step: int) -> bool:
    return bool(amount) and step % amount == 0
