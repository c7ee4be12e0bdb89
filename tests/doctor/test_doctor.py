"""The doctor on real processes, with real faults planted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.doctor import workers
from launch.doctor.examination import Options

DOCTOR = (sys.executable, "-m", "launch.doctor", "--quick")
ROOT = str(Path(__file__).parents[2])


def doctors(folders: list[Path], tmp_path: Path, before: str = "", **environment: str) -> tuple[dict, int]:
    """Ranks that look at these folders; what rank 0 says as JSON, and its exit code. `before`: a shell command."""
    ranks = []
    for rank, folder in enumerate(folders):
        size = {"WORLD_SIZE": str(len(folders)), "LOCAL_WORLD_SIZE": str(len(folders)), "PYTHONPATH": ROOT}
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "ONECURVE_STORE": str(tmp_path / "store")}
        command = ["bash", "-c", f'{before}; exec "$@"', "bash", *DOCTOR, "--json", "--dir", str(folder)]
        env = {**os.environ, **size, **mine, **environment}
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, cwd=tmp_path, text=True))
    told = [process.communicate(timeout=120)[0] for process in ranks]
    return json.loads(told[0]), ranks[0].returncode


def found(told: dict, area: str) -> list[dict]:
    return [finding for finding in told["findings"] if finding["area"] == area]


@pytest.mark.slow
def test_planted_faults_are_found(tmp_path: Path) -> None:
    """A folder that one rank does not share, few open files, and PyPI's namesake of Apex."""
    for name in ("a", "b", "site/apex"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "site/apex/__init__.py").touch()
    path = f"{ROOT}:{tmp_path / 'site'}"
    told, code = doctors([tmp_path / "a", tmp_path / "b"], tmp_path, "ulimit -n 300", PYTHONPATH=path)
    assert code == 4
    assert len(told["bad_nodes"]) == 1
    (blind,) = [finding for finding in found(told, "folder") if finding["verdict"] == "bad"]
    assert "rank 1 on" in blind["found"]
    assert str(tmp_path / "b") in blind["found"]
    assert [finding["verdict"] for finding in found(told, "limits")].count("bad") == 1
    (apex,) = found(told, "Apex")
    assert (apex["verdict"], "not NVIDIA's" in apex["found"]) == ("warning", True)
    assert [finding["verdict"] for finding in found(told, "clock")] == ["good"]
    assert len(found(told, "bandwidth")) == 2
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.slow
def test_plainly_started(tmp_path: Path) -> None:
    code = "import sys; from launch.cli import main; sys.argv[0] = 'onecurve'; main()"
    command = [sys.executable, "-c", code, "doctor", "-n", "3", "--dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all-reduce over 3 processes" in done.stdout
    assert "bad nodes" not in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    if os.getuid() == 0:
        if subprocess.run(["unshare", "--mount", "true"]).returncode:
            pytest.skip("may not mount")
        script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
        command = ["unshare", "--mount", "bash", "-c", script, "bash", str(tmp_path)]
    else:
        tmp_path.chmod(0o500)
        command = ["env"]
    command += [*DOCTOR, "-n", "2", "--dir", str(tmp_path), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4, done.stdout + done.stderr
    (folder,) = [finding for finding in found(json.loads(done.stdout), "folder") if finding["verdict"] == "bad"]
    assert "cannot be written" in folder["found"]


@pytest.mark.slow
def test_a_node_that_does_not_answer_and_one_that_is_dead_are_named(tmp_path: Path) -> None:
    """The others are examined without them, within the limit."""
    options = Options(tmp_path, quick=True, limit_s=25, json=True)
    command = [*DOCTOR, "--dir", str(tmp_path), "--limit", "25", "--member"]
    commands = [
        ("n1", [*command, "0,1,4,1"]),
        ("n2", [shutil.which("sleep") or "sleep", "600"]),
        ("n3", [*command, "2,1,4,1"]),
        ("n4", ["bash", "-c", "echo 'srun: error: Communication connection failure' >&2; exit 1"]),
    ]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    report = workers._examine(options, commands, environment, {"store": str(tmp_path / "store"), "local_world_size": 2})
    assert report.bad_nodes == ["n2", "n4"]
    told = {finding.nodes: finding.found for finding in report.findings if finding.verdict == "bad"}
    assert "did not answer within 25 s" in told[("n2",)]
    assert "Communication connection failure" in told[("n4",)]
    assert any("all-reduce over 2 processes" in finding.found for finding in report.findings)
    assert report.seconds < 60
