"""Opens the run's data: from the config to the training stream and the validation pass."""

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
from trainer.data.deal import Deal
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


# Keys of the data section that say where and how the data is read, not which data comes when. (The tokenizer
# has a fingerprint.)
HOW_DATA_IS_READ = {
    "name", "shards", "sources", "reweight", "validation", "tokenizer", "separator", "special_tokens", "workers",
    "processes", "on_error", "error_budget", "ledger", "cache", "cache_gb", "patience_s", "mmap", "allow_pipe",
}  # fmt: skip

# Keys of the model section that say how the model is computed or where its weights are, not what it is. Where the model
# reads `weights`, their fingerprint takes the place of the key.
HOW_MODEL_IS_COMPUTED, WEIGHTS_KEY = {"fused_norm"}, {"weights"}


@dataclass(frozen=True)
class FoundData:
    """The run's indexed shards and its tokenizer: all that can be checked without reading a sample."""

    training: dict[str, Shards]
    held_out: Shards | None
    tokenizer: Tokenizer

    def identity(
        self, config: Config, weights_fingerprint: str | None, frozen: Mapping[str, str], step: int
    ) -> dict[str, Any]:
        """Returns what identifies the run up to step `step`, which no later attempt may change. `weights_fingerprint`:
        that of the pretrained weights that it started with, if any; `frozen`: those of the frozen models, by name."""
        num_steps = max(step, 1)
        ramp = sorted(config.train.batch_ramp.items())
        starts = [0, *(end for end, _ in ramp)]
        started_ramp = {str(end): size for start, (end, size) in zip(starts, ramp, strict=False) if start < num_steps}
        model = _identity_of(config.model, WEIGHTS_KEY if knows_weights(config) else set())
        return {
            "model": model | ({"weights": weights_fingerprint} if weights_fingerprint else {}),
            "objective": masked(config.objective.model_dump(mode="json")),
            "data": {
                "order": ORDER,
                "shards": {name: shards.fingerprint for name, shards in self.training.items()},
                "weights": {str(at): values for at, values in weights(config).items() if at < num_steps},
                "tokenizer": self.tokenizer.fingerprint,
                **masked(config.data.model_dump(mode="json", exclude=HOW_DATA_IS_READ)),
            },
            "train": {"global_batch": config.train.global_batch, "batch_ramp": started_ramp, **_leaves(config)},
            "run": {"seed": config.run.seed},
            **_other_models(config, frozen),
        }


@dataclass(frozen=True)
class RunData:
    """The training stream, the validation data, the tokenizer of both, and the objective, which makes examples of their
    rows."""

    stream: Stream
    validation: Validation | None
    tokenizer: Tokenizer
    objective: Objective
    catalog: dict[str, Any]
    """What a later attempt must find unchanged, JSON-able: each source's fingerprint and its shards' summaries."""


def _leaves(config: Config) -> dict[str, Any]:
    """Returns what identifies a run whose bits do not depend on its topology."""
    if config.train.deterministic == "run":
        return {}
    return {"deterministic": config.train.deterministic, "micro_batch": config.train.micro_batch}


def _example(streams: Sequence[RankStream]) -> Batch:
    if not streams:
        raise ConfigError(TOO_EARLY)
    return streams[0].example()


def _other_models(config: Config, frozen: Mapping[str, str]) -> dict[str, Any]:
    """Returns the identity of a run's further models; empty where there are none."""
    trained = {name: _identity_of(section.model, WEIGHTS_KEY) for name, section in config.models.trained.items()}
    return {"models": {"trained": trained, "frozen": dict(frozen)}} if trained or frozen else {}


def _identity_of(model: Any, excluded: set[str]) -> dict[str, Any]:
    """Returns the identity of a model by its section without the `excluded` keys; the order of transforms counts."""
    values = masked(model.model_dump(mode="json", exclude=HOW_MODEL_IS_COMPUTED | excluded))
    order = list(values["transforms"])
    return values | ({"transforms_order": order} if len(order) > 1 else {})


def weights(config: Config) -> dict[int, list[float]]:
    """Returns the weights of the sources by the number of steps done, in the order of their names: the order in the
    config does not matter."""
    if not (mixed := sorted(config.data.sources.items())):
        return {0: [1.0]}
    later = {step: [by_name[name] for name, _ in mixed] for step, by_name in sorted(config.data.reweight.items())}
    return {0: [source.weight for _, source in mixed], **later}


def open_shards(config: Config, topology: Topology) -> FoundData:
    """Finds and indexes the data on every rank; each makes its part of the missing indexes.

    Raises ConfigError on all ranks, with all that is missing or damaged on any of them. Its exit code is DataError's
    where the only problem is damage.
    """
    raise_open_files()
    data, opening = config.data, _Opening(config, topology)
    base = opening.attempt(lambda: _make_built_in(config, topology))
    opening.raise_problems()
    tokenizer = opening.attempt(lambda: _load_tokenizer(config, base))
    specs = {f"data.sources.{name}.shards": (name, source.shards) for name, source in sorted(data.sources.items())}
    before = topology.broadcast(_read_catalog(config) if topology.is_main else None)
    training = {
        name: opening.attempt(
            partial(opening.shards, spec, base, key, _recorded_shards(before.get(name)), training=True)
        )
        for key, (name, spec) in (specs or {"data.shards": ("all", data.shards)}).items()
    }
    held_out = None
    if data.validation is not None:
        held_out = opening.attempt(partial(opening.shards, data.validation, base, "data.validation"))
    opening.raise_problems()
    for shards in [*training.values(), held_out] if data.decoded else []:
        if shards is not None:  # a missing field, a function that cannot be imported
            opening.attempt(partial(opening.source, shards, tokenizer))
    opening.raise_problems()
    return FoundData(training, held_out, tokenizer)


def open_run_data(config: Config, topology: Topology, inputs: FoundData) -> RunData:
    """Opens the training and validation data in the shards; encodes text, once. Raises what `open_shards` raises."""
    data, opening = config.data, _Opening(config, topology)
    streams: list[RankStream] = []
    facts = Facts.of(config, inputs.tokenizer, lambda: _example(streams))
    objective_class = plugin(config, "objective")
    if config.track.by_source:
        objective_class = by_source(objective_class, sorted(config.data.sources))
    objective = check_objective(config, objective_class(config.objective, facts))
    sources = [
        opening.attempt(partial(opening.source, shards, inputs.tokenizer)) for shards in inputs.training.values()
    ]
    validation_source = None
    if inputs.held_out is not None:
        validation_source = opening.attempt(partial(opening.source, inputs.held_out, inputs.tokenizer, held_out=True))
    opening.raise_problems()
    if prepares(objective):
        sources = [PreparedSource(source, objective.example) for source in sources]
        validation_source = validation_source and PreparedSource(validation_source, objective.example)
    parts = [OrderedSource(source, data.lanes, data.window, config.run.seed) for source in sources]
    batches = Batches(config.train.global_batch, config.train.batch_ramp)
    deal = Deal.of(config, topology.dp_size, topology.local_size)
    share = RankStream(
        parts=parts,
        mixture=Mixture([(batches.position(step), values) for step, values in weights(config).items()]),
        batches=batches,
        micro_batch=config.train.micro_batch,
        seed=config.run.seed,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        deal=deal,
        ledger=data.ledger and topology.is_data_rank,
        tolerant=data.on_error == "quarantine",
        source_field=SOURCE if config.track.by_source else "",
    )
    streams.append(share)
    validation = validation_source and Validation(
        validation_source,
        micro_batch=config.train.micro_batch or config.train.global_batch // topology.dp_size,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        deal=deal,
        num_examples=config.eval.steps and config.eval.steps * config.train.global_batch,
        workers=data.workers,
    )
    stream = Stream(share, workers=data.workers, processes=data.processes)
    catalog = {
        name: {
            "fingerprint": source.fingerprint,
            "shards": [file_name(url) for url in shards.urls],
            "summaries": list(map(asdict, shards.summaries)),
        }
        for (name, shards), source in zip(inputs.training.items(), sources, strict=True)
    }
    return RunData(stream, validation, inputs.tokenizer, objective, catalog)


class _Opening:
    """Opens data on all ranks and collects the problems, so that all are reported at once."""

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
        """Returns the shards that `key` names, for training or for validation, where they must be whole."""
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
                earlier_summaries=before,
                team=self.team,
                patient=is_restarted(),  # its path was right when the run was first started
            )
        except ConfigError as error:
            if base is None or error.exit_code != ConfigError.exit_code:
                raise
            yours = f"{key}: data={data.name} brings shards of its own; for yours: data=webdataset, or data=samples"
            raise ConfigError([*error.problems, yours]) from error

    def source(self, shards: Shards, tokenizer: Tokenizer, held_out: bool = False) -> Source:
        """Returns the examples of some shards: packed sequences of their text, or their decoded samples."""
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


def _read_catalog(config: Config) -> dict[str, Any]:
    """Returns the run directory's record of the data that the run began with, by source; {} if it has not begun."""
    with suppress(OSError, ValueError):
        catalog = json.loads(read_file(Path(config.run.dir).expanduser() / CATALOG))
        if isinstance(catalog, dict) and (is_restarted() or not config.run.fresh):
            return catalog
    return {}


def _recorded_shards(record: Any) -> list[tuple[str, Summary]]:
    """Returns names and summaries of a source's shards as recorded; [] if there is no readable record."""
    with suppress(KeyError, TypeError, ValueError):
        return list(zip(record["shards"], map(from_json, record["summaries"]), strict=True))
    return []


def _make_built_in(config: Config, topology: Topology) -> Path | None:
    """Returns the folder of a built-in data set; the main rank makes it first, and the others then find it."""
    make = DATASETS.get(config.data.name)
    if make is None:
        return None
    cache, tokenizer = Path(config.data.cache).expanduser(), config.data.tokenizer
    folder = None
    try:
        if topology.is_main:
            folder = make(cache, tokenizer)
    finally:
        topology.barrier()
    return folder or make(cache, tokenizer)


def tokenizer_of(config: Config) -> Tokenizer:
    """Returns the run's tokenizer without opening its data; a built-in data set is made if needed."""
    return _load_tokenizer(config, _make_built_in(config, ALONE))


def _load_tokenizer(config: Config, base: Path | None) -> Tokenizer:
    name = config.data.tokenizer
    place = str(base / "tokenizer.json") if base and name != "bytes" else name
    return tokenizers.load(place, config.data.separator, config.data.special_tokens)
