"""Builds the objects of this package from the config."""

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
    """The objects that the loop calls before, in and after each step."""

    requests: Requests
    quarantine: Quarantine
    guard: Guard
    replicas: Replicas
    stragglers: Stragglers


def build_resilience(config: Config, topology: Topology, folder: RunDirectory, run_files: RunFiles) -> Resilience:
    budget = config.data.error_budget if config.data.on_error == "quarantine" else None
    return Resilience(
        requests=Requests(folder.path, watch_files=topology.is_main),
        quarantine=Quarantine(folder.path, topology, budget, resumed=folder.checkpoint is not None),
        guard=Guard(config.guard, topology.device),
        replicas=Replicas(topology),
        stragglers=Stragglers(topology, run_files.open_appender(RANKS) if topology.is_main else None),
    )


def agree_on_faults(stream: Stream, topology: Topology) -> Stream | AgreedStream:
    """Returns the stream; if ranks may fail to read samples, one whose faults all ranks of a replica agree on."""
    needs_no_agreement = topology.layout.processes == 1 or not stream.share.tolerant
    return stream if needs_no_agreement else AgreedStream(stream, topology)
