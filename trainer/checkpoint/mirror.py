"""Copies of checkpoints in a bucket, with the promise that they have on disk: whole, or they do not count.

Every attempt to copy has names of its own; the manifest comes last, under the one name that counts, and only if nobody
was there before (a conditional put). So nobody overwrites what counts, and what is cut short is not seen.

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

REQUEST = "10m"  # how long one may take: a part or a stretch of a file, on a slow line
RANGE_BYTES = 64 << 20  # bytes that are fetched by one request
SMALLEST_PART, MOST_PARTS = 5 << 20, 9000  # bytes; S3 allows 10,000
PARTS_AT_ONCE, BYTES_AT_ONCE = 12, 256 << 20


class Mirror:
    """`url`: s3://bucket/folder, gs://, az:// and what else obstore opens; credentials come from the environment. All
    ranks call `put` and `fetch` together, each with its share of the files."""

    def __init__(self, url: str, topology: Topology, retention: Retention = Retention()):  # noqa: B008
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            needs = "needs the package obstore: pip install 'onecurve[remote]'"
            raise ConfigError(f"checkpoint.mirror={url}: {needs}") from None
        self._ob, self.url, self.topology, self.retention = obstore, url, topology, retention
        try:
            self._store: Any = from_url(url, client_options={"allow_http": True, "timeout": REQUEST})  # type: ignore[call-overload]
        except Exception as error:
            raise ConfigError(f"checkpoint.mirror={url}: {first_line(error)}") from None

    def steps(self) -> list[int]:
        """Returns the steps of complete checkpoints, ascending. Raises Outage if the bucket does not answer,
        TrainingError if it refuses."""
        try:
            found = self._ob.list_with_delimiter(self._store)["common_prefixes"]
            steps = [step_of(Path(name)) for name in map(str, found) if STEP.fullmatch(Path(name).name)]
            return [step for step in sorted(steps) if self._manifest(step)]
        except Exception as error:
            text = f"checkpoint.mirror={self.url}: cannot be read: {first_line(error)}"
            raise (TrainingError if self._refuses(error) else Outage)(text) from None

    def _refuses(self, error: Exception) -> bool:
        """Whether that is an answer, which asking again would not change."""
        known = self._ob.exceptions
        answers = (known.PermissionDeniedError, known.UnauthenticatedError, known.InvalidPathError, ValueError)
        return isinstance(error, answers)

    def put(self, folder: Path, group: Any) -> str | None:
        """Copies the whole checkpoint in `folder`; gives on all ranks alike why it is not there."""
        rank, name = self.topology.rank, folder.name

        def files() -> None:
            own = [tensor_file(rank), *([INDEX] if self.topology.is_main else [])]
            self._put(folder, [file for file in own if (folder / file).exists()])

        def count() -> None:
            if self.topology.is_main:
                content = read_file(folder / MANIFEST)
                try:
                    self._ob.put(self._store, f"{name}/{MANIFEST}", content, mode="create")
                except (self._ob.exceptions.AlreadyExistsError, self._ob.exceptions.PreconditionError):
                    if self._get(f"{name}/{MANIFEST}") != content:
                        raise FileExistsError("another run has put a checkpoint of this step there") from None
                with suppress(Exception):  # what was put is there; superfluous ones are looked for again
                    self._clean(folder.parent)

        for part in (files, count):
            errors = self.topology.run_on_all(partial(_error, part), group)  # it takes as long as it takes
            if problem := next(filter(None, errors), None):
                return problem
        return None

    def amend(self, folder: Path) -> None:
        """Copies the manifest again, which may have learnt something, where the copy is of the same save. What fails
        here is made up for when superfluous copies are looked for: then the manifest on disk counts, too."""
        content, path = (folder / MANIFEST).read_bytes(), f"{folder.name}/{MANIFEST}"
        with suppress(Exception):  # whatever the bucket's library raises
            copy = self._get(path)
            if copy != content and json.loads(copy)["save"] == json.loads(content)["save"]:
                self._ob.put(self._store, path, content)

    def fetch(self, folder: Path, above: int) -> list[dict[str, Any]]:
        """Brings the newest whole checkpoint of a step above this into `folder`, where it counts like any other. Gives
        the events of it. Raises Outage or TrainingError, on other ranks than the main one PeerLost."""
        events: list[dict[str, Any]] = []
        while True:
            steps = self._raised(self.topology.run_on_main(partial(_outcome, self.steps)))
            tried = {event["step"] for event in events}
            step = max((step for step in steps if step > above and step not in tried), default=None)
            if step is None:
                return events
            attempt = folder / f".attempt-{folder_name(step)}-fetched"
            fetched = self.topology.run_on_all(
                partial(_outcome, partial(self._fetch_own, step, attempt)), self.topology.control
            )
            problem = next(filter(None, map(self._raised, fetched)), None)
            if problem is None:
                problem = self._raised(self.topology.run_on_main(partial(_outcome, partial(_run_attempt, attempt))))
            if not problem:
                return [*events, {"kind": "checkpoint_fetched", "step": step, "from": self.url}]
            events.append({"kind": "checkpoint_damaged", "step": step, "checkpoint": self.url, "reason": problem})

    def _raised(self, outcome: Sequence[Any]) -> Any:
        """What some rank's work gave; raises on all ranks what it raised."""
        value, error, away = outcome
        if error is not None:
            raise (PeerLost if not self.topology.is_main else Outage if away else TrainingError)(error)
        return value

    def _fetch_own(self, step: int, attempt: Path) -> str | None:
        """Fetches this rank's share of the files and checks every byte of it. Gives why it is damaged, if it is. Raises
        Outage; TrainingError where this disk does not take it."""
        try:
            manifest = self._manifest(step)
            if manifest is None:
                return "its manifest is gone"
            names = list(manifest["files"])
            if odd := [name for name in [manifest["save"], *names] if Path(name).name != name or name == ".."]:
                return f"no file of a checkpoint: {odd[0]}"
            own, where = names[self.topology.rank :: self.topology.world_size], folder_name(step)
            attempt.mkdir(exist_ok=True)
            if self.topology.is_main:
                (attempt / MANIFEST).write_bytes(self._get(f"{where}/{MANIFEST}"))
            for name in own:
                self._download(
                    f"{where}/{manifest['save']}/{name}", attempt / name, int(manifest["files"][name]["bytes"])
                )
            check_sizes(attempt, manifest, own)
            check_contents(attempt, manifest, own)
        except (DamagedCheckpoint, FileNotFoundError, KeyError, TypeError, ValueError) as damage:
            return str(damage) if isinstance(damage, DamagedCheckpoint) else first_line(damage)
        except OSError as error:
            text = f"{error.filename or attempt}: {error.strerror or error}, while checkpoint.mirror is fetched"
            raise (Outage if is_outage(error) else TrainingError)(text) from None
        except self._ob.exceptions.BaseError as error:
            text = f"checkpoint.mirror={self.url}: step {step} cannot be fetched: {first_line(error)}"
            raise (TrainingError if self._refuses(error) else Outage)(text) from None
        return None

    def _download(self, path: str, to: Path, size: int) -> None:
        """A stretch at a time: no request takes as long as a whole file does, and one that fails does not begin it
        anew. Raises DamagedCheckpoint where it is of another size."""
        if (found := self._ob.head(self._store, path)["size"]) != size:
            raise DamagedCheckpoint(f"{to.name} has {found} bytes, not {size}")
        with open(to, "wb") as file:
            for start in range(0, size, RANGE_BYTES):
                end = min(start + RANGE_BYTES, size)
                file.write(self._ob.get_range(self._store, path, start=start, end=end))

    def _put(self, folder: Path, names: Sequence[str]) -> None:
        attempt = json.loads(read_file(folder / MANIFEST))["save"]
        for name in names:
            part = part_size(stat_file(folder / name).st_size)
            at_once = max(1, min(PARTS_AT_ONCE, BYTES_AT_ONCE // part))
            self._ob.put(
                self._store, f"{folder.name}/{attempt}/{name}", folder / name, chunk_size=part, max_concurrency=at_once
            )

    def _clean(self, beside: Path) -> None:
        """Deletes the superfluous ones, each beginning with its manifest."""
        evaluations = {}
        for step in self.steps():
            try:
                on_disk = evaluation_of(beside / folder_name(step))
            except (Outage, OSError):
                return  # for now: it may be the best
            evaluations[step] = on_disk or (self._manifest(step) or {}).get("evaluation")
        for step in set(evaluations) - self.retention.kept(evaluations):
            self._ob.delete(self._store, f"{folder_name(step)}/{MANIFEST}")
            for page in self._ob.list(self._store, f"{folder_name(step)}/"):
                self._ob.delete(self._store, [item["path"] for item in page])

    def _manifest(self, step: int) -> dict[str, Any] | None:
        try:
            return json.loads(self._get(f"{folder_name(step)}/{MANIFEST}"))
        except (FileNotFoundError, ValueError):  # no copy that counts
            return None

    def _get(self, path: str) -> bytes:
        return bytes(self._ob.get(self._store, path).bytes())


def part_size(size: int) -> int:
    """Bytes of the parts that a file is uploaded in: S3 takes 10,000 of them at most, none but the last below 5 MiB."""
    return max(SMALLEST_PART, -(-size // MOST_PARTS))


def _run_attempt(attempt: Path) -> str | None:
    """Makes what was fetched count, if its files, which were checked one by one, are what manifest and index say. Gives
    why not."""
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


def _outcome(work: Callable[[], Any]) -> list[Any]:
    """What work gives, or what it raises, and whether that is an outage: the other ranks wait for our word."""
    try:
        return [work(), None, False]
    except Outage as error:
        return [None, str(error), True]
    except Exception as error:
        return [None, str(error) if isinstance(error, TrainingError) else first_line(error), is_outage(error)]


def _error(work: Callable[[], None]) -> str | None:
    """What went wrong, whatever it is: the other ranks wait for our word."""
    try:
        work()
    except Exception as error:
        return first_line(error)
    return None
