"""Files of a user's that have the names of ours, or of Python's: nothing of them is taken for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from onecurve import paths
from onecurve.paths import ROOT, put_working_folder_last, python

NAMES = ("trainer.py", "launch.py", "random.py", "hydra.py", "tokenizers.py", "socket.py", "yaml.py")
PLUGIN = """
from trainer.models.gpt import GPT

class Net(GPT):
    pass
"""
TINY = (
    "experiment=smoke", "train.steps=2", "eval.every=0", "checkpoint.every=0", "track.wandb.mode=disabled",
    "model=mine", "run.plugins=[my_net]",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder whose files end whoever imports them, but for a package that is a plugin."""
    for name in NAMES:
        (tmp_path / name).write_text("raise SystemExit('a file of the user was imported')\n")
    (tmp_path / "my_net.py").write_text(PLUGIN)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    text = (Path(ROOT) / "conf" / "model" / "gpt.yaml").read_text()
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(text.replace("name: gpt", "name: my_net:Net"))
    return tmp_path


def ended(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [[sys.executable, "-m", "onecurve"], python("onecurve"), python("launch.cli")])
def test_the_command_starts_beside_files_of_its_names(folder: Path, command: list[str]) -> None:
    assert "onecurve" in ended([*command, "--version"], folder)


def test_a_folder_that_is_no_package_is_not_taken_for_one(tmp_path: Path) -> None:
    for name in ("trainer", "launch"):
        (tmp_path / name).mkdir()
    assert "onecurve" in ended([*python("onecurve"), "--version"], tmp_path)


def test_the_working_folder_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for first in ("", str(tmp_path)):
        monkeypatch.setattr(sys, "path", [first, "/elsewhere"])
        monkeypatch.setattr(paths, "_is_done", False)
        put_working_folder_last()
        assert sys.path == ["/elsewhere", ROOT, str(tmp_path)]
        put_working_folder_last()
        assert sys.path == ["/elsewhere", ROOT, str(tmp_path)]
    monkeypatch.setattr(sys, "path", ["/elsewhere", str(tmp_path)])  # where the user has put it
    put_working_folder_last()
    assert sys.path == ["/elsewhere", str(tmp_path), ROOT]
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/elsewhere"])  # what is first now is PYTHONPATH's
    put_working_folder_last()
    assert sys.path == [str(tmp_path), "/elsewhere", ROOT]


@pytest.mark.slow
def test_runs_start_beside_files_of_any_name(folder: Path) -> None:
    overrides = ["--config-dir", "conf", *TINY]
    ended([*python("onecurve"), "train", "-n", "2", *overrides, "data.processes=true"], folder)
    ended([*python("onecurve"), "sweep", "-n", "1", *overrides, "run.name=swept", "optimizer.lr=0.001,0.002"], folder)
    rank = ["--standalone", "--nproc-per-node=2", "-m", "onecurve.rank"]
    ended([*python("onecurve.torchrun"), *rank, *overrides, "run.name=torchrun"], folder)
    assert "bad nodes" not in ended([*python("onecurve"), "doctor", "--quick"], folder)
    (folder / "trainer.py").unlink()  # which would itself be what -m names
    ended([sys.executable, "-m", "trainer", *overrides, "run.name=alone"], folder)
    assert {path.name for path in (folder / "runs").iterdir()} >= {"smoke", "swept", "torchrun", "alone"}
