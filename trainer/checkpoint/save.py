"""Saving: copy to host memory on the step, then write, check, publish and clean up in the background.

The order of publishing: files written, hashed on the way and synced; what was written compared with what was planned,
and weights that several processes hold with each other; index and manifest written and synced, the manifest last; the
folder renamed to a name that never existed, its parent synced. What happens before the rename leaves nothing that
counts, and nobody is told of a checkpoint before all of it is done.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.format import (
    INDEX,
    VERSION,
    DamagedCheckpoint,
    amend_manifest,
    folder_name,
    read_manifest,
    tensor_file,
    write_file,
    write_index,
    write_manifest,
)
from trainer.checkpoint.mirror import Mirror
from trainer.checkpoint.plan import Plan, Shard, fingerprint, header_of, local_shards
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.state import DTYPES, State, shards_of
from trainer.errors import Outage, TrainingError, first_line
from trainer.fault_points import point
from trainer.files import free_bytes, move, replace_file, sync_folder
from trainer.topology import Topology

WRITER = ".writer"  # says which life of the run may publish here: an older one that still writes may not
PAUSES_S = (1.0, 5.0)  # before a save that failed is tried again
OVERDUE_S = 60.0  # after all tries have failed, the next save comes after this time at the latest
SHOWN = 16  # ranks in a message
Event = dict[str, Any]


class Saver:
    """One save in flight at most. Collectives run on a process group of their own (on the loop's they deadlock)."""

    def __init__(
        self,
        folder: Path,
        topology: Topology,
        retention: Retention,
        *,
        asynchronous: bool = True,
        overrun: str = "wait",
        mirror: Mirror | None = None,
        pauses: Sequence[float] = PAUSES_S,
    ):
        """`overrun`: what a save does that comes before the last one is written: "wait" for it, or "skip". `mirror`:
        where each checkpoint is copied to, once it is there."""
        self.folder, self.topology, self.retention = folder, topology, retention
        self.asynchronous, self.overrun, self.mirror, self.pauses = asynchronous, overrun, mirror, pauses
        self.life = topology.broadcast(uuid.uuid4().hex[:8])
        if topology.is_main:
            replace_file(folder / WRITER, self.life.encode())
        self.last_step = -1  # of which a save was begun
        self.newest: int | None = None  # which is there
        self.problem: str | None = None  # why the newest save that ended is not there
        self._failed_at = 0.0
        self._layout: _Layout | None = None
        self._begun: float | None = None  # `time.monotonic()` of the save in flight
        self.durations: deque[float] = deque(maxlen=64)  # seconds of those before
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[list[Event]] | None = None
        self._measured: dict[int, dict[str, float]] = {}  # evaluations that manifests do not have yet, by step
        self._amended: Future[None] | None = None

    @property
    def overdue(self) -> bool:
        """The last save failed, a while ago."""
        return self.problem is not None and time.monotonic() > self._failed_at + OVERDUE_S

    def save(self, step: int, state: State, about: dict[str, Any], must: bool = False) -> list[Event]:
        """Starts saving `state` as of now; `about` is JSON for the manifest. All ranks call it. `must`: is not skipped.

        Gives what became of the save before, as `poll`; raises TrainingError for a state that cannot be saved.
        """
        if step == self.last_step:
            return []
        if (
            self.overrun == "skip"
            and not must
            and any(self.topology.gather(self._job is not None and not self._job.done()))
        ):
            return [{"kind": "checkpoint_skipped", "step": step, "reason": "the last one is still being written"}]
        events = self.wait()
        self.last_step = step
        point("checkpoint.before_copy")
        prints = self._copy(state)
        self._begun = time.monotonic()
        self._job = self._thread.submit(self._write, step, about, prints)
        return events if self.asynchronous else events + self.wait()

    def poll(self) -> list[Event]:
        """What became of the save in flight, once, when it is done: first `checkpoint` or `checkpoint_failed`."""
        amended = self._amended is None or self._amended.done()
        return self.wait() if self._job is not None and self._job.done() and amended else []

    def wait(self) -> list[Event]:
        """Waits for the save in flight and returns its events, as `poll` does."""
        if self._amended is not None:
            self._amended.result()
            self._amended = None
        if self._job is None:
            return []
        job, self._job = self._job, None
        events = job.result()
        self.problem, self._failed_at = events[0].get("reason"), time.monotonic()
        if self.problem is None:
            self.newest = events[0]["step"]
        return events

    def record_evaluation(self, step: int, evaluation: dict[str, float] | None) -> None:
        """Adds what was measured at this step to its checkpoint, once that is there; on the main rank, and without a
        word where the checkpoint is not there. What a disk does not take for now is tried again with the next one."""
        if evaluation and self.topology.is_main:
            self._measured[step] = evaluation
            self._amended = self._thread.submit(self._amend)

    def _amend(self) -> None:
        for step, evaluation in list(self._measured.items()):
            with suppress(OSError, Outage):
                with suppress(DamagedCheckpoint, TrainingError):
                    self._begun = time.monotonic()
                    try:
                        amend_manifest(self.folder / folder_name(step), evaluation=evaluation)
                    finally:
                        self._begun = None
                    if self.mirror is not None:  # as slow as it is
                        self.mirror.amend(self.folder / folder_name(step))
                del self._measured[step]

    def resume_from(self, step: int) -> None:
        """The run's state is now that of this checkpoint."""
        self.last_step = self.newest = step

    def saving(self) -> tuple[str, float] | None:
        """The save in flight, for who looks after hangs: its name and since when (`time.monotonic()`)."""
        begun = self._begun
        return None if begun is None else ("save", begun)

    def close(self) -> None:
        self._thread.shutdown()

    def _copy(self, state: State) -> dict[str, int]:
        """Copies what this process writes into host memory, as it will lie in the file; gives fingerprints of weights
        that others write, by who holds them."""
        if self._layout is None:
            self._layout = _Layout(state, self.topology)
        return self._layout.copy(state)

    def _write(self, step: int, about: dict[str, Any], prints: dict[str, int]) -> list[Event]:
        started = time.monotonic()
        try:
            events = self._attempts(step, about, prints, started)
        finally:
            self._begun = None
            self.durations.append(time.monotonic() - started)
        if self.mirror is not None and events[0]["kind"] == "checkpoint":
            started, problem = time.monotonic(), self.mirror.put(self.folder / folder_name(step), self.topology.saving)
            copied = {"step": step, "seconds": round(time.monotonic() - started, 3), "to": self.mirror.url}
            told = (
                {"kind": "checkpoint_not_mirrored", "reason": problem} if problem else {"kind": "checkpoint_mirrored"}
            )
            events.append({**told, **copied})
        return events

    def _attempts(self, step: int, about: dict[str, Any], prints: dict[str, int], started: float) -> list[Event]:
        for number, pause in enumerate((0.0, *self.pauses)):
            time.sleep(pause)
            size, error = self._try(step, about, prints, number)
            if error is None:
                break
        event = {"step": step, "seconds": round(time.monotonic() - started, 3), "tries": number + 1}
        if error is not None:
            return [{"kind": "checkpoint_failed", **event, "reason": error}]
        return [{"kind": "checkpoint", **event, "bytes": size}]

    def _try(self, step: int, about: dict[str, Any], prints: dict[str, int], number: int) -> tuple[int, str | None]:
        """Gives the checkpoint's size and, on all ranks alike, why it is not there."""
        attempt = self.folder / f".attempt-{folder_name(step)}-{self.life}-{number}"
        word = {"save": f"{folder_name(step)}-{self.life}-{number}"}
        local: dict[str, Any] = {"file": None, "error": None, "prints": {}}
        try:
            assert self._layout is not None
            point("checkpoint.before_write")
            local["prints"] = self._layout.agreed(prints)
            local["file"] = self._write_own(attempt, word)
        except BaseException as failure:  # whatever it is, the other ranks wait for our word
            local["error"] = f"rank {self.topology.rank}: {first_line(failure)}"
        parts = self.topology.gather_all(local, self.topology.saving)
        error = next((part["error"] for part in parts if part["error"]), None) or _disagreement(parts)
        if error is None and self.topology.is_main:
            try:
                self._publish(attempt, step, about, word, [part["file"] for part in parts])
            except BaseException as failure:
                error = first_line(failure)
        if self.topology.is_main:
            if error is not None:
                shutil.rmtree(attempt, ignore_errors=True)
            else:
                with suppress(Exception):  # an old one that stays is not a failure of the new one, and the others wait
                    point("checkpoint.before_prune")
                    self.retention.apply(self.folder, f"{self.life}-{step}")
        error = self.topology.gather_all(error, self.topology.saving)[0]
        return sum(part["file"]["bytes"] for part in parts if part["file"]), error

    def _write_own(self, attempt: Path, word: dict[str, str]) -> dict[str, Any] | None:
        assert self._layout is not None
        rank, buffer, size = self.topology.rank, self._layout.buffer, len(self._layout.buffer)
        attempt.mkdir(exist_ok=True)
        if not size:
            return None
        if (free := free_bytes(attempt)) is not None and free < size:
            raise OSError(f"no space left: {size:,} bytes are to be written, {free:,} are free")
        written = write_file(attempt / tensor_file(rank), [header_of(self._layout.file, word), buffer.numpy().data])
        return {**written, "tensors": size}

    def _publish(
        self,
        attempt: Path,
        step: int,
        about: dict[str, Any],
        word: dict[str, str],
        written: list[dict[str, Any] | None],
    ) -> None:
        """Raises OSError; RuntimeError where what was written is not what was planned."""
        assert self._layout is not None
        point("checkpoint.before_manifest")
        files = {tensor_file(rank): file for rank, file in enumerate(written) if file}
        sizes = {name: file.pop("tensors") for name, file in files.items()}
        planned = {tensor_file(rank): size for rank, size in enumerate(self._layout.plan.sizes.tolist()) if size}
        if sizes != planned:
            wrong = min(name for name in {**sizes, **planned} if sizes.get(name) != planned.get(name))
            raise RuntimeError(f"{wrong}: planned were {planned.get(wrong)} bytes, written {sizes.get(wrong)}")
        files[INDEX] = write_index(attempt / INDEX, self._layout.plan.tensors)
        write_manifest(attempt, {"version": VERSION, "step": step, **word, **about, "files": files})
        if (self.folder / WRITER).read_text() != self.life:  # not waited for: the save is tried again
            raise RuntimeError("another process trains in this folder by now, and saves there")
        final = self.folder / folder_name(step)
        if final.exists():
            if not self._has_published(final):
                raise FileExistsError(f"{final} is there already")
            shutil.rmtree(attempt, ignore_errors=True)
        else:
            point("checkpoint.before_rename")
            move(attempt, final)
        sync_folder(self.folder)
        point("checkpoint.after_rename")

    def _has_published(self, final: Path) -> bool:
        """Whether an earlier try of this save is there: the answer to its rename was an error all the same."""
        try:
            return str(read_manifest(final, patience_s=0).get("save")).startswith(f"{final.name}-{self.life}-")
        except DamagedCheckpoint:
            return False


class _Layout:
    """What is copied where, the same at each save of a run; made at the first, together with the other processes.

    `buffer`: uint8, host memory (pinned for a GPU), all that this process writes behind the header of its file.
    """

    def __init__(self, state: State, topology: Topology):
        held, rank = local_shards(state), topology.rank
        self.names, self.device = list(state), topology.device
        self.plan = Plan.of(state, topology)
        self.file = self.plan.file(rank)
        self.buffer = torch.empty(
            int(self.plan.sizes[rank]), dtype=torch.uint8, pin_memory=topology.device.type == "cuda"
        )
        number = {piece: i for i, (piece, _) in enumerate(held)}
        self._from = [number[piece] for piece, _ in self.file]
        self._to = [_view(self.buffer, piece, at) for piece, at in self.file]
        copied = {piece: view for (piece, _), view in zip(self.file, self._to, strict=True)}
        shared = self.plan.replicated_shards(rank)
        self._others = {group: [number[it] for it in its if it not in copied] for group, its in shared.items()}
        self._own = {group: [copied[it] for it in its if it in copied] for group, its in shared.items()}

    def copy(self, state: State) -> dict[str, int]:
        """Gives fingerprints of the weights that others hold, too, and write: by the next step they are others."""
        if list(state) != self.names:
            raise RuntimeError("a run's state has the same names at every save")
        held = [tensor.detach() for value in state.values() for _, tensor in shards_of(value)]
        if self._to:
            torch._foreach_copy_(self._to, [held[i] for i in self._from], non_blocking=True)
        prints = {who: fingerprint([held[i] for i in its]) for who, its in self._others.items()}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {who: int(print_) for who, print_ in prints.items()}

    def agreed(self, prints: dict[str, int]) -> dict[str, int]:
        """Compares the fingerprints of all weights that other ranks hold, too. This runs in the background."""
        return {who: (int(fingerprint(self._own[who])) + print_) % 2**64 for who, print_ in prints.items()}


def _view(buffer: Tensor, piece: Shard, at: int) -> Tensor:
    return buffer[at : at + piece.nbytes].view(DTYPES[piece.dtype]).view(piece.box.size)


def _disagreement(parts: Sequence[dict[str, Any]]) -> str | None:
    """Copies of the same weights that differ: one of them is wrong, and none should be saved."""
    groups: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for rank, part in enumerate(parts):
        for group, print_ in part["prints"].items():
            groups[group][rank] = print_
    for prints in groups.values():
        if len(set(prints.values())) > 1:
            ranks = ",".join(map(str, prints)) if len(prints) <= SHOWN else f"{min(prints)} to {max(prints)}"
            return f"ranks {ranks} hold other values of weights that should be the same"
    return None
