"""One step: the updates that the objective yields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from trainer.fault_points import point
from trainer.objectives import Batch, Objective, Sums
from trainer.strategies.base import Strategy, UpdateResult

MAIN = "model"  # the run's own model
Finish = Callable[[str, Objective, Sums], UpdateResult]


def run_step(
    models: Mapping[str, Strategy],
    objective: Objective,
    batches: Sequence[Batch],
    finish: Finish,
    *,
    abandoned: bool = False,
) -> tuple[Sums, UpdateResult]:
    """Does a step with this rank's micro-batches. `finish` ends each update, by the name of its model, its
    objective and the sums of its passes.

    Returns the sums of all updates, those of other models than the run's own with their names in front, as
    `critic/loss`; and the result of the last update of the run's model. The step counts as skipped, or bad, if any of
    its updates was.
    """
    sums, done = Sums(), list[tuple[str, UpdateResult]]()
    for update in objective.updates(batches, models):
        model = models[update.model]
        point("step.weights", partial(model.state, everything=True))
        update_sums = model.train_step(update.batches, update.objective, abandoned)
        point("step.after_backward")
        done.append((update.model, finish(update.model, update.objective, update_sums)))
        point("step.after_update")
        for name, value in update_sums.items():
            name = name if update.model == MAIN else f"{update.model}/{name}"
            sums[name] = sums[name] + value if name in sums else value
    main_results = [result for name, result in done if name == MAIN]
    if not main_results:
        raise ValueError(f"{type(objective).__name__}.updates: a step needs an update of the model")
    skipped, bad = (torch.stack([getattr(result, name) for _, result in done]).any() for name in ("skipped", "bad"))
    return sums, UpdateResult(main_results[-1].grad_norm, skipped, bad)
