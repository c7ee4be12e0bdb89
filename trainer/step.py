"""One step: the updates that the objective says it consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from trainer.fault_points import point
from trainer.objectives import Batch, Objective, Sums
from trainer.strategies.base import Strategy, UpdateResult

Finish = Callable[[Strategy, Objective, Sums], UpdateResult]


def do_step(
    models: Mapping[str, Strategy],
    objective: Objective,
    batches: Sequence[Batch],
    finish: Finish,
    *,
    abandoned: bool = False,
) -> tuple[Sums, UpdateResult]:
    """Does a step with this rank's micro-batches. `finish` ends each update, given what its passes summed.

    Returns the sums of all updates, and the result of the last one; the step counts as skipped, or bad, if any of its
    updates was.
    """
    sums, result = Sums(), None
    for update in objective.updates(batches, models):
        model = models[update.model]
        point("step.weights", model.state)
        part = model.train_step(update.batches, update.objective, abandoned)
        point("step.after_backward")
        done = finish(model, update.objective, part)
        point("step.after_update")
        for name, value in part.items():
            sums[name] = sums[name] + value if name in sums else value
        if result is not None:
            done = done._replace(skipped=done.skipped | result.skipped, bad=done.bad | result.bad)
        result = done
    if result is None:
        raise ValueError(f"{type(objective).__name__}.updates: yielded nothing, but a step needs an update")
    return sums, result
