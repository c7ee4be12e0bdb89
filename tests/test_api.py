"""`import onecurve`: what a notebook or another program uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import onecurve
from trainer.resilience.interruption import handlers

SMALL = [
    "experiment=smoke", "train.steps=3", "eval.every=0", "sample.count=0", "track.report=false", "track.console=false",
    "track.wandb.mode=disabled", "strategy=single", "checkpoint.asynchronous=false",
]  # fmt: skip


def test_every_name_is_there_and_none_is_imported_before_it_is_used() -> None:
    for name in onecurve.__all__:
        assert getattr(onecurve, name) is not None
    assert set(onecurve.__all__) == set(onecurve._HOMES) == set(dir(onecurve))
    with pytest.raises(AttributeError, match="module 'onecurve' has no attribute 'lode'"):
        _ = onecurve.lode  # type: ignore[attr-defined]
    code = "import sys, onecurve, trainer; trainer.config.Plugin; assert 'torch' not in sys.modules; trainer.confg"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "AttributeError: module 'trainer' has no attribute 'confg'" in done.stderr


def test_a_run_in_this_process_gives_its_end_and_the_signals_back(tmp_path: Path) -> None:
    before = handlers()
    config = onecurve.load([*SMALL, f"run.dir={tmp_path / 'run'}"])
    result = onecurve.run(config)
    assert (result.status, result.step, result.metrics["step"]) == ("finished", 3, 3)
    assert result.folder == tmp_path / "run"
    assert handlers() == before
    longer = onecurve.load([*SMALL, f"run.dir={tmp_path / 'run'}", "train.steps=2"])
    with pytest.raises(onecurve.ConfigError, match="has done 3 steps already"):
        onecurve.run(longer)
    assert handlers() == before
    loaded, model, tokenizer = onecurve.load_run(result.folder)
    assert loaded.train.steps == 3
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    assert tokenizer.vocab_size > 0
