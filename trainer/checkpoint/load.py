"""Loading: finds the newest whole checkpoint, the same on all ranks, and fills the run's state from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.checkpoint.format import (
    CHUNK,
    DamagedCheckpoint,
    StoredTensor,
    check_contents,
    check_headers,
    check_sizes,
    parse_index,
    read_header,
    read_index_text,
    read_manifest,
)
from trainer.checkpoint.mirror import Mirror
from trainer.checkpoint.reader import Reader, fill_buffer, open_file
from trainer.checkpoint.retention import DAMAGED, clear_leftovers, complete_checkpoints, damaged_in
from trainer.checkpoint.state import DTYPES, Box, State, model_of, shape_of, shards_of
from trainer.errors import OnecurveError, Outage, PeerLost, TrainingError
from trainer.files import move
from trainer.outage import is_outage
from trainer.topology import ALONE, Topology

OPTIONAL = ("scaler/", "optimizer/ema")  # a checkpoint may lack these: they can be switched on between attempts


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint on disk, with its checked manifest."""

    path: Path
    manifest: dict[str, Any]
    index_text: str | None = None  # if it has been read already

    @cached_property
    def index(self) -> dict[str, StoredTensor]:
        """Returns where each tensor lies. Raises TrainingError if the index is damaged."""
        try:
            return parse_index(self.index_text or read_index_text(self.path), self.manifest)
        except DamagedCheckpoint as damage:
            raise TrainingError(f"{self.path}: {damage}") from None


class ReadRequest(NamedTuple):
    """A request to fill `tensor`, memory of the run, with the block `box` out of the stored shard `shard` of the tensor
    `name`."""

    name: str
    shard: Box
    box: Box
    tensor: Tensor


def find_newest(
    folder: Path, topology: Topology = ALONE, *, contents: bool = True, set_aside: bool = True
) -> tuple[FoundCheckpoint | None, list[dict[str, Any]]]:
    """Returns the newest whole checkpoint, and an event for each damaged one that was set aside on the way to it.

    All ranks call it; each reads its share of the files. `contents`: compare checksums, not only sizes.
    Raises TrainingError (PeerLost on ranks other than the main one) if there are checkpoints but none is whole, since a
    run never silently starts from scratch; or if one cannot be read: that is not damage, nothing is changed. Raises
    Outage if the storage still does not answer after the wait.
    """
    checkpoint, events, is_any_damaged = _find_newest(folder, topology, contents, set_aside)
    if checkpoint is None and is_any_damaged:
        raise _no_whole_checkpoint(folder, topology)
    return checkpoint, events


def _no_whole_checkpoint(folder: Path, topology: Topology) -> OnecurveError:
    restore = f"`onecurve checkpoint restore {folder.parent}` brings back what was set aside and is whole"
    problem = f"{folder}: no checkpoint is whole any more; {restore}, run.fresh=true starts over"
    return (TrainingError if topology.is_main else PeerLost)(problem)


def _find_newest(
    folder: Path, topology: Topology, contents: bool, set_aside: bool = True
) -> tuple[FoundCheckpoint | None, list[dict[str, Any]], bool]:
    """Finds the newest complete checkpoint. Returns it, the events to record, and whether any is damaged."""
    events: list[dict[str, Any]] = []
    names = _agree(topology, lambda: [path.name for path in complete_checkpoints(folder)])
    is_any_damaged = _agree(topology, lambda: bool(damaged_in(folder)))
    for path in (folder / name for name in reversed(names)):
        checkpoint, reason = _check(path, topology, contents)
        if reason is None:
            return checkpoint, events, is_any_damaged
        is_any_damaged = True
        if set_aside:
            event = {"checkpoint": path.name, "reason": reason}
            event["kept_as"] = _agree(topology, lambda path=path: _set_aside(path))  # type: ignore[misc]
            events.append({"kind": "checkpoint_damaged", **event})
    return None, events, is_any_damaged


def find_newest_or_fetch(
    folder: Path, topology: Topology, contents: bool, mirror: Mirror | None = None
) -> tuple[FoundCheckpoint | None, list[dict[str, Any]]]:
    """Does what `find_newest` does, for a run that will save there: also clears what interrupted saves left, and
    fetches a newer checkpoint from the mirror (such as when the disk is new, or nothing on it is whole)."""
    _agree(topology, lambda: clear_leftovers(folder))
    if mirror is None:
        return find_newest(folder, topology, contents=contents)
    checkpoint, events, is_any_damaged = _find_newest(folder, topology, contents)
    if fetch_events := mirror.fetch(folder, checkpoint.manifest["step"] if checkpoint else -1):
        events += fetch_events
        checkpoint, new_events, is_any_damaged = _find_newest(folder, topology, contents)
        events += new_events
    if checkpoint is None and (is_any_damaged or fetch_events):
        raise _no_whole_checkpoint(folder, topology)
    return checkpoint, events


def read_state(checkpoint: FoundCheckpoint, state: State) -> None:
    """Fills what this process holds of `state` in place, from the stored values of the same names, however they were
    sharded. Only files with something that is needed are opened, and only that is read, a few MB at a time.

    Raises TrainingError if a tensor is missing or has another shape. What may be switched on between attempts is left
    as it is if the checkpoint does not have it.
    """
    stored = checkpoint.index
    for name, requests in read_requests(checkpoint, state).items():
        try:
            with open_file(checkpoint.path / name) as file, torch.no_grad():
                header = read_header(file, name)
                starts = [header.find(request.name, stored[request.name], request.shard) for request in requests]
                for start, request in sorted(zip(starts, requests, strict=True), key=lambda pair: pair[0]):
                    _fill(file, start, stored[request.name].dtype, request)
        except (OSError, EOFError, DamagedCheckpoint) as error:
            raise TrainingError(f"{checkpoint.path / name}: cannot be read: {error}") from error


def read_requests(checkpoint: FoundCheckpoint, state: State) -> dict[str, list[ReadRequest]]:
    """Returns what has to be read for `state`, by file."""
    stored = checkpoint.index
    nonempty = {name: value for name, value in state.items() if prod(shape_of(value))}  # an empty tensor is not saved
    targets = {
        name: value for name, value in nonempty.items() if name in stored or not model_of(name)[1].startswith(OPTIONAL)
    }
    misfits = [name for name, value in targets.items() if name not in stored or stored[name].shape != shape_of(value)]
    if misfits:
        raise TrainingError(f"{checkpoint.path}: does not hold {sorted(misfits)[0]} in this shape")
    by_file: defaultdict[str, list[ReadRequest]] = defaultdict(list)
    for name, value in targets.items():
        for box, tensor in shards_of(value):
            for location in stored[name].find_shards(box):
                overlap = location.box.intersect(box)
                assert overlap is not None
                by_file[location.file].append(ReadRequest(name, location.box, overlap, overlap.narrow(box, tensor)))
    return by_file


def read_all(checkpoint: FoundCheckpoint, prefix: str = "") -> dict[str, Tensor]:
    """Returns every tensor whose name begins with `prefix`, whole, by its name without the prefix."""
    stored = checkpoint.index
    names = [name for name in stored if name.startswith(prefix)]
    tensors = {name: torch.empty(stored[name].shape, dtype=DTYPES[stored[name].dtype]) for name in names}
    read_state(checkpoint, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _fill(file: Reader, start: int, dtype: str, request: ReadRequest) -> None:
    """Fills `request.tensor` with the block `request.box` of the shard that begins at byte `start`, by runs of rows (of
    dimension 0)."""
    shard, box, tensor = request.shard, request.box, request.tensor
    if not box.size:
        tensor.copy_(_read_values(file, start, dtype, 1).view(()))
        return
    row = shard.numel // shard.size[0]
    step = max(1, CHUNK // (row * DTYPES[dtype].itemsize))
    first = box.offset[0] - shard.offset[0]
    inner, outer = Box(box.offset[1:], box.size[1:]), Box(shard.offset[1:], shard.size[1:])
    for begin in range(0, box.size[0], step):
        rows = min(step, box.size[0] - begin)
        values = _read_values(file, start + (first + begin) * row * DTYPES[dtype].itemsize, dtype, rows * row)
        values = values.view(rows, *shard.size[1:])
        tensor[begin : begin + rows].copy_(Box((0, *inner.offset), (rows, *inner.size)).narrow(
            Box((0, *outer.offset), (rows, *outer.size)), values
        ))  # fmt: skip


def _read_values(file: Reader, start: int, dtype: str, count: int) -> Tensor:
    data = bytearray(count * DTYPES[dtype].itemsize)
    file.seek(start)
    fill_buffer(file, data)
    return torch.frombuffer(data, dtype=DTYPES[dtype])


def _check(path: Path, topology: Topology, contents: bool) -> tuple[FoundCheckpoint | None, str | None]:
    """Returns this checkpoint, or what is wrong with it, the same on all ranks. The main rank reads manifest and index
    and sends them to the others; each rank checks its share of the files."""

    def read_description() -> list[Any]:
        try:
            manifest = read_manifest(path)
            index = read_index_text(path)
            parse_index(index, manifest)
            return [manifest, index, None]
        except DamagedCheckpoint as damage:
            return [None, None, str(damage)]

    manifest, index, reason = _agree(topology, read_description)
    if reason is not None:
        return None, reason
    checkpoint = FoundCheckpoint(path, manifest, index)

    def check_share() -> str | None:
        names = list(manifest["files"])[topology.rank :: topology.world_size]
        try:
            check_sizes(path, manifest, names)
            check_contents(path, manifest, names if contents else [])
            check_headers(path, checkpoint.index, names)
        except DamagedCheckpoint as damage:
            return str(damage)
        return None

    outcomes = topology.run_on_all(lambda: _attempt(check_share), topology.control)
    for _, *problem in outcomes:
        if problem:
            error, is_away = problem
            raise Outage(error) if is_away else TrainingError(f"{path}: {error}")
    return checkpoint, next((reason for reason, *_ in outcomes if reason), None)


def _agree(topology: Topology, make: Callable[[], Any]) -> Any:
    """Returns what `make` returns on the main rank, on all ranks, however long that takes; raises its errors, too."""
    value, *problem = topology.run_on_main(lambda: _attempt(make))
    if problem:
        error, is_away = problem
        raise (PeerLost if not topology.is_main else Outage if is_away else TrainingError)(error)
    return value


def _attempt(make: Callable[[], Any]) -> list[Any]:
    """Returns [value of `make`]; or None, the text of its error, and whether that is an outage."""
    try:
        return [make()]
    except OSError as error:
        return [None, f"{error.filename or 'a checkpoint'}: cannot be read: {error.strerror}", is_outage(error)]
    except (TrainingError, Outage) as error:
        return [None, str(error), isinstance(error, Outage)]


def _set_aside(path: Path) -> str:
    """Renames a damaged checkpoint, so that it does not count any more. Returns the new name."""
    target, number = path.with_name(f"{DAMAGED}{path.name}"), 1
    while target.exists():
        target, number = path.with_name(f"{DAMAGED}{path.name}-{number}"), number + 1
    move(path, target)
    return target.name
