"""The run's data, opened: from the config to the stream that training reads and the pass that judges it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.data import shakespeare
from trainer.data import tokenizer as tokenizers
from trainer.data.batch_sizes import Batches
from trainer.data.index import Summary
from trainer.data.mixture import Mixture
from trainer.data.order import ORDER
from trainer.data.packing import Packed
from trainer.data.prepared_source import PreparedSource
from trainer.data.samples import Recipe, Samples
from trainer.data.shard_spec import file_name
from trainer.data.shards import Shards, from_json
from trainer.data.shared_work import Problem, problem_of, raise_problems, team_of
from trainer.data.storage import Storage
from trainer.data.stream import Batch, OrderedSource, RankStream, Source, Stream
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokens import TokenLine
from trainer.data.validation import Validation
from trainer.errors import ConfigError, DataError, OnecurveError
from trainer.facts import TOO_EARLY, Facts
from trainer.files import read_file
from trainer.models.factory import knows_weights
from trainer.objectives import Objective, prepares
from trainer.objectives.by_source import SOURCE, by_source
from trainer.plugin_checks import check_objective
from trainer.registry import plugin
from trainer.run_directory import CATALOG, is_restarted
from trainer.secrets import masked, shown
from trainer.topology import ALONE, Topology, raise_open_files

# Data sets that are made on first use: (cache folder, tokenizer) -> folder of shards and tokenizer.json.
DATASETS: dict[str, Callable[[Path, str], Path]] = {"shakespeare": shakespeare.ensure}


# Keys of the data section that say where and how the data is read, not which data comes when. (The fingerprint of the
# tokenizer tells of its own.)
HOW_DATA_IS_READ = {
    "name", "shards", "sources", "reweight", "validation", "tokenizer", "separator", "special_tokens", "workers",
    "processes", "on_error", "error_budget", "ledger", "cache", "cache_gb", "patience_s", "mmap", "allow_pipe",
}  # fmt: skip

# Keys of the model section that say by what means it is computed or where it is found, not what it is. Where `weights`
# are those of a model that knows them, their fingerprint takes the place of the key.
HOW_MODEL_IS_COMPUTED, FOUND = {"fused_norm"}, {"weights"}


@dataclass(frozen=True)
class FoundData:
    """The run's shards, cataloged, and its tokenizer: what can be found wrong without reading a sample."""

    training: dict[str, Shards]
    held_out: Shards | None
    tokenizer: Tokenizer

    def identity(self, config: Config, given: str | None, frozen: Mapping[str, str], step: int) -> dict[str, Any]:
        """What the run is, as far as its first `step` steps go: what no later life of it may change. `given`: the
        fingerprint of the weights that it started with, if it did not draw them; `frozen`: those of other models."""
        until = max(step, 1)
        ramp = sorted(config.train.batch_ramp.items())
        starts = [0, *(end for end, _ in ramp)]
        begun = {str(end): size for start, (end, size) in zip(starts, ramp, strict=False) if start < until}
        model = _identity_of(config.model, FOUND if knows_weights(config) else set())
        return {
            "model": model | ({"weights": given} if given else {}),
            "objective": masked(config.objective.model_dump(mode="json")),
            "data": {
                "order": ORDER,
                "shards": {name: shards.fingerprint for name, shards in self.training.items()},
                "weights": {str(at): given for at, given in weights(config).items() if at < until},
                "tokenizer": self.tokenizer.fingerprint,
                **masked(config.data.model_dump(mode="json", exclude=HOW_DATA_IS_READ)),
            },
            "train": {"global_batch": config.train.global_batch, "batch_ramp": begun},
            "run": {"seed": config.run.seed},
            **_others(config, frozen),
        }


@dataclass(frozen=True)
class RunData:
    """What training reads, what it is judged by, the tokenizer of both, and the objective, which makes examples of
    their rows."""

    stream: Stream
    validation: Validation | None
    tokenizer: Tokenizer
    objective: Objective
    catalog: dict[str, Any]
    """By source, JSON-able, what a later attempt must find unchanged: its fingerprint and its shards' summaries."""


def _example(made: Sequence[RankStream]) -> Batch:
    if not made:
        raise ConfigError(TOO_EARLY)
    return made[0].example()


def _others(config: Config, frozen: Mapping[str, str]) -> dict[str, Any]:
    """What a run is by its other models; nothing where there are none."""
    trained = {name: _identity_of(other.model, FOUND) for name, other in config.models.trained.items()}
    return {"models": {"trained": trained, "frozen": dict(frozen)}} if trained or frozen else {}


def _identity_of(model: Any, besides: set[str]) -> dict[str, Any]:
    """What a run is by the section of a model but for these keys; of its transforms the order counts, too."""
    values = masked(model.model_dump(mode="json", exclude=HOW_MODEL_IS_COMPUTED | besides))
    order = list(values["transforms"])
    return values | ({"transforms_order": order} if len(order) > 1 else {})


def weights(config: Config) -> dict[int, list[float]]:
    """Steps done -> the weights of the sources from there on, by their names: in which order they are written does not
    matter."""
    if not (mixed := sorted(config.data.sources.items())):
        return {0: [1.0]}
    later = {step: [given[name] for name, _ in mixed] for step, given in sorted(config.data.reweight.items())}
    return {0: [source.weight for _, source in mixed], **later}


def open_shards(config: Config, topology: Topology) -> FoundData:
    """Finds and indexes the data on every rank; each makes its part of the indexes that are not there yet.

    Raises ConfigError on all ranks, with all that is missing or damaged on any of them. Its exit code is DataError's
    where damage is all that is wrong.
    """
    raise_open_files()
    data, opening = config.data, _Opening(config, topology)
    base = opening.attempt(lambda: _built_in_folder(config, topology))
    opening.raise_problems()
    tokenizer = opening.attempt(lambda: _tokenizer(config, base))
    specs = {f"data.sources.{name}.shards": (name, source.shards) for name, source in sorted(data.sources.items())}
    before = topology.broadcast(_catalog(config) if topology.is_main else None)
    training = {
        name: opening.attempt(partial(opening.shards, spec, base, key, _before(before.get(name)), training=True))
        for key, (name, spec) in (specs or {"data.shards": ("all", data.shards)}).items()
    }
    held_out = None
    if data.validation is not None:
        held_out = opening.attempt(partial(opening.shards, data.validation, base, "data.validation"))
    opening.raise_problems()
    for shards in [*training.values(), held_out] if data.decoded else []:
        if shards is not None:  # a field that is not there, a function that cannot be imported
            opening.attempt(partial(opening.source, shards, tokenizer))
    opening.raise_problems()
    return FoundData(training, held_out, tokenizer)


def open_run_data(config: Config, topology: Topology, found: FoundData) -> RunData:
    """What training reads of the shards that were found; text is encoded here, once. Raises as `open_shards` does."""
    data, opening = config.data, _Opening(config, topology)
    made: list[RankStream] = []
    facts = Facts.of(config, found.tokenizer, lambda: _example(made))
    kind = plugin(config, "objective")
    if config.track.by_source:
        kind = by_source(kind, sorted(config.data.sources))
    objective = check_objective(config, kind(config.objective, facts))
    sources = [opening.attempt(partial(opening.source, shards, found.tokenizer)) for shards in found.training.values()]
    judged = None
    if found.held_out is not None:
        judged = opening.attempt(partial(opening.source, found.held_out, found.tokenizer, held_out=True))
    opening.raise_problems()
    if prepares(objective):
        sources = [PreparedSource(source, objective.example) for source in sources]
        judged = judged and PreparedSource(judged, objective.example)
    parts = [OrderedSource(source, data.lanes, data.window, config.run.seed) for source in sources]
    batches = Batches(config.train.global_batch, config.train.batch_ramp)
    share = RankStream(
        parts=parts,
        mixture=Mixture([(batches.taken(step), given) for step, given in weights(config).items()]),
        batches=batches,
        micro_batch=config.train.micro_batch,
        seed=config.run.seed,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        ledger=data.ledger and topology.is_data_rank,
        tolerant=data.on_error == "quarantine",
        numbered=SOURCE if config.track.by_source else "",
    )
    made.append(share)
    validation = judged and Validation(
        judged,
        micro_batch=config.train.micro_batch or config.train.global_batch // topology.dp_size,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        units=config.eval.steps and config.eval.steps * config.train.global_batch,
        workers=data.workers,
    )
    stream = Stream(share, workers=data.workers, processes=data.processes)
    catalog = {
        name: {
            "fingerprint": source.fingerprint,
            "shards": [file_name(url) for url in shards.urls],
            "summaries": list(map(asdict, shards.summaries)),
        }
        for (name, shards), source in zip(found.training.items(), sources, strict=True)
    }
    return RunData(stream, validation, found.tokenizer, objective, catalog)


class _Opening:
    """Opens things on all ranks and collects the problems, so that all are reported at once."""

    def __init__(self, config: Config, topology: Topology):
        self.config, self.topology = config, topology
        self.team = team_of(config, topology)
        self.cache = Path(config.data.cache).expanduser()
        self.tolerant = config.data.on_error == "quarantine"
        self.problems: list[Problem] = []

    def attempt(self, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except OnecurveError as error:
            self.problems.append(problem_of(error))

    def raise_problems(self) -> None:
        """Raises the problems of any rank so far, on all ranks."""
        raise_problems(tuple(problem) for part in self.topology.gather(self.problems) for problem in part)

    def shards(
        self,
        spec: Any,
        base: Path | None,
        key: str,
        before: Sequence[tuple[str, Summary]] = (),
        *,
        training: bool = False,
    ) -> Shards:
        """The shards that `key` names, for training or for validation, where they must be whole."""
        data = self.config.data
        paths = [str(base / part) if base else part for part in ([spec] if isinstance(spec, str) else spec)]
        storage = Storage(
            self.cache,
            cache_bytes=int(data.cache_gb * 1e9),
            allow_pipe=data.allow_pipe,
            mmap=data.mmap,
            patience_s=data.patience_s,
        )
        try:
            return Shards.open(
                paths,
                getattr(data, "field", None),
                storage,
                key=key,
                tolerant=self.tolerant and training,
                before=before,
                team=self.team,
                patient=is_restarted(),  # it was right when the run was started by hand
            )
        except ConfigError as error:
            if base is None or error.exit_code != ConfigError.exit_code:
                raise
            yours = f"{key}: data={data.name} brings shards of its own; for yours: data=webdataset, or data=samples"
            raise ConfigError([*error.problems, yours]) from error

    def source(self, shards: Shards, tokenizer: Tokenizer, held_out: bool = False) -> Source:
        """The units of some shards: packed sequences of their text, or their samples decoded."""
        data = self.config.data
        if data.decoded:
            samples = Samples(shards, Recipe.of(self.config, tokenizer))
            if self.topology.is_main:
                samples.check()
            return samples
        line = TokenLine(shards, tokenizer, self.cache, tolerant=self.tolerant and not held_out, team=self.team)
        if line.total < 2:
            raise DataError(f"{', '.join(map(shown, shards.urls[:8]))}: no token to predict: the documents are empty")
        packing = "concat" if held_out else data.packing
        return Packed(line, data.sequence_length, packing=packing, document_mask=data.document_mask, team=self.team)


def _catalog(config: Config) -> dict[str, Any]:
    """What the run's folder tells of the data that the run began with, by source; {} if it has not begun."""
    with suppress(OSError, ValueError):
        kept = json.loads(read_file(Path(config.run.dir).expanduser() / CATALOG))
        if isinstance(kept, dict) and (is_restarted() or not config.run.fresh):
            return kept
    return {}


def _before(kept: Any) -> list[tuple[str, Summary]]:
    """Names and summaries of a source's shards as they were; [] if it is not told, or not to be understood."""
    with suppress(KeyError, TypeError, ValueError):
        return list(zip(kept["shards"], map(from_json, kept["summaries"]), strict=True))
    return []


def _built_in_folder(config: Config, topology: Topology) -> Path | None:
    """The folder of a data set that we make ourselves; the main rank first, the others then find it."""
    make = DATASETS.get(config.data.name)
    if make is None:
        return None
    cache, tokenizer = Path(config.data.cache).expanduser(), config.data.tokenizer
    made = None
    try:
        if topology.is_main:
            made = make(cache, tokenizer)
    finally:
        topology.barrier()
    return made or make(cache, tokenizer)


def tokenizer_of(config: Config) -> Tokenizer:
    """Returns the run's tokenizer without opening its data; a built-in data set is made if needed."""
    return _tokenizer(config, _built_in_folder(config, ALONE))


def _tokenizer(config: Config, base: Path | None) -> Tokenizer:
    name = config.data.tokenizer
    place = str(base / "tokenizer.json") if base and name != "bytes" else name
    return tokenizers.load(place, config.data.separator, config.data.special_tokens)
