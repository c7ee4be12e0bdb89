"""Loading: the newest checkpoint that is whole, found without help and agreed on by all ranks."""

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

OPTIONAL = ("scaler/", "optimizer/ema")  # begins anew where a checkpoint has none: it may be switched on between lives


@dataclass(frozen=True)
class FoundCheckpoint:
    path: Path
    manifest: dict[str, Any]
    index_text: str | None = None  # where it was read already

    @cached_property
    def index(self) -> dict[str, StoredTensor]:
        """Where each tensor lies. Raises TrainingError where it cannot be believed."""
        try:
            return parse_index(self.index_text or read_index_text(self.path), self.manifest)
        except DamagedCheckpoint as damage:
            raise TrainingError(f"{self.path}: {damage}") from None


class ReadRequest(NamedTuple):
    """`tensor`, memory of the run, takes the block `box` out of a piece of the tensor `name`."""

    name: str
    piece: Box
    box: Box
    tensor: Tensor


def find_newest(
    folder: Path, topology: Topology = ALONE, *, contents: bool = True, set_aside: bool = True
) -> tuple[FoundCheckpoint | None, list[dict[str, Any]]]:
    """The newest whole checkpoint, and an event for each damaged one that was set aside on the way to it.

    All ranks call it; each reads its share of the files. `contents`: compare checksums, not only sizes.
    Raises TrainingError (on other ranks than the main one PeerLost) where there are checkpoints but none is whole: a
    run never silently starts from scratch; or where one cannot be read: that is not damage, nothing is changed. Outage
    where its storage does not answer, after it was waited for.
    """
    found, events, damaged = _newest(folder, topology, contents, set_aside)
    if found is None and damaged:
        raise _none_whole(folder, topology)
    return found, events


def _none_whole(folder: Path, topology: Topology) -> OnecurveError:
    restore = f"`onecurve checkpoint restore {folder.parent}` brings back what was set aside and is whole"
    problem = f"{folder}: no checkpoint is whole any more; {restore}, run.fresh=true starts over"
    return (TrainingError if topology.is_main else PeerLost)(problem)


def _newest(
    folder: Path, topology: Topology, contents: bool, set_aside: bool = True
) -> tuple[FoundCheckpoint | None, list[dict[str, Any]], bool]:
    """Finds the newest complete checkpoint. Returns it, the events to record, and whether any is damaged."""
    events: list[dict[str, Any]] = []
    names = _agree(topology, lambda: [path.name for path in complete_checkpoints(folder)])
    damaged = _agree(topology, lambda: bool(damaged_in(folder)))
    for path in (folder / name for name in reversed(names)):
        found, reason = _check(path, topology, contents)
        if reason is None:
            return found, events, damaged
        damaged = True
        if set_aside:
            event = {"checkpoint": path.name, "reason": reason}
            event["kept_as"] = _agree(topology, lambda path=path: _set_aside(path))  # type: ignore[misc]
            events.append({"kind": "checkpoint_damaged", **event})
    return None, events, damaged


def find_newest_or_fetch(
    folder: Path, topology: Topology, contents: bool, mirror: Mirror | None = None
) -> tuple[FoundCheckpoint | None, list[dict[str, Any]]]:
    """`find_newest`, for a run that will save there: it also clears what interrupted saves left, and fetches a newer
    one from the mirror (as where the disk is new, or nothing on it is whole)."""
    _agree(topology, lambda: clear_leftovers(folder))
    if mirror is None:
        return find_newest(folder, topology, contents=contents)
    found, events, damaged = _newest(folder, topology, contents)
    if fetched := mirror.fetch(folder, found.manifest["step"] if found else -1):
        events += fetched
        found, more, damaged = _newest(folder, topology, contents)
        events += more
    if found is None and (damaged or fetched):
        raise _none_whole(folder, topology)
    return found, events


def read_state(found: FoundCheckpoint, state: State) -> None:
    """Fills what this process holds of `state` in place, from the values of the same names, in whatever pieces they
    were saved. Only files with something that is needed are opened, and only that is read, a few MB at a time.

    Raises TrainingError if one is not there, or in another shape. What may be switched on between lives is left as it
    is where the checkpoint has none.
    """
    stored = found.index
    for name, its in read_requests(found, state).items():
        try:
            with open_file(found.path / name) as file, torch.no_grad():
                header = read_header(file, name)
                starts = [header.find(order.name, stored[order.name], order.piece) for order in its]
                for at, order in sorted(zip(starts, its, strict=True), key=lambda pair: pair[0]):
                    _fill(file, at, stored[order.name].dtype, order)
        except (OSError, EOFError, DamagedCheckpoint) as error:
            raise TrainingError(f"{found.path / name}: cannot be read: {error}") from error


def read_requests(found: FoundCheckpoint, state: State) -> dict[str, list[ReadRequest]]:
    """What is read for `state`, by file."""
    stored = found.index
    some = {name: held for name, held in state.items() if prod(shape_of(held))}  # of an empty tensor nothing is saved
    wanted = {name: held for name, held in some.items() if name in stored or not model_of(name)[1].startswith(OPTIONAL)}
    wrong = [name for name, held in wanted.items() if name not in stored or stored[name].shape != shape_of(held)]
    if wrong:
        raise TrainingError(f"{found.path}: does not hold {sorted(wrong)[0]} in this shape")
    by_file: defaultdict[str, list[ReadRequest]] = defaultdict(list)
    for name, held in wanted.items():
        for box, tensor in shards_of(held):
            for place in stored[name].intersecting(box):
                both = place.box.intersect(box)
                assert both is not None
                by_file[place.file].append(ReadRequest(name, place.box, both, both.within(box, tensor)))
    return by_file


def read_all(found: FoundCheckpoint, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor whose name begins so, whole, by the name behind it."""
    stored = found.index
    names = [name for name in stored if name.startswith(prefix)]
    tensors = {name: torch.empty(stored[name].shape, dtype=DTYPES[stored[name].dtype]) for name in names}
    read_state(found, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _fill(file: Reader, at: int, dtype: str, order: ReadRequest) -> None:
    """`order.tensor` takes the block `order.box` of the piece that lies there: rows (of dimension 0) that lie behind
    each other."""
    piece, box, tensor = order.piece, order.box, order.tensor
    if not box.size:
        tensor.copy_(_values(file, at, dtype, 1).view(()))
        return
    row = piece.numel // piece.size[0]
    step = max(1, CHUNK // (row * DTYPES[dtype].itemsize))
    first = box.offset[0] - piece.offset[0]
    inner, outer = Box(box.offset[1:], box.size[1:]), Box(piece.offset[1:], piece.size[1:])
    for done in range(0, box.size[0], step):
        rows = min(step, box.size[0] - done)
        values = _values(file, at + (first + done) * row * DTYPES[dtype].itemsize, dtype, rows * row)
        values = values.view(rows, *piece.size[1:])
        tensor[done : done + rows].copy_(Box((0, *inner.offset), (rows, *inner.size)).within(
            Box((0, *outer.offset), (rows, *outer.size)), values
        ))  # fmt: skip


def _values(file: Reader, at: int, dtype: str, count: int) -> Tensor:
    data = bytearray(count * DTYPES[dtype].itemsize)
    file.seek(at)
    fill_buffer(file, data)
    return torch.frombuffer(data, dtype=DTYPES[dtype])


def _check(path: Path, topology: Topology, contents: bool) -> tuple[FoundCheckpoint | None, str | None]:
    """This checkpoint, or what is wrong with it, the same on all ranks. One rank reads manifest and index and hands
    them on; of the files each looks at its share."""

    def looked() -> list[Any]:
        try:
            manifest = read_manifest(path)
            index = read_index_text(path)
            parse_index(index, manifest)
            return [manifest, index, None]
        except DamagedCheckpoint as damage:
            return [None, None, str(damage)]

    manifest, index, reason = _agree(topology, looked)
    if reason is not None:
        return None, reason
    found = FoundCheckpoint(path, manifest, index)

    def looked_through() -> str | None:
        names = list(manifest["files"])[topology.rank :: topology.world_size]
        try:
            check_sizes(path, manifest, names)
            check_contents(path, manifest, names if contents else [])
            check_headers(path, found.index, names)
        except DamagedCheckpoint as damage:
            return str(damage)
        return None

    parts = topology.run_on_all(lambda: _attempt(looked_through), topology.control)
    for _, *problem in parts:
        if problem:
            error, is_away = problem
            raise Outage(error) if is_away else TrainingError(f"{path}: {error}")
    return found, next((reason for reason, *_ in parts if reason), None)


def _agree(topology: Topology, make: Callable[[], Any]) -> Any:
    """What `make` gives the main rank, on all of them, however long that takes; its errors too."""
    value, *problem = topology.run_on_main(lambda: _attempt(make))
    if problem:
        error, is_away = problem
        raise (PeerLost if not topology.is_main else Outage if is_away else TrainingError)(error)
    return value


def _attempt(make: Callable[[], Any]) -> list[Any]:
    """What it gives; or nothing, its error, and whether that is an outage."""
    try:
        return [make()]
    except OSError as error:
        return [None, f"{error.filename or 'a checkpoint'}: cannot be read: {error.strerror}", is_outage(error)]
    except (TrainingError, Outage) as error:
        return [None, str(error), isinstance(error, Outage)]


def _set_aside(path: Path) -> str:
    """Keeps a damaged checkpoint under another name, which does not count; gives the name."""
    moved, number = path.with_name(f"{DAMAGED}{path.name}"), 1
    while moved.exists():
        moved, number = path.with_name(f"{DAMAGED}{path.name}-{number}"), number + 1
    move(path, moved)
    return moved.name
