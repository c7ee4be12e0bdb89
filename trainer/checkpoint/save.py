"""Saving: copy to host memory on the step, then write, check, publish and clean up in the background.

The order of publishing: files written and synced, hashed by the rank that wrote them, manifest written and synced last,
folder renamed to a name that never existed, parent synced. What happens before the rename leaves nothing that counts.
"""

from __future__ import annotations

import shutil
import time
import uuid
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from trainer.checkpoint.format import INDEX, VERSION, folder_name, write_manifest
from trainer.checkpoint.load import candidates
from trainer.files import sha256, sync_folder
from trainer.topology import Topology


class Saver:
    """One save in flight at most. Collectives run on a process group of their own (on the loop's they deadlock)."""

    def __init__(self, folder: Path, topology: Topology, keep: int, asynchronous: bool):
        self.folder, self.topology, self.keep, self.asynchronous = folder, topology, keep, asynchronous
        self.attempt = topology.broadcast(uuid.uuid4().hex[:8])
        self.last_step = -1
        self.problem: str | None = None  # why the newest save that ended is not there
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[dict[str, Any]] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> list[dict[str, Any]]:
        """Starts saving `tensors` as of now; `about` is JSON for the manifest.

        Waits for the save before it; gives what became of that one, as `poll`.
        """
        if step == self.last_step:
            return []
        events = self.wait()
        self.last_step = step
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._job = self._thread.submit(self._write, step, copies, about)
        return events if self.asynchronous else events + self.wait()

    def poll(self) -> list[dict[str, Any]]:
        """What became of the save in flight, once, when it is done: an event, `checkpoint` or `checkpoint_failed`."""
        return self.wait() if self._job is not None and self._job.done() else []

    def wait(self) -> list[dict[str, Any]]:
        """As `poll`, but waits for it."""
        if self._job is None:
            return []
        job, self._job = self._job, None
        event = job.result()
        self.problem = event.get("reason")
        return [event]

    def close(self) -> None:
        self._thread.shutdown()

    def _write(self, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        attempt = self.folder / f".attempt-{folder_name(step)}-{self.attempt}"
        files, error = {}, None
        try:
            self._write_tensors(attempt, tensors)
            files = self._hash_own(attempt)
        except BaseException as failure:  # whatever it is, the other ranks wait for our word
            error = f"rank {self.topology.rank}: {_first_line(failure)}"
        parts = self.topology.gather_all({"files": files, "error": error}, self.topology.saving)
        error = next((part["error"] for part in parts if part["error"]), None)
        if error is None and self.topology.is_main:
            everything = {name: value for part in parts for name, value in part["files"].items()}
            manifest = {"version": VERSION, "step": step, **about, "files": everything}
            error = self._publish(attempt, step, manifest)
        if error is not None and self.topology.is_main:
            shutil.rmtree(attempt, ignore_errors=True)
        error = self.topology.gather_all(error, self.topology.saving)[0]
        seconds = round(time.monotonic() - started, 3)
        if error is not None:
            return {"kind": "checkpoint_failed", "step": step, "reason": error, "seconds": seconds}
        size = sum(value["bytes"] for part in parts for value in part["files"].values())
        return {"kind": "checkpoint", "step": step, "seconds": seconds, "bytes": size}

    def _write_tensors(self, attempt: Path, tensors: dict[str, Tensor]) -> None:
        # One writing thread: with more, torch may acknowledge what was not written (pytorch#191391).
        writer = dcp.FileSystemWriter(attempt, single_file_per_rank=True, sync_files=True, thread_count=1)
        alone = self.topology.saving is None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(dict(tensors), storage_writer=writer, process_group=self.topology.saving, no_dist=alone)

    def _hash_own(self, attempt: Path) -> dict[str, Any]:
        paths = list(attempt.glob(f"__{self.topology.rank}_*"))
        if self.topology.is_main:
            paths.append(attempt / INDEX)
        return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}

    def _publish(self, attempt: Path, step: int, manifest: dict[str, Any]) -> str | None:
        try:
            write_manifest(attempt, manifest)
            attempt.rename(self.folder / folder_name(step))
            sync_folder(self.folder)
        except OSError as failure:
            return _first_line(failure)
        with suppress(OSError):  # an old one that stays is no failure of the new one
            self._retain()
        return None

    def _retain(self) -> None:
        """Deletes all but the newest `keep`, each by a rename first, so that none is ever half there."""
        for path in candidates(self.folder)[: -self.keep]:
            trash = path.with_name(f".trash-{path.name}-{self.attempt}")
            path.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]
