"""Replays a step of a run on one process: its samples, its loss and its gradient norm, compared with the record.

The run directory is only read, so the run may be going on meanwhile. The order of samples follows from the config; the
weights are those of the nearest checkpoint before the step, and the steps in between are done again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.format import DamagedCheckpoint, verify
from trainer.checkpoint.load import FoundCheckpoint
from trainer.checkpoint.retention import complete_checkpoints, step_of
from trainer.config import Config
from trainer.config.validate import validate
from trainer.data.stream import ExampleId, RankStream, StepData
from trainer.errors import ConfigError
from trainer.files import read_file, with_file
from trainer.frozen_models import build_frozen, open_frozen
from trainer.machine import check_machine
from trainer.objectives import Objective, Sums
from trainer.pretrained import base_of, open_pretrained
from trainer.replayed_step import Replay, Sample, StepMetrics, loss_of
from trainer.resilience import quarantine
from trainer.resilience.recovery import load_models
from trainer.run_data import DATASETS, RunData, open_run_data, open_shards
from trainer.run_directory import CATALOG, CHECKPOINTS
from trainer.sampling import open_run
from trainer.secrets import MASK, shown_override
from trainer.step import MAIN, run_step
from trainer.strategies.arithmetic import StepArithmetic
from trainer.strategies.base import UpdateResult
from trainer.strategies.build import build_strategy
from trainer.topology import ALONE, Topology
from trainer.tracking import jsonl

ReportProgress = Callable[[str, int, int], None]  # a title, the amount done, and the total
MAY_CHANGE = ("train.clip_norm", "optimizer.", "precision.")  # between attempts, and change a step's metrics


def replay_step(
    folder: Path,
    step: int,
    report: ReportProgress,
    *,
    plugins: Sequence[str] = (),
    checkpoint: int | None = None,
    overrides: Sequence[str] = (),
) -> Replay:
    """Returns the run in `folder` as it was before `step`. `checkpoint`: the step of the checkpoint to begin with, 0
    for the initial weights; None for the nearest whole one. `overrides`: where its data is, if not where config.yaml
    says.

    Code is imported only from the packages in `plugins`. Raises ConfigError where there is no such run, step or
    checkpoint, or where its data has changed; DataError where a sample cannot be read.
    """
    config, tokenizer = open_run(folder, plugins, _check_overrides(overrides))
    rows = {row["step"]: row for row in jsonl.read(folder / "metrics.jsonl")}
    if step not in rows:
        recorded_steps = f"has recorded steps {min(rows)} to {max(rows)}" if rows else "has recorded no step yet"
        raise ConfigError(f"--step {step}: {folder} {recorded_steps}")
    config = _config_at(step, config, folder)
    topology = replace(ALONE, device=torch.device("cuda", 0) if torch.cuda.is_available() else ALONE.device)
    check_machine(config, topology.device)
    inputs = _open_data(config, topology, folder)
    start_checkpoint = _find_checkpoint(folder, step, checkpoint)
    strategy = _restore_strategy(config, topology, inputs, start_checkpoint)
    if config.models.trained:
        raise _refusal(config, "a run that trains a second model (models.trained)")
    frozen = build_frozen(config, topology, inputs, open_frozen(config, topology, tokenizer))
    models = {MAIN: strategy, **frozen}

    start = start_checkpoint.manifest["step"] if start_checkpoint else 0
    if missing_step := next((earlier for earlier in range(start + 1, step) if earlier not in rows), None):
        raise ConfigError(f"{folder / 'metrics.jsonl'}: lacks step {missing_step}, which would have to be done again")
    processes, device = _read_environment(folder)
    size = config.train.micro_batch or max(1, config.train.global_batch // processes)
    share = replace(
        inputs.stream.share, micro_batch=size, ledger=True, tolerant=False, quarantined=_read_quarantine(folder)
    )
    differs_since = _replay_steps_before(models, share, rows, start, step, report)
    data = share.step(step - 1)
    update = next(strategy.objective.updates(data.micro_batches, models))
    if update.model != MAIN or update.objective is not strategy.objective:
        raise _refusal(config, "a step that begins with an update of another kind than its own")
    data = replace(data, micro_batches=list(update.batches))
    samples = list(_iterate_samples(share, data, list(inputs.catalog)))
    return Replay(
        config=config,
        tokenizer=tokenizer,
        strategy=strategy,
        data=data,
        samples=samples,
        checkpoint=start_checkpoint,
        recorded=_recorded_metrics(rows[step]),
        in_ledger=_matches_ledger(folder, step, samples),
        differs_since=differs_since,
        devices=(device, topology.device.type),
        size=size,
    )


def _refusal(config: Config, feature: str) -> ConfigError:
    return ConfigError(f"objective.name={config.objective.name}: replay does not know {feature}")


def _replay_steps_before(
    models: Mapping[str, Any],
    share: RankStream,
    rows: dict[int, dict[str, Any]],
    start: int,
    step: int,
    report: ReportProgress,
) -> int | None:
    """Does the steps behind `start` and before `step`; returns the first of them that differs from the record."""
    origin = f"the checkpoint of step {start}" if start else "the initial weights"
    title, count, differs_since = f"replaying steps {start + 1} to {step}, from {origin}", step - start, None
    report(title, 0, count)
    for done in range(start, step - 1):
        row, strategy = rows[done + 1], models[MAIN]
        finish = partial(_finish_as_recorded, row, models)
        sums, result = run_step(models, strategy.objective, share.step(done).micro_batches, finish)
        strategy.timer.read()
        metrics = StepMetrics(loss_of(strategy.objective, sums), float(result.grad_norm))
        if differs_since is None and not metrics.agrees_with(_recorded_metrics(row)):
            differs_since = done + 1
        report(title, done + 1 - start, count)
    report(title, count, count)
    return differs_since


def _iterate_samples(share: RankStream, data: StepData, names: Sequence[str]) -> Iterator[Sample]:
    """Yields the step's samples in global order. `names`: the names of the sources."""
    sources = {slot.number: names[slot.source] for slot in share.example_ids(data.step - 1)}
    batch = {name: torch.cat([part[name] for part in data.micro_batches]) for name in data.micro_batches[0]}
    for i, (number, entry) in sorted(enumerate(data.entries), key=lambda item: item[1][0]):
        yield Sample(number, sources[number], entry, {name: tensor[i : i + 1] for name, tensor in batch.items()})


def _read_quarantine(folder: Path) -> frozenset[ExampleId]:
    """Returns the examples that the run quarantined."""
    rows = jsonl.read(folder / quarantine.NAME)
    return frozenset(ExampleId(row["number"], row["source"], row["unit"]) for row in rows if row["number"] is not None)


def _check_overrides(overrides: Sequence[str]) -> Sequence[str]:
    """Returns the overrides. Raises ConfigError for one that would make it another run."""
    allowed = re.compile(r"(model\.weights|data\.(shards|sources\.[^.=]+\.shards|cache|allow_pipe|patience_s))=")
    if refused := [shown_override(text) for text in overrides if not allowed.match(text)]:
        raise ConfigError(
            f"--set {', '.join(refused)}: replay takes only where its data and weights are, such as data.shards"
        )
    return overrides


def _config_at(step: int, config: Config, folder: Path) -> Config:
    """Returns the config under which the step was done, as far as its metrics depend on it, for this process. The
    learning rate is recorded with each step."""
    raw = config.with_secrets()
    raw["run"] |= {"dir": str(folder.absolute()), "fresh": False}
    raw["train"] |= {"compile": False}
    raw["data"] |= {"validation": None}
    if (tokenizer_file := folder / "tokenizer.json").exists() and config.data.name not in DATASETS:
        raw["data"]["tokenizer"] = str(tokenizer_file)
    for event in reversed(jsonl.read(folder / "events.jsonl")):
        if event["kind"] != "config_changed" or event["step"] < step:
            continue
        if change := event["changes"].get("optimizer.name"):
            raise ConfigError(
                f"--step {step}: was done with optimizer={change[0]}, and since step {event['step']} the run has "
                f"optimizer={change[1]}: only what came after that can be replayed"
            )
        for key, (before, _) in event["changes"].items():
            section, _, name = key.partition(".")
            if key.startswith(MAY_CHANGE) and name in raw[section] and before is not None:
                raw[section][name] = before
    return validate(raw)


def _open_data(config: Config, topology: Topology, folder: Path) -> RunData:
    """Opens the run's data. Raises ConfigError where it is gone, or has changed since the run began."""
    if MASK in str(config.data.shards) + str(config.data.sources):
        key = "data.shards" if config.data.shards else "data.sources.NAME.shards"
        raise ConfigError(f"{key}: {folder / 'config.yaml'} has it without its secrets; add --set {key}=...")
    try:
        inputs = open_run_data(config, topology, open_shards(config, topology))
    except ConfigError as error:
        where = f"{folder}: its data is looked for where its config.yaml says, relative paths from the current folder"
        raise ConfigError([*error.problems, where], error.exit_code) from None
    fingerprints: dict[str, Any] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):  # lost: then it cannot be compared
        before = json.loads(read_file(folder / CATALOG))
        fingerprints = {name: before[name]["fingerprint"] for name in inputs.catalog}
    problems = [
        f"{'data.shards' if name == 'all' else f'data.sources.{name}.shards'}: not the texts or samples that the run "
        f"began with; restore them ({folder / CATALOG} lists the shards)"
        for name, fingerprint in fingerprints.items()
        if fingerprint != inputs.catalog[name]["fingerprint"]
    ]
    if problems:
        raise ConfigError(problems)
    return inputs


def _find_checkpoint(folder: Path, step: int, checkpoint_step: int | None) -> FoundCheckpoint | None:
    """Returns the newest whole checkpoint before the step, or that of step `checkpoint_step`; None for the initial
    weights."""
    with suppress(FileNotFoundError):
        paths = complete_checkpoints(folder / CHECKPOINTS)
        for path in [
            path for path in reversed(paths) if step_of(path) < step and checkpoint_step in (None, step_of(path))
        ]:
            try:
                return FoundCheckpoint(path, verify(path))
            except (DamagedCheckpoint, OSError) as error:
                if checkpoint_step is not None:
                    raise ConfigError(f"--checkpoint {checkpoint_step}: {path} is not whole: {error}") from None
    if checkpoint_step:
        raise ConfigError(
            f"--checkpoint {checkpoint_step}: {folder} has none of that step, or it does not lie before {step}"
        )
    return None


def _restore_strategy(
    config: Config, topology: Topology, inputs: RunData, checkpoint: FoundCheckpoint | None
) -> StepArithmetic:
    """Builds a strategy for one process with the weights and the optimizer's state of the checkpoint, or those that the
    run began with."""
    pretrained = open_pretrained(config, topology, inputs.tokenizer) if checkpoint is None else None
    if pretrained and not pretrained.places:
        raise ConfigError(f"model.weights={config.model.weights}: gone, and no checkpoint lies before the step")
    fill = base_of(config, inputs.tokenizer, checkpoint) if checkpoint else pretrained.fill if pretrained else None
    strategy = build_strategy(config, topology, inputs, fill, loaded=checkpoint is not None)
    if checkpoint:
        load_models(
            strategy,
            checkpoint,
            same_optimizer=checkpoint.manifest["config"]["optimizer"]["name"] == config.optimizer.name,
        )
    return strategy


def _finish_as_recorded(
    row: dict[str, Any], models: Mapping[str, Any], name: str, objective: Objective, sums: Sums
) -> UpdateResult:
    """Ends an update as the run did. Where the run skipped the step, fp16's scale is adapted."""
    strategy = models[name]
    if not row["skipped"]:
        return strategy.update(row["lr"])
    norm = strategy.discard()
    strategy.buffers.put_back()
    strategy.scaler.accepts(norm, strategy.num_targets)
    return UpdateResult(norm, torch.tensor(True), torch.tensor(False))


def _recorded_metrics(row: dict[str, Any]) -> StepMetrics:
    return StepMetrics(*(math.nan if row[name] is None else row[name] for name in StepMetrics._fields))


def _read_environment(folder: Path) -> tuple[int, str]:
    """Returns the number of processes and the device of the run, as far as its directory records them."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        report = json.loads(read_file(folder / "environment.json"))
        return max(1, int(report["processes"])), str(report["device"])
    return 1, "an unknown device"


def _matches_ledger(folder: Path, step: int, samples: Sequence[Sample]) -> bool | None:
    start = f'{{"step": {step},'.encode()
    with suppress(OSError):
        line = with_file(
            folder / "ledger.jsonl", lambda file: next((entry for entry in file if entry.startswith(start)), None)
        )
        if line and line.endswith(b"\n"):
            return json.loads(line)["samples"] == json.loads(json.dumps([sample.entry for sample in samples]))
    return None
