"""Keys of the trackers: the terminal, the report, Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from trainer.config.section import Section


class Wandb(Section):
    mode: Literal["auto", "offline", "online", "disabled"] = Field(
        description="auto: online if an API key is set up, else offline."
    )
    project: str | None = Field(description="W&B project. null: WANDB_PROJECT, else `onecurve`.")
    # With defaults: earlier runs do not have them.
    group: str | None = Field(
        default=None,
        description="What runs are shown together by. null: WANDB_RUN_GROUP; the trials of a sweep, its `run.name`.",
    )
    name: str | None = Field(
        default=None,
        description="Name of the W&B run. null: WANDB_NAME, else `run.name`; for a trial of a sweep, what was swept.",
    )


class Track(Section):
    console: bool = Field(description="Show progress on the terminal.")
    report: bool = Field(description="Write `report.html` at the end of the run.")
    fingerprint: bool = Field(
        description="Record with each step a checksum of all weights behind it: where two runs on the same processes "
        "part, `onecurve checkpoint diff` says at which step. Costs a pass over the weights a step."
    )
    by_source: bool = Field(
        description="Record what an objective sums once more for each source of a mixture (`data.sources`): "
        "`loss/web`, `num_targets/web`. Costs the loss, without its gradient, once more a step, and "
        "waits for the device in each micro-batch. Batches get a field `source_number`."
    )
    wandb: Wandb = Field(description="Weights & Biases.")

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        if self.by_source and "data" in sections and not sections["data"].sources:
            yield "track.by_source=true: there are no sources without data.sources"
