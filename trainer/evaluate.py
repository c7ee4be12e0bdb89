"""A checkpoint of a run, measured on held-out data without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from trainer.checkpoint.load import read_state
from trainer.errors import ConfigError
from trainer.evaluation import Evaluation
from trainer.export import find_checkpoint
from trainer.machine import check_machine
from trainer.pretrained import base_of
from trainer.run_data import DATASETS, open_run_data, open_shards
from trainer.sampling import open_run
from trainer.strategies.build import build_strategy
from trainer.topology import ALONE


def evaluate_run(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    plugins: Sequence[str] = (),
    step: int | None = None,
    report: Callable[[int], None] = lambda batches: None,
) -> tuple[int, dict[str, float]]:
    """Measures a checkpoint of a run on its held-out data, in this process, without training; the folder is only read.

    `overrides`: other values of its config, such as `data.validation=...` or `eval.steps=null`. `step`: which
    checkpoint; None for the newest. `report` is called with the number of batches done. Returns the checkpoint's step
    and what was measured. Raises ConfigError and DataError.
    """
    config, _ = open_run(folder, plugins, overrides)
    tokenizer_file = folder / "tokenizer.json"  # the run's, whatever data.tokenizer says
    if tokenizer_file.exists() and config.data.name not in DATASETS:
        config, _ = open_run(folder, plugins, [f"data.tokenizer={tokenizer_file}", *overrides])
    checkpoint = find_checkpoint(folder, step)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else ALONE.device
    topology = replace(ALONE, device=device)
    check_machine(config, device)
    inputs = open_run_data(config, topology, open_shards(config, topology))
    if inputs.validation is None:
        raise ConfigError(f"{folder}: the run has no held-out data; add data.validation=...")
    strategy = build_strategy(config, topology, inputs, base_of(config, inputs.tokenizer, checkpoint), loaded=True)
    read_state(checkpoint, {name: tensor for name, tensor in strategy.state().items() if name.startswith("model/")})
    evaluation = Evaluation(strategy)
    with closing(inputs.validation.batches()) as batches:
        for number, batch in enumerate(batches, 1):
            evaluation.add(batch)
            report(number)
    metrics = evaluation.end()
    assert metrics is not None
    return checkpoint.manifest["step"], metrics
