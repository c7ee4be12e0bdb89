"""Ranks that somebody else than torchrun started find out who they are, and each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.launchers import RENDEZVOUS, STANDARD, recognize
from trainer.nodelist import expand

ROOT = str(Path(__file__).parents[1])
OPEN_MPI = {name: f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")}
# What each launcher tells to process {0} of 2 on one node.
ON_ONE_NODE = {
    "Open MPI": "OMPI_COMM_WORLD_RANK={0} OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK={0} "
    "OMPI_COMM_WORLD_LOCAL_SIZE=2 PMIX_RANK={0} PMIX_NAMESPACE=prterun-n1-77@1",
    "MPICH or Intel MPI": "PMI_RANK={0} PMI_SIZE=2 MPI_LOCALRANKID={0} MPI_LOCALNRANKS=2",
    "MVAPICH2": "MV2_COMM_WORLD_RANK={0} MV2_COMM_WORLD_SIZE=2 MV2_COMM_WORLD_LOCAL_RANK={0} "
    "MV2_COMM_WORLD_LOCAL_SIZE=2 PMI_RANK={0} PMI_SIZE=2",
    "srun": "SLURM_JOB_ID=7 SLURM_STEP_ID=1 SLURM_PROCID={0} SLURM_LOCALID={0} SLURM_NODEID=0 SLURM_NTASKS=2 "
    "SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=n1 SLURM_JOB_NODELIST=n1 PMI_RANK={0} "
    "PMI_SIZE=2",
    "Kubernetes": "RANK={0} WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=%d PET_NODE_RANK={0} PET_NNODES=2 "
    "PET_NPROC_PER_NODE=1 PYTHONUNBUFFERED=1",
}


def variables(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split())


def recognized(**given: str) -> list[str]:
    recognize(given)
    return [given.get(name, "-") for name in STANDARD]


def test_names_of_nodes() -> None:
    assert expand("n[1-3,7],gpu-[01-02]-x") == ["n1", "n2", "n3", "n7", "gpu-01-x", "gpu-02-x"]
    assert expand("r[1-2]c[08-10]") == ["r1c08", "r1c09", "r1c10", "r2c08", "r2c09", "r2c10"]
    assert expand("a,b.example.org") == ["a", "b.example.org"]
    assert expand("") == []
    for wrong in ("n[1-3", "n[3-1]", "n[1-999999999]"):
        with pytest.raises(ConfigError):
            expand(wrong)


@pytest.mark.parametrize("name", ON_ONE_NODE)
def test_one_node(name: str) -> None:
    given = variables(ON_ONE_NODE[name].replace("%d", "29500").format(1))
    recognize(given)
    local = ["0", "1"] if name == "Kubernetes" else ["1", "2"]  # one process a pod
    assert [given[key] for key in STANDARD] == ["1", "2", *local]
    assert (RENDEZVOUS in given) == (name != "Kubernetes")


def test_a_step_of_slurm_on_several_nodes() -> None:
    step = {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "n[07-08],m1",
    }  # fmt: skip
    assert recognized(**step) == ["3", "5", "1", "2"]
    own, other = dict(step), {**step, "SLURM_JOB_ID": "4712"}
    for one in (own, other):
        recognize(one)
        assert one["MASTER_ADDR"] == "n07"
    assert other["MASTER_PORT"] != own["MASTER_PORT"]
    own = {**step, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}
    recognize(own)
    assert (own["MASTER_ADDR"], own["MASTER_PORT"]) == ("10.0.0.1", "7")


def test_who_is_left_alone() -> None:
    nothing = ["-"] * 4
    assert recognized() == nothing
    assert recognized(SLURM_JOB_ID="1", SLURM_PROCID="0", SLURM_NTASKS="16", SLURM_LOCALID="0") == nothing  # batch
    assert recognized(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1") == nothing  # a shell of salloc
    assert recognized(**{OPEN_MPI["RANK"]: "0", OPEN_MPI["SIZE"]: "1"}) == nothing
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    assert recognized(**torchrun) == ["3", "-", "-", "-"]
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert recognized(**by_hand) == ["1", "2", "1", "2"]
    trainer_v2 = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "1"}
    assert recognized(**trainer_v2, PET_NPROC_PER_NODE="auto") == ["1", "2", "0", "1"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "contradict"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one"),
        ({"PMIX_RANK": "1"}, "WORLD_SIZE, LOCAL_RANK"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "LOCAL_RANK"),
        ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "0"}, "torchrun -m trainer"),
        (variables(ON_ONE_NODE["Open MPI"].format(1)) | {"RANK": "0"}, "RANK=0, but OMPI_COMM_WORLD_RANK=1"),
        (variables(ON_ONE_NODE["Open MPI"].format(0)) | {OPEN_MPI["LOCAL_SIZE"]: "1"}, "MASTER_ADDR and MASTER_PORT"),
        (
            variables(ON_ONE_NODE["Open MPI"].format(0)) | {OPEN_MPI["LOCAL_SIZE"]: "1", "MASTER_ADDR": "n1"},
            "mpirun -x MASTER_PORT",
        ),
    ],
)
def test_too_little_or_contradictory(given: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        recognize(dict(given))


# `train` is a whole run; the others only meet and add up their ranks.
MEET = """
import torch, torch.distributed as dist
from trainer.launchers import recognize
recognize()
from trainer.topology import join
topology = join(60)
rank = torch.tensor([1 + topology.rank])
dist.all_reduce(rank, group=topology.control)
print(int(rank), topology.local_rank, topology.local_size)
topology.close()
"""


def started(name: str, command: list[str], folder: Path, port: int) -> list[str]:
    """What the two processes print: children of one that knows no rank, as a launcher's are, one of them in a shell."""
    texts = [ON_ONE_NODE[name].replace("%d", str(port)).format(rank) for rank in range(2)]
    second = 'bash -c \'"$@"; exit $?\' bash "$@"'
    script = f'env {texts[0]} "$@" > 0 & env {texts[1]} {second} > 1 && wait $!'
    command, environment = ["bash", "-c", script, "bash", *command], {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [(folder / str(rank)).read_text() for rank in range(2)]


@pytest.mark.slow
def test_open_mpi_trains(tmp_path: Path) -> None:
    """A real run of two processes that only Open MPI's variables tell who they are."""
    smoke = ("experiment=smoke", "train.steps=2", "eval.every=0", "sample.count=0", "run.dir=run")
    texts = started("Open MPI", [sys.executable, "-m", "trainer", *smoke], tmp_path, 0)
    assert texts[1] == ""
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert len(list((tmp_path / "run/logs").glob("rank-*.log"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ON_ONE_NODE if name != "Open MPI"])
def test_all_others_meet(name: str, tmp_path: Path, unused_port: int) -> None:
    texts = started(name, [sys.executable, "-c", MEET], tmp_path, unused_port)
    local = ("0 1", "0 1") if name == "Kubernetes" else ("0 2", "1 2")
    assert [text.strip() for text in texts] == [f"3 {one}" for one in local]


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
