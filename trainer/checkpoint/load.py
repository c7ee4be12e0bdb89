"""Loading: the newest checkpoint that is whole, found without help and agreed on by all ranks."""

from __future__ import annotations

import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from trainer.checkpoint.format import Damaged, SafeReader, verify
from trainer.errors import PeerLost, TrainingError
from trainer.topology import Topology


@dataclass(frozen=True)
class Found:
    path: Path
    manifest: dict[str, Any]


def candidates(folder: Path) -> list[Path]:
    """The folders that have a checkpoint's name, in rising order of steps. Only `verify` says whether they are one."""
    named = [(re.fullmatch(r"step-(\d{8,})", path.name), path) for path in folder.glob("step-*") if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def newest(folder: Path, set_aside: bool = True) -> tuple[Found | None, list[dict[str, Any]]]:
    """The newest whole checkpoint, and an event for each damaged one that was set aside on the way to it.

    Raises TrainingError where there are checkpoints but none is whole (a run never silently starts from scratch), or
    where one cannot be read for now: that is no damage, and nothing is changed.
    """
    events: list[dict[str, Any]] = []
    damaged = any(folder.glob(".damaged-*"))
    for path in reversed(candidates(folder)):
        try:
            return Found(path, verify(path)), events
        except Damaged as damage:
            damaged = True
            if set_aside:
                aside = _free_name(path.with_name(f".damaged-{path.name}"))
                path.rename(aside)
                event = {"checkpoint": path.name, "reason": str(damage), "kept_as": aside.name}
                events.append({"kind": "checkpoint_damaged", **event})
        except OSError as error:
            raise TrainingError(f"{path}: cannot be read: {error}") from error
    if damaged:
        raise TrainingError(f"{folder}: no checkpoint is whole any more; run.fresh=true starts over")
    return None, events


def newest_everywhere(folder: Path, topology: Topology) -> tuple[Found | None, list[dict[str, Any]]]:
    """`newest`, decided by the main rank for all. It also clears what interrupted saves left."""
    answer: dict[str, Any] = {}
    if topology.is_main:
        for left in (*folder.glob(".attempt-*"), *folder.glob(".trash-*")):
            shutil.rmtree(left, ignore_errors=True)
        try:
            found, events = newest(folder)
            answer = {
                "path": found and str(found.path),
                "manifest": found and found.manifest,
                "events": events,
            }
        except (TrainingError, OSError) as error:
            answer = {"error": str(error)}
    answer = topology.broadcast(answer)
    if "error" in answer:
        raise (TrainingError if topology.is_main else PeerLost)(answer["error"])
    found = Found(Path(answer["path"]), answer["manifest"]) if answer["path"] else None
    return found, answer["events"]


def read(found: Found, tensors: dict[str, Tensor], topology: Topology | None = None) -> None:
    """Fills `tensors` in place, each from the value of the same name. Raises TrainingError if one is not there.

    Loss-scaler state is left as it is where the checkpoint has none (precision may change between lives).
    """
    reader = SafeReader(found.path)
    try:
        stored = reader.sizes()
    except Damaged as damage:
        raise TrainingError(f"{found.path}: {damage}") from None
    wanted = {name: tensor for name, tensor in tensors.items() if name in stored or not name.startswith("scaler/")}
    missing = sorted(set(wanted) - set(stored))
    wrong = [name for name in wanted if name in stored and stored[name] != wanted[name].shape]
    if missing or wrong:
        raise TrainingError(f"{found.path}: does not hold {(missing + wrong)[0]} in this shape")
    group = topology.saving if topology else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate
