"""Saving: copy to host memory on the step, then write, check, publish and clean up in the background.

The order of publishing: files are written, hashed as they are written, and synced; what was written is compared with
what was planned, and weights that several processes hold with each other; index and manifest are written and synced,
the manifest last; the folder is renamed to a name that never existed, and its parent synced. A failure before the
rename leaves nothing that counts, and a checkpoint is not reported before all of this is done.
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

WRITER = ".writer"  # says which attempt of the run may publish here: an older one that still writes may not
PAUSES_S = (1.0, 5.0)  # before a save that failed is tried again
OVERDUE_S = 60.0  # after all tries have failed, the next save comes after this time at the latest
SHOWN = 16  # ranks in a message
Event = dict[str, Any]


class Saver:
    """Saves checkpoints, one at a time. Its collectives run on their own process group (on the loop's they
    deadlock)."""

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
        """`overrun`: what a save does if the last one is still being written: "wait" for it, or "skip". `mirror`: where
        each checkpoint is copied to, once it is published."""
        self.folder, self.topology, self.retention = folder, topology, retention
        self.asynchronous, self.overrun, self.mirror, self.pauses = asynchronous, overrun, mirror, pauses
        self.writer_id = topology.broadcast(uuid.uuid4().hex[:8])
        if topology.is_main:
            replace_file(folder / WRITER, self.writer_id.encode())
        self.last_step = -1  # of the newest save that was started
        self.newest: int | None = None  # step of the newest checkpoint
        self.problem: str | None = None  # why the last save failed, if it did
        self._failed_at = 0.0
        self._layout: _Layout | None = None
        self._started_at: float | None = None  # `time.monotonic()` of the save in flight
        self.durations: deque[float] = deque(maxlen=64)  # seconds of previous saves
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[list[Event]] | None = None
        self._evaluations: dict[int, dict[str, float]] = {}  # not in the manifests yet, by step
        self._amendment: Future[None] | None = None

    @property
    def overdue(self) -> bool:
        """Returns whether the last save failed more than `OVERDUE_S` ago."""
        return self.problem is not None and time.monotonic() > self._failed_at + OVERDUE_S

    def save(self, step: int, state: State, run_info: dict[str, Any], must: bool = False) -> list[Event]:
        """Starts saving `state` as of now; `run_info` is JSON for the manifest. All ranks call it. `must`: never skip
        it.

        Returns the events of the previous save, as `poll` does. Raises TrainingError for a state that cannot be saved.
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
        fingerprints = self._copy(state)
        self._started_at = time.monotonic()
        self._job = self._thread.submit(self._write, step, run_info, fingerprints)
        return events if self.asynchronous else events + self.wait()

    def poll(self) -> list[Event]:
        """Returns the events of the save in flight once it is done: first `checkpoint` or `checkpoint_failed`."""
        is_amended = self._amendment is None or self._amendment.done()
        return self.wait() if self._job is not None and self._job.done() and is_amended else []

    def wait(self) -> list[Event]:
        """Waits for the save in flight and returns its events, as `poll` does."""
        if self._amendment is not None:
            self._amendment.result()
            self._amendment = None
        if self._job is None:
            return []
        job, self._job = self._job, None
        events = job.result()
        self.problem, self._failed_at = events[0].get("reason"), time.monotonic()
        if self.problem is None:
            self.newest = events[0]["step"]
        return events

    def record_evaluation(self, step: int, evaluation: dict[str, float] | None) -> None:
        """Adds the evaluation at this step to its checkpoint once that is written, on the main rank; does nothing if
        there is no such checkpoint. If the disk fails for now, it is tried again with the next evaluation."""
        if evaluation and self.topology.is_main:
            self._evaluations[step] = evaluation
            self._amendment = self._thread.submit(self._amend)

    def _amend(self) -> None:
        for step, evaluation in list(self._evaluations.items()):
            with suppress(OSError, Outage):
                with suppress(DamagedCheckpoint, TrainingError):
                    self._started_at = time.monotonic()
                    try:
                        amend_manifest(self.folder / folder_name(step), evaluation=evaluation)
                    finally:
                        self._started_at = None
                    if self.mirror is not None:  # not watched for hangs: it may be slow
                        self.mirror.amend(self.folder / folder_name(step))
                del self._evaluations[step]

    def resume_from(self, step: int) -> None:
        """Notes that the run's state is now that of this checkpoint."""
        self.last_step = self.newest = step

    def save_in_flight(self) -> tuple[str, float] | None:
        """Returns the save in flight, for the watchdog: its name and when it started (`time.monotonic()`)."""
        started_at = self._started_at
        return None if started_at is None else ("save", started_at)

    def close(self) -> None:
        self._thread.shutdown()

    def _copy(self, state: State) -> dict[str, int]:
        """Copies what this process writes into host memory, as it will lie in the file. Returns fingerprints of the
        weights that other ranks write, by the group of ranks that holds them."""
        if self._layout is None:
            self._layout = _Layout(state, self.topology)
        return self._layout.copy(state)

    def _write(self, step: int, run_info: dict[str, Any], fingerprints: dict[str, int]) -> list[Event]:
        started = time.monotonic()
        try:
            events = self._write_with_retries(step, run_info, fingerprints, started)
        finally:
            self._started_at = None
            self.durations.append(time.monotonic() - started)
        if self.mirror is not None and events[0]["kind"] == "checkpoint":
            started, problem = time.monotonic(), self.mirror.put(self.folder / folder_name(step), self.topology.saving)
            details = {"step": step, "seconds": round(time.monotonic() - started, 3), "to": self.mirror.url}
            outcome = (
                {"kind": "checkpoint_not_mirrored", "reason": problem} if problem else {"kind": "checkpoint_mirrored"}
            )
            events.append({**outcome, **details})
        return events

    def _write_with_retries(
        self, step: int, run_info: dict[str, Any], fingerprints: dict[str, int], started: float
    ) -> list[Event]:
        for number, pause in enumerate((0.0, *self.pauses)):
            time.sleep(pause)
            size, error = self._try_write(step, run_info, fingerprints, number)
            if error is None:
                break
        event = {"step": step, "seconds": round(time.monotonic() - started, 3), "tries": number + 1}
        if error is not None:
            return [{"kind": "checkpoint_failed", **event, "reason": error}]
        return [{"kind": "checkpoint", **event, "bytes": size}]

    def _try_write(
        self, step: int, run_info: dict[str, Any], fingerprints: dict[str, int], number: int
    ) -> tuple[int, str | None]:
        """Returns the checkpoint's size and, the same on all ranks, why the save failed, if it did."""
        attempt = self.folder / f".attempt-{folder_name(step)}-{self.writer_id}-{number}"
        save_entry = {"save": f"{folder_name(step)}-{self.writer_id}-{number}"}
        local: dict[str, Any] = {"file": None, "error": None, "fingerprints": {}}
        try:
            assert self._layout is not None
            point("checkpoint.before_write")
            local["fingerprints"] = self._layout.complete_fingerprints(fingerprints)
            local["file"] = self._write_shards(attempt, save_entry)
        except BaseException as failure:  # whatever it is, the other ranks wait for this one's result
            local["error"] = f"rank {self.topology.rank}: {first_line(failure)}"
        results = self.topology.gather_all(local, self.topology.saving)
        error = next((result["error"] for result in results if result["error"]), None) or _find_disagreement(results)
        if error is None and self.topology.is_main:
            try:
                self._publish(attempt, step, run_info, save_entry, [result["file"] for result in results])
            except BaseException as failure:
                error = first_line(failure)
        if self.topology.is_main:
            if error is not None:
                shutil.rmtree(attempt, ignore_errors=True)
            else:
                with suppress(Exception):  # an old one that stays is not a failure of the new one, and the others wait
                    point("checkpoint.before_prune")
                    self.retention.apply(self.folder, f"{self.writer_id}-{step}")
        error = self.topology.gather_all(error, self.topology.saving)[0]
        return sum(result["file"]["bytes"] for result in results if result["file"]), error

    def _write_shards(self, attempt: Path, save_entry: dict[str, str]) -> dict[str, Any] | None:
        assert self._layout is not None
        rank, buffer, size = self.topology.rank, self._layout.buffer, len(self._layout.buffer)
        attempt.mkdir(exist_ok=True)
        if not size:
            return None
        if (free := free_bytes(attempt)) is not None and free < size:
            raise OSError(f"no space left: {size:,} bytes are to be written, {free:,} are free")
        header = header_of(self._layout.file, save_entry)
        return {**write_file(attempt / tensor_file(rank), [header, buffer.numpy().data]), "tensors": size}

    def _publish(
        self,
        attempt: Path,
        step: int,
        run_info: dict[str, Any],
        save_entry: dict[str, str],
        file_entries: list[dict[str, Any] | None],
    ) -> None:
        """Writes index and manifest and renames the folder. Raises OSError; RuntimeError if what was written is not
        what was planned."""
        assert self._layout is not None
        point("checkpoint.before_manifest")
        files = {tensor_file(rank): file for rank, file in enumerate(file_entries) if file}
        sizes = {name: file.pop("tensors") for name, file in files.items()}
        planned = {tensor_file(rank): size for rank, size in enumerate(self._layout.plan.sizes.tolist()) if size}
        if sizes != planned:
            file = min(name for name in {**sizes, **planned} if sizes.get(name) != planned.get(name))
            raise RuntimeError(f"{file}: planned were {planned.get(file)} bytes, written {sizes.get(file)}")
        files[INDEX] = write_index(attempt / INDEX, self._layout.plan.tensors)
        write_manifest(attempt, {"version": VERSION, "step": step, **save_entry, **run_info, "files": files})
        if (self.folder / WRITER).read_text() != self.writer_id:  # not waited for: the save is tried again
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
        """Returns whether an earlier try of this save was published, though its rename reported an error."""
        try:
            return str(read_manifest(final, patience_s=0).get("save")).startswith(f"{final.name}-{self.writer_id}-")
        except DamagedCheckpoint:
            return False


class _Layout:
    """What is copied where at each save of a run; made at the first one, by all ranks together.

    `buffer`: uint8, host memory (pinned for a GPU), all that this process writes after the header of its file.
    """

    def __init__(self, state: State, topology: Topology):
        shards, rank = local_shards(state), topology.rank
        self.names, self.device = list(state), topology.device
        self.plan = Plan.from_state(state, topology)
        self.file = self.plan.file(rank)
        self.buffer = torch.empty(
            int(self.plan.sizes[rank]), dtype=torch.uint8, pin_memory=topology.device.type == "cuda"
        )
        numbers = {shard: i for i, (shard, _) in enumerate(shards)}
        self._sources = [numbers[shard] for shard, _ in self.file]
        self._targets = [_view(self.buffer, shard, offset) for shard, offset in self.file]
        views = {shard: view for (shard, _), view in zip(self.file, self._targets, strict=True)}
        groups = self.plan.replicated_shards(rank)
        self._not_copied = {
            group: [numbers[shard] for shard in members if shard not in views] for group, members in groups.items()
        }
        self._copied = {
            group: [views[shard] for shard in members if shard in views] for group, members in groups.items()
        }

    def copy(self, state: State) -> dict[str, int]:
        """Copies what this process writes into the buffer. Returns the fingerprints of the replicated weights that
        other ranks write, which the next step changes."""
        if list(state) != self.names:
            raise RuntimeError("a run's state has the same names at every save")
        tensors = [tensor.detach() for value in state.values() for _, tensor in shards_of(value)]
        if self._targets:
            torch._foreach_copy_(self._targets, [tensors[i] for i in self._sources], non_blocking=True)
        sums = {group: fingerprint([tensors[i] for i in numbers]) for group, numbers in self._not_copied.items()}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {group: int(value) for group, value in sums.items()}

    def complete_fingerprints(self, fingerprints: dict[str, int]) -> dict[str, int]:
        """Returns the fingerprints of all replicated weights: those that `copy` returned, plus those of the copied
        ones. This runs in the background."""
        return {group: (int(fingerprint(self._copied[group])) + value) % 2**64 for group, value in fingerprints.items()}


def _view(buffer: Tensor, shard: Shard, offset: int) -> Tensor:
    return buffer[offset : offset + shard.nbytes].view(DTYPES[shard.dtype]).view(shard.box.size)


def _find_disagreement(results: Sequence[dict[str, Any]]) -> str | None:
    """Returns which replicas of the same weights differ, if any: one of them is wrong, and none should be saved."""
    groups: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for rank, result in enumerate(results):
        for group, value in result["fingerprints"].items():
            groups[group][rank] = value
    for values in groups.values():
        if len(set(values.values())) > 1:
            ranks = ",".join(map(str, values)) if len(values) <= SHOWN else f"{min(values)} to {max(values)}"
            return f"ranks {ranks} hold other values of weights that should be the same"
    return None
