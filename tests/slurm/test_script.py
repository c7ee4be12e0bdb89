"""The script of a job, and what is refused before there is one. Needs no Slurm."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launch.cli import main
from launch.jobscript import Task, render
from launch.submit import compose_config
from trainer.config.compose import load, load_composed
from trainer.config.launch import Slurm, slurm_seconds
from trainer.errors import ConfigError

OVERRIDES = ["launch.nodes=4", "launch.gpus_per_node=8", "launch.time=4:00:00", "train.global_batch=64"]


def script(*overrides: str, tasks: int = 1, folder: str = "/runs/a b") -> str:
    job = compose_config([*OVERRIDES, *overrides], None)
    runs = [Task(Path(f"{folder}/{n}"), Path(f"{folder}/{n}/config.yaml")) for n in range(tasks)]
    return render(job.launch, "x", runs, Path(f"{folder}/logs/slurm-%j.log"), Path("/my code"), array=tasks > 1)


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def variables(text: str, *names: str) -> list[list[str]]:
    """What bash makes of the settings, words apart."""
    settings = text[: text.index("# ---- The rest")]
    show = "; ".join(f'printf "%s\\0" "${{{name}[@]}}"; echo' for name in names)
    done = subprocess.run(["bash", "-uc", f"{settings}\n{show}"], capture_output=True, text=True, check=True)
    return [line.split("\0")[:-1] for line in done.stdout.splitlines()]


def test_options_of_sbatch() -> None:
    found = options(script("launch.account=me", "launch.cpus_per_task=64", "launch.options=['--mail-type=END']"))
    assert found == [
        "--job-name=x", "--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--time=4:00:00",
        "--signal=B:USR1@180", "--requeue", "--open-mode=append", "--chdir='/my code'",
        "--output='/runs/a b/logs/slurm-%j.log'", "--account=me", "--cpus-per-task=64", "--mail-type=END",
    ]  # fmt: skip
    chained = options(script("launch.requeue=false", "launch.chain=3", "launch.gpus_per_node=0"))
    assert {"--no-requeue", "--dependency=singleton"} <= set(chained)
    assert not any(option.startswith("--gpus") for option in chained)
    assert "--array=0-4%2" in options(script("launch.max_parallel=2", tasks=5))


def test_settings_are_what_bash_reads() -> None:
    text = script(
        "launch.python='/opt/my env/bin/python'", "launch.interface=ib0", "launch.env={A: \"it's $HOME\"}",
        "launch.cpus_per_task=64", "launch.setup=['module=loaded']", "launch.exclude='n[3,7]'",
    )  # fmt: skip
    assert variables(text, "run_dirs", "configs", "python", "module", "requeue", "health_check") == [
        ["/runs/a b/0"], ["/runs/a b/0/config.yaml"], ["/opt/my env/bin/python"], ["loaded"], ["1"], [""]
    ]  # fmt: skip
    names = ("procs_per_node", "A", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG", "OMP_NUM_THREADS")
    assert variables(text, *names) == [["8"], ["it's $HOME"], ["ib0"], ["ib0"], ["WARN"], ["8"]]


def test_containers() -> None:
    pyxis = ("launch.container.runtime=pyxis", "launch.container.image=nvcr.io#nvidia/pytorch:26.01")
    own = "/my code:/my code,/runs/a b/0:/runs/a b/0"
    (container, inside, python) = variables(script(*pyxis), "container", "inside", "python")
    assert container == [
        "--container-image=nvcr.io#nvidia/pytorch:26.01", f"--container-mounts={own}", "--container-workdir=/my code"
    ]  # fmt: skip
    assert (inside, python) == ([""], ["python3"]) or (inside, python) == ([], ["python3"])
    apptainer = (
        "launch.container.runtime=apptainer",
        "launch.container.image=x.sif",
        "launch.container.mounts=[/d:/d]",
    )
    (container, inside) = variables(script(*apptainer), "container", "inside")
    assert inside == ["apptainer", "exec", "--nv", "--bind", f"{own},/d:/d", "--pwd", "/my code", "x.sif"]


def test_the_script_is_bash(tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(script("launch.setup=['echo \"a; b\"']", tasks=3))
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_what_is_printed_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["onecurve", "submit", "--print-only", *OVERRIDES])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n# shakespeare, by `onecurve submit`.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["launch.time=4h"], "launch.time=4h: should be a time of Slurm: 90 (minutes), 4:00:00"),
        (["launch.time=2"], "launch.lead_s=180: must be less than launch.time=2, which is 120 s"),
        (["launch.chain=2"], "launch.chain=2: a job that queues itself again needs no other behind it"),
        (["launch.container.image=x"], "launch.container.runtime: missing"),
        (["launch.options=[x]"], "'x' should start with a dash"),
        (["launch.partition='a b'"], "launch.partition=a b: should be one word"),
        (["launch.gpus_per_node=7"], "train.global_batch=64: does not divide by 28 processes"),
        (["launch=local"], "launch=local: submit needs launch=slurm"),
    ],
)
def test_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_config(
            [*(text for text in OVERRIDES if "local" not in str(overrides) or "launch" not in text), *overrides], None
        )
    assert words in str(error.value)


def test_secrets_are_neither_written_nor_shown() -> None:
    for override in (
        "env={HF_TOKEN: abc123}",
        "setup=['export HF_TOKEN=abc123']",
        "options=['--export=HF_TOKEN=abc123']",
    ):
        with pytest.raises(ConfigError) as error:
            compose_config([*OVERRIDES, f"launch.{override}"], None)
        assert "HF_TOKEN looks like a secret; export it before you submit" in str(error.value)
        assert "abc123" not in str(error.value)
    compose_config([*OVERRIDES, "launch.setup=['export HF_TOKEN=$MINE']"], None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("4:30", 270), ("4:00:00", 14400), ("2-12", 216000), ("1-0:30", 88200), ("1-1:1:1", 90061)],
)
def test_times_of_slurm(text: str, seconds: int) -> None:
    assert slurm_seconds(text) == seconds


def test_a_config_in_a_file_is_the_same_config(tmp_path: Path) -> None:
    import yaml

    config = load(["launch=slurm", *OVERRIDES, "run.name=x"], 32)
    assert isinstance(config.launch, Slurm)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.resolved()))
    assert load_composed(tmp_path / "config.yaml", 32) == config
    with pytest.raises(ConfigError, match=r"--config .*gone.yaml: cannot be read"):
        load_composed(tmp_path / "gone.yaml", 32)
