"""A run's objects: what the training loop uses, and where the run stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.checkpoint.save import Saver
from trainer.config import Config
from trainer.data.stream import Stream
from trainer.data.validation import Validation
from trainer.optim.schedule import Schedule
from trainer.resilience.agreed_stream import AgreedStream
from trainer.resilience.build import Resilience
from trainer.resilience.time_ledger import TimeLedger
from trainer.run_directory import Identity, RunDirectory
from trainer.run_models import RunModels
from trainer.strategies.base import Strategy
from trainer.topology import Topology
from trainer.tracking.run_logger import RunLogger
from trainer.utilization import Meter


@dataclass
class Progress:
    """Where the run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    samples: int = 0


@dataclass
class Job:
    """Everything that the training loop uses. `build.py` makes it."""

    config: Config
    topology: Topology
    models: RunModels
    schedules: Mapping[str, Schedule]  # by model
    stream: Stream | AgreedStream
    validation: Validation | None
    saver: Saver
    logger: RunLogger
    resilience: Resilience
    meter: Meter
    clock: TimeLedger
    folder: RunDirectory
    identity: Identity  # goes into each checkpoint's manifest
    started_at: float  # `time.monotonic()` of the start; of the launcher, where it restarts the run
    time_limit: float  # seconds since then; then the run stops as if it was asked to
    closed: bool = False

    @property
    def strategy(self) -> Strategy:
        """Returns the strategy of the run's own model."""
        return self.models.main

    def close(self) -> None:
        """Ends threads and leaves the process group; only once."""
        if self.closed:
            return
        self.closed = True
        self.stream.close()
        self.saver.close()
        self.models.close()
