"""Copies of checkpoints in a bucket, with the same promise as on disk: whole, or they do not count.

Every attempt to copy uses its own names; the manifest comes last, under the one name that counts, and only if there is
none yet (a conditional put). So what counts is never overwritten, and an interrupted copy is not seen.

    <url>/step-00000100/manifest.json                   says in "save" which attempt it is
    <url>/step-00000100/<attempt>/rank-00000.safetensors, index.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from trainer.checkpoint.format import (
    INDEX,
    MANIFEST,
    DamagedCheckpoint,
    check_contents,
    check_headers,
    check_sizes,
    folder_name,
    read_index,
    read_manifest,
    tensor_file,
)
from trainer.checkpoint.retention import STEP, Retention, evaluation_of, step_of
from trainer.errors import ConfigError, Outage, PeerLost, TrainingError, first_line
from trainer.files import move_folder, read_file, stat_file, sync_folder
from trainer.outage import is_outage
from trainer.topology import Topology

REQUEST = "10m"  # timeout of a request, for a part or a range of a file on a slow line
RANGE_BYTES = 64 << 20  # bytes that are fetched by one request
SMALLEST_PART, MOST_PARTS = 5 << 20, 9000  # bytes; S3 allows 10,000
PARTS_AT_ONCE, BYTES_AT_ONCE = 12, 256 << 20


class Mirror:
    """Copies of checkpoints in a bucket. `url`: s3://bucket/folder, gs://, az:// or any other that obstore opens;
    credentials come from the environment. All ranks call `put` and `fetch` together, each with its share of the
    files."""

    def __init__(self, url: str, topology: Topology, retention: Retention = Retention()):  # noqa: B008
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            problem = "needs the package obstore: pip install 'onecurve[remote]'"
            raise ConfigError(f"checkpoint.mirror={url}: {problem}") from None
        self._ob, self.url, self.topology, self.retention = obstore, url, topology, retention
        try:
            self._store: Any = from_url(url, client_options={"allow_http": True, "timeout": REQUEST})  # type: ignore[call-overload]
        except Exception as error:
            raise ConfigError(f"checkpoint.mirror={url}: {first_line(error)}") from None

    def steps(self) -> list[int]:
        """Returns the steps of complete checkpoints, ascending. Raises Outage if the bucket does not answer,
        TrainingError if it refuses."""
        try:
            prefixes = self._ob.list_with_delimiter(self._store)["common_prefixes"]
            steps = [step_of(Path(name)) for name in map(str, prefixes) if STEP.fullmatch(Path(name).name)]
            return [step for step in sorted(steps) if self._manifest(step)]
        except Exception as error:
            text = f"checkpoint.mirror={self.url}: cannot be read: {first_line(error)}"
            raise (TrainingError if self._refuses(error) else Outage)(text) from None

    def _refuses(self, error: Exception) -> bool:
        """Returns whether the error is an answer of the bucket, which another request would not change."""
        errors = self._ob.exceptions
        refusals = (errors.PermissionDeniedError, errors.UnauthenticatedError, errors.InvalidPathError, ValueError)
        return isinstance(error, refusals)

    def put(self, folder: Path, group: Any) -> str | None:
        """Copies the whole checkpoint in `folder`. Returns why that failed, the same on all ranks; None if it did
        not."""
        rank, name = self.topology.rank, folder.name

        def put_files() -> None:
            files = [tensor_file(rank), *([INDEX] if self.topology.is_main else [])]
            self._put(folder, [file for file in files if (folder / file).exists()])

        def put_manifest() -> None:
            if self.topology.is_main:
                content = read_file(folder / MANIFEST)
                try:
                    self._ob.put(self._store, f"{name}/{MANIFEST}", content, mode="create")
                except (self._ob.exceptions.AlreadyExistsError, self._ob.exceptions.PreconditionError):
                    if self._get(f"{name}/{MANIFEST}") != content:
                        raise FileExistsError("another run has put a checkpoint of this step there") from None
                with suppress(Exception):  # the copy is done; superfluous ones are deleted the next time
                    self._clean(folder.parent)

        for action in (put_files, put_manifest):
            errors = self.topology.run_on_all(partial(_catch_error, action), group)  # without a time limit
            if problem := next(filter(None, errors), None):
                return problem
        return None

    def amend(self, folder: Path) -> None:
        """Copies the manifest again, which may have new entries, if the copy is of the same save. A failure here does
        no harm: when superfluous copies are deleted, the manifest on disk is read, too."""
        content, path = (folder / MANIFEST).read_bytes(), f"{folder.name}/{MANIFEST}"
        with suppress(Exception):  # whatever the bucket's library raises
            copy = self._get(path)
            if copy != content and json.loads(copy)["save"] == json.loads(content)["save"]:
                self._ob.put(self._store, path, content)

    def fetch(self, folder: Path, above: int) -> list[dict[str, Any]]:
        """Downloads the newest whole checkpoint of a step above `above` into `folder`, where it counts like any other.
        Returns the events to record. Raises Outage or TrainingError; PeerLost on ranks other than the main one."""
        events: list[dict[str, Any]] = []
        while True:
            steps = self._unwrap(self.topology.run_on_main(partial(_catch, self.steps)))
            damaged_steps = {event["step"] for event in events}
            step = max((step for step in steps if step > above and step not in damaged_steps), default=None)
            if step is None:
                return events
            attempt = folder / f".attempt-{folder_name(step)}-fetched"
            outcomes = self.topology.run_on_all(
                partial(_catch, partial(self._fetch_share, step, attempt)), self.topology.control
            )
            problem = next(filter(None, map(self._unwrap, outcomes)), None)
            if problem is None:
                problem = self._unwrap(self.topology.run_on_main(partial(_catch, partial(_publish, attempt))))
            if not problem:
                return [*events, {"kind": "checkpoint_fetched", "step": step, "from": self.url}]
            events.append({"kind": "checkpoint_damaged", "step": step, "checkpoint": self.url, "reason": problem})

    def _unwrap(self, outcome: Sequence[Any]) -> Any:
        """Returns the value of an outcome of `_catch` on some rank; raises its error on all ranks."""
        value, error, is_away = outcome
        if error is not None:
            raise (PeerLost if not self.topology.is_main else Outage if is_away else TrainingError)(error)
        return value

    def _fetch_share(self, step: int, attempt: Path) -> str | None:
        """Fetches this rank's share of the files and checks every byte of it. Returns why it is damaged, if it is.
        Raises Outage; TrainingError if the bucket refuses or this disk fails."""
        try:
            manifest = self._manifest(step)
            if manifest is None:
                return "its manifest is gone"
            names = list(manifest["files"])
            if odd := [name for name in [manifest["save"], *names] if Path(name).name != name or name == ".."]:
                return f"no file of a checkpoint: {odd[0]}"
            share, source = names[self.topology.rank :: self.topology.world_size], folder_name(step)
            attempt.mkdir(exist_ok=True)
            if self.topology.is_main:
                (attempt / MANIFEST).write_bytes(self._get(f"{source}/{MANIFEST}"))
            for name in share:
                self._download(
                    f"{source}/{manifest['save']}/{name}", attempt / name, int(manifest["files"][name]["bytes"])
                )
            check_sizes(attempt, manifest, share)
            check_contents(attempt, manifest, share)
        except (DamagedCheckpoint, FileNotFoundError, KeyError, TypeError, ValueError) as damage:
            return str(damage) if isinstance(damage, DamagedCheckpoint) else first_line(damage)
        except OSError as error:
            text = f"{error.filename or attempt}: {error.strerror or error}, while checkpoint.mirror is fetched"
            raise (Outage if is_outage(error) else TrainingError)(text) from None
        except self._ob.exceptions.BaseError as error:
            text = f"checkpoint.mirror={self.url}: step {step} cannot be fetched: {first_line(error)}"
            raise (TrainingError if self._refuses(error) else Outage)(text) from None
        return None

    def _download(self, path: str, target: Path, size: int) -> None:
        """Downloads a file range by range, so that a request is short and a failed one does not restart the file.
        Raises DamagedCheckpoint if it has another size."""
        if (actual_size := self._ob.head(self._store, path)["size"]) != size:
            raise DamagedCheckpoint(f"{target.name} has {actual_size} bytes, not {size}")
        with open(target, "wb") as file:
            for start in range(0, size, RANGE_BYTES):
                end = min(start + RANGE_BYTES, size)
                file.write(self._ob.get_range(self._store, path, start=start, end=end))

    def _put(self, folder: Path, names: Sequence[str]) -> None:
        attempt = json.loads(read_file(folder / MANIFEST))["save"]
        for name in names:
            chunk_size = part_size(stat_file(folder / name).st_size)
            self._ob.put(
                self._store,
                f"{folder.name}/{attempt}/{name}",
                folder / name,
                chunk_size=chunk_size,
                max_concurrency=max(1, min(PARTS_AT_ONCE, BYTES_AT_ONCE // chunk_size)),
            )

    def _clean(self, local_folder: Path) -> None:
        """Deletes the superfluous copies, the manifest of each first. `local_folder` has the checkpoints on disk."""
        evaluations = {}
        for step in self.steps():
            try:
                on_disk = evaluation_of(local_folder / folder_name(step))
            except (Outage, OSError):
                return  # for now: it may be the best
            evaluations[step] = on_disk or (self._manifest(step) or {}).get("evaluation")
        for step in set(evaluations) - self.retention.steps_to_keep(evaluations):
            self._ob.delete(self._store, f"{folder_name(step)}/{MANIFEST}")
            for page in self._ob.list(self._store, f"{folder_name(step)}/"):
                self._ob.delete(self._store, [item["path"] for item in page])

    def _manifest(self, step: int) -> dict[str, Any] | None:
        try:
            return json.loads(self._get(f"{folder_name(step)}/{MANIFEST}"))
        except (FileNotFoundError, ValueError):  # there is no copy that counts
            return None

    def _get(self, path: str) -> bytes:
        return bytes(self._ob.get(self._store, path).bytes())


def part_size(size: int) -> int:
    """Returns how many bytes each part of an upload has: S3 takes at most 10,000, all but the last of at least 5
    MiB."""
    return max(SMALLEST_PART, -(-size // MOST_PARTS))


def _publish(attempt: Path) -> str | None:
    """Renames a fetched checkpoint so that it counts, if its files, which were checked one by one, are what manifest
    and index say. Returns why not, if not."""
    final = attempt.with_name(attempt.name.removeprefix(".attempt-").removesuffix("-fetched"))
    try:
        manifest = read_manifest(attempt)
        check_sizes(attempt, manifest)
        check_headers(attempt, read_index(attempt, manifest), list(manifest["files"]))
    except DamagedCheckpoint as damage:
        return str(damage)
    sync_folder(attempt)
    move_folder(attempt, final)
    return None


def _catch(work: Callable[[], Any]) -> list[Any]:
    """Returns the value of `work`, the text of its error and whether that is an outage. Never raises: the other ranks
    wait for this one's result."""
    try:
        return [work(), None, False]
    except Outage as error:
        return [None, str(error), True]
    except Exception as error:
        return [None, str(error) if isinstance(error, TrainingError) else first_line(error), is_outage(error)]


def _catch_error(work: Callable[[], None]) -> str | None:
    """Returns the text of the error of `work`, if it raises one. Never raises: the other ranks wait for this one's
    result."""
    try:
        work()
    except Exception as error:
        return first_line(error)
    return None
