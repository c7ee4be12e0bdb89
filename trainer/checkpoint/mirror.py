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

from trainer.checkpoint.format import CHUNK, INDEX, MANIFEST, Damaged, folder_name, tensor_file, verify
from trainer.checkpoint.retention import Retention, evaluation_of, step_of
from trainer.errors import ConfigError, PeerLost, TrainingError, first_line
from trainer.files import sync_folder
from trainer.topology import Topology


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
            self._store: Any = from_url(url, client_options={"allow_http": True})  # type: ignore[call-overload]
        except Exception as error:
            raise ConfigError(f"checkpoint.mirror={url}: {first_line(error)}") from None

    def steps(self) -> list[int]:
        """Those that count, in rising order. TrainingError where the bucket cannot be read."""
        try:
            found = self._ob.list_with_delimiter(self._store)["common_prefixes"]
            steps = [step_of(Path(name)) for name in map(str, found) if Path(name).name.startswith("step-")]
            return [step for step in sorted(steps) if self._manifest(step)]
        except Exception as error:
            raise TrainingError(f"checkpoint.mirror={self.url}: cannot be read: {first_line(error)}") from None

    def put(self, folder: Path, group: Any) -> str | None:
        """Copies the whole checkpoint in `folder`; gives on all ranks alike why it is not there."""
        rank, name = self.topology.rank, folder.name

        def files() -> None:
            own = [tensor_file(rank), *([INDEX] if self.topology.is_main else [])]
            self._put(folder, [file for file in own if (folder / file).exists()])

        def count() -> None:
            if self.topology.is_main:
                content = (folder / MANIFEST).read_bytes()
                try:
                    self._ob.put(self._store, f"{name}/{MANIFEST}", content, mode="create")
                except (self._ob.exceptions.AlreadyExistsError, self._ob.exceptions.PreconditionError):
                    if self._get(f"{name}/{MANIFEST}") != content:
                        raise FileExistsError("another run has put a checkpoint of this step there") from None
                self._clean(folder.parent)

        for part in (files, count):
            errors = self.topology.gather_all(_error(part), group)
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
        the events of it. Raises TrainingError, on other ranks than the main one PeerLost."""
        events: list[dict[str, Any]] = []
        while True:
            steps, problem = self.topology.broadcast(_answer(self.steps) if self.topology.is_main else None)
            if problem:
                raise (TrainingError if self.topology.is_main else PeerLost)(problem)
            tried = {event["step"] for event in events}
            step = max((step for step in steps if step > above and step not in tried), default=None)
            if step is None:
                return events
            attempt = folder / f".attempt-{folder_name(step)}-fetched"
            errors = self.topology.gather(_error(partial(self._fetch_own, step, attempt)))
            problem = next(filter(None, errors), None)
            if problem is None:
                problem = self.topology.broadcast(_error(partial(_take, attempt)) if self.topology.is_main else None)
            if not problem:
                return [*events, {"kind": "checkpoint_fetched", "step": step, "from": self.url}]
            events.append({"kind": "checkpoint_damaged", "step": step, "checkpoint": self.url, "reason": problem})

    def _fetch_own(self, step: int, attempt: Path) -> None:
        name, manifest = folder_name(step), self._manifest(step)
        if manifest is None:
            raise Damaged("its manifest is gone")
        attempt.mkdir(exist_ok=True)
        wanted = [f"{manifest['save']}/{file}" for file in manifest["files"]][
            self.topology.rank :: self.topology.world_size
        ]
        for path in [*wanted, *([MANIFEST] if self.topology.is_main else [])]:
            if not 0 < len(Path(path).parts) < 3 or ".." in path:
                raise Damaged(f"no file of a checkpoint: {path}")
            with open(attempt / Path(path).name, "wb") as file:
                for chunk in self._ob.get(self._store, f"{name}/{path}").stream(min_chunk_size=CHUNK):
                    file.write(chunk)

    def _put(self, folder: Path, names: Sequence[str]) -> None:
        attempt = json.loads((folder / MANIFEST).read_bytes())["save"]
        for name in names:
            self._ob.put(self._store, f"{folder.name}/{attempt}/{name}", folder / name)

    def _clean(self, beside: Path) -> None:
        """Deletes the superfluous ones, each beginning with its manifest."""
        evaluations = {
            step: evaluation_of(beside / folder_name(step)) or (self._manifest(step) or {}).get("evaluation")
            for step in self.steps()
        }
        for step in set(evaluations) - self.retention.stay(evaluations):
            self._ob.delete(self._store, f"{folder_name(step)}/{MANIFEST}")
            for page in self._ob.list(self._store, f"{folder_name(step)}/"):
                self._ob.delete(self._store, [item["path"] for item in page])

    def _manifest(self, step: int) -> dict[str, Any] | None:
        try:
            return json.loads(self._get(f"{folder_name(step)}/{MANIFEST}"))
        except FileNotFoundError:
            return None

    def _get(self, path: str) -> bytes:
        return bytes(self._ob.get(self._store, path).bytes())


def _take(attempt: Path) -> None:
    """Makes what was fetched count, if every byte is what the manifest says."""
    verify(attempt)
    sync_folder(attempt)
    attempt.rename(attempt.with_name(attempt.name.removeprefix(".attempt-").removesuffix("-fetched")))
    sync_folder(attempt.parent)


def _answer(make: Callable[[], Any]) -> list[Any]:
    try:
        return [make(), None]
    except TrainingError as error:
        return [None, str(error)]


def _error(work: Callable[[], None]) -> str | None:
    """What went wrong, whatever it is: the other ranks wait for our word."""
    try:
        work()
    except Exception as error:
        return first_line(error)
    return None
