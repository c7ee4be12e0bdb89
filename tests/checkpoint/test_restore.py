"""`onecurve checkpoint restore`: what was set aside and is whole counts again, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from tests.checkpoint.test_checkpoint_command import at, flip, made, onecurve, run, steps
from trainer.checkpoint.format import folder_name
from trainer.checkpoint.load import find_newest
from trainer.errors import ConfigError

__all__ = ["made", "run"]  # fixtures


def set_aside(run: Path, step: int, more: str = "") -> Path:
    return at(run, step).rename(run / "checkpoints" / f".damaged-{folder_name(step)}{more}")


def test_restore_brings_back_what_is_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run, 40)
    set_aside(run, 50, "-1")
    set_aside(run, 40)
    set_aside(run, 30)
    assert onecurve("restore", run) == 4
    assert capsys.readouterr().out.splitlines() == [
        ".damaged-step-00000030: whole (every byte checked), counts again as step-00000030",
        ".damaged-step-00000040: damaged, stays set aside: rank-00000.safetensors does not match its checksum",
        ".damaged-step-00000050-1: whole (every byte checked), counts again as step-00000050",
    ]
    assert steps(run) == [10, 20, 30, 50]
    found, _ = find_newest(run / "checkpoints")
    assert found
    assert found.manifest["step"] == 50


def test_restore_of_one_step_leaves_the_others(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_aside(run, 50)
    shutil.copytree(at(run, 40), run / "checkpoints" / ".damaged-step-00000040")
    assert onecurve("restore", run, "50") == 0
    assert steps(run) == [10, 20, 30, 40, 50]
    assert onecurve("restore", run, "40") == 0
    assert "whole, but step-00000040 is there already: stays set aside" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="STEP 20: no checkpoint of this step was set aside; there are: 40"):
        onecurve("restore", run, "20")
    with FileLock(run / ".lock", blocking=False), pytest.raises(ConfigError, match="another process trains"):
        onecurve("restore", run)


def test_restore_does_not_believe_a_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at(run, 20).rename(run / "checkpoints" / ".damaged-step-00000060")
    assert onecurve("restore", run) == 4
    assert "damaged, stays set aside: it is of step 20" in capsys.readouterr().out
