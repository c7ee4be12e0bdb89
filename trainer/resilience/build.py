"""From the config to what keeps a run alive and honest."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config import Config
from trainer.data.stream import Stream
from trainer.resilience.agreed_stream import AgreedStream
from trainer.resilience.guard import Guard
from trainer.resilience.interruption import Requests
from trainer.resilience.quarantine import Quarantine
from trainer.resilience.replicas import Replicas
from trainer.resilience.stragglers import RANKS, Stragglers
from trainer.run_directory import RunDirectory
from trainer.topology import Topology
from trainer.tracking.run_files import RunFiles


@dataclass
class Resilience:
    """What the loop asks before, in and behind each step."""

    requests: Requests
    quarantine: Quarantine
    guard: Guard
    replicas: Replicas
    stragglers: Stragglers


def build_resilience(config: Config, topology: Topology, folder: RunDirectory, run_files: RunFiles) -> Resilience:
    budget = config.data.error_budget if config.data.on_error == "quarantine" else None
    return Resilience(
        requests=Requests(folder.path, watch_files=topology.is_main),
        quarantine=Quarantine(folder.path, topology, budget, resumed=folder.found is not None),
        guard=Guard(config.guard, topology.device),
        replicas=Replicas(topology),
        stragglers=Stragglers(topology, run_files.open_appender(RANKS) if topology.is_main else None),
    )


def agreed(stream: Stream, topology: Topology) -> Stream | AgreedStream:
    """Returns the stream; of processes that share a copy of the model, and may fail to read a sample, one on which they
    agree."""
    alike = topology.layout.processes == 1 or not stream.share.tolerant
    return stream if alike else AgreedStream(stream, topology)
