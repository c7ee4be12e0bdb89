"""Jobs of a real Slurm: each of these runs ends as the undisturbed one does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launch.slurm_queue import jobs_of
from launch.sweeps.trials import read
from tests.runs import TINY, Run, assert_same_bits, assert_same_curve
from tests.slurm import cluster as slurm
from tests.slurm.cluster import Cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing())),
]

STEPS = 60
RUN = (f"train.steps={STEPS}", "train.log_every=1", "watchdog.first_s=120")
SLOWLY = "debug.faults=[data.next:delay@0.3:1+]"  # so that there is time to disturb it
SLOWER = "debug.faults=[data.next:delay@1.5:1+]"
JOB = ("launch.nodes=2", "launch.gpus_per_node=0", "launch.time=60", "launch.lead_s=60")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On two processes."""
    run = Run(tmp_path_factory.mktemp("runs") / "undisturbed", 2, RUN)
    run.train()
    return run


@dataclass
class Submitted:
    cluster: Cluster
    folder: Path
    overrides: tuple[str, ...] = ()
    base: tuple[str, ...] = TINY
    output: str = ""
    jobs: list[str] = field(default_factory=list)

    def submit(self, *options: str, expect: int = 0) -> None:
        done = self.onecurve("submit", *options, *self.base, *RUN, *JOB, f"run.dir={self.folder}", *self.overrides)
        assert done.returncode == expect, done.stdout + done.stderr
        self.output, self.jobs = done.stdout + done.stderr, jobs_of(self.folder)

    def onecurve(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch.cli", *arguments]
        return subprocess.run(command, env=self.cluster.environment, capture_output=True, text=True, timeout=120)

    @property
    def run(self) -> Run:
        return Run(self.folder, 2)

    def state(self, job: str | None = None) -> str:
        told = self.cluster.run("scontrol", "show", "job", job or self.jobs[-1])
        return re.findall(r"JobState=(\w+)", told)[-1]

    def queue(self, job: str) -> list[str]:
        """States of the tasks of an array."""
        told = self.cluster.run("squeue", "--noheader", "--states=all", "--array", "--format=%F %T").splitlines()
        return [state for number, state in map(str.split, told) if number == job]

    def wait(self, happened: Callable[[], object], what: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with suppress(FileNotFoundError):
                if happened():
                    return
            assert time.monotonic() < deadline, f"waited for {what}\n{self.tell()}"
            time.sleep(0.2)

    def reach(self, step: int) -> None:
        self.wait(lambda: self.run.last_step() >= step, f"step {step}")

    def finish(self) -> None:
        self.wait(lambda: self.state() == "COMPLETED", "the end of the job", 400)
        assert self.run.status()["state"] == "finished", self.tell()

    def tell(self) -> str:
        logs = "\n".join(f"{log}:\n{log.read_text()[-4000:]}" for log in self.folder.glob("logs/slurm-*.log"))
        return f"{logs}\n{self.cluster.tell()}"

    def log(self) -> str:
        return "".join(log.read_text() for log in sorted(self.folder.glob("logs/slurm-*.log")))


@pytest.fixture
def submitted(cluster: Cluster, tmp_path: Path) -> Iterator[Submitted]:
    job = Submitted(cluster, tmp_path / "run")
    yield job
    for number in job.jobs:
        with suppress(subprocess.CalledProcessError):
            cluster.run("scancel", "--signal=KILL", "--full", number)
            cluster.run("scancel", number)


def test_two_nodes_are_on_the_curve_of_one_process(submitted: Submitted, undisturbed: Run, tmp_path: Path) -> None:
    single = Run(tmp_path / "single", overrides=RUN)
    single.train()
    submitted.submit()
    submitted.finish()
    assert_same_curve(submitted.run, single, 50)
    assert_same_bits(submitted.run, undisturbed)
    files = {path.name for path in (submitted.folder / "slurm" / "1").iterdir()}
    assert files >= {"job.sbatch", "config.yaml", "overrides.txt", "revision.json"}
    logs = {str(path.relative_to(submitted.folder)) for path in submitted.folder.glob("logs/job-*/life-*/**/std*.log")}
    assert len(logs) == 4, logs  # output and errors of both
    told = submitted.onecurve("status", str(submitted.folder)).stdout
    assert re.search(rf"run: finished, step {STEPS}/{STEPS}, loss \d", told), told
    assert f"job {submitted.jobs[0]}: COMPLETED" in told
    assert f"[n1-0]:step {STEPS}/{STEPS}" in submitted.onecurve("logs", str(submitted.folder)).stdout


def test_time_is_up(submitted: Submitted, undisturbed: Run) -> None:
    submitted.overrides = (SLOWER,)  # Slurm looks twice a minute
    submitted.submit()
    submitted.reach(10)
    elapsed = submitted.cluster.run("squeue", "--noheader", "--format=%M", "--jobs", submitted.jobs[0]).strip()
    minutes = int(elapsed.split(":")[-2]) + 1
    submitted.cluster.run("scontrol", "update", f"JobId={submitted.jobs[0]}", f"TimeLimit={minutes}")
    submitted.wait(lambda: submitted.run.status()["state"] == "interrupted", "the run to be saved")
    submitted.wait(lambda: submitted.state() == "PENDING", "the job in the queue again")
    assert submitted.run.status()["step"] < STEPS
    submitted.cluster.run("scontrol", "update", f"JobId={submitted.jobs[0]}", "TimeLimit=60")
    submitted.finish()
    assert "stopped as asked; queued again" in submitted.log()
    assert_same_bits(submitted.run, undisturbed)


@pytest.mark.parametrize("signalled", [(), ("--batch",)], ids=["steps", "script"])
def test_signalled(submitted: Submitted, undisturbed: Run, signalled: tuple[str, ...]) -> None:
    submitted.overrides = (SLOWLY,)
    submitted.submit()
    submitted.reach(10)
    submitted.cluster.run("scancel", "--signal=USR1", *signalled, submitted.jobs[0])
    submitted.wait(lambda: submitted.state() == "PENDING", "the job in the queue again")
    submitted.finish()
    assert_same_bits(submitted.run, undisturbed)


def test_queued_again_by_somebody_else(submitted: Submitted, undisturbed: Run) -> None:
    submitted.overrides = (SLOWLY,)
    submitted.submit()
    submitted.reach(10)
    submitted.cluster.run("scontrol", "requeue", submitted.jobs[0])
    submitted.wait(lambda: submitted.state() == "PENDING", "the job in the queue again")
    submitted.finish()
    assert_same_bits(submitted.run, undisturbed)


def test_a_node_dies(submitted: Submitted, undisturbed: Run) -> None:
    submitted.overrides = (SLOWLY,)
    submitted.submit()
    submitted.reach(15)
    nodes = submitted.cluster.run("squeue", "--noheader", "--format=%N", "--jobs", submitted.jobs[0])
    assert nodes.strip() == "n[1-2]"
    submitted.cluster.kill("n2")
    try:
        submitted.wait(
            lambda: "Restarts=1" in submitted.cluster.run("scontrol", "show", "job", submitted.jobs[0]), "a new life"
        )
        submitted.finish()
        nodes = submitted.cluster.run(
            "squeue", "--noheader", "--states=all", "--format=%N", "--jobs", submitted.jobs[0]
        )
        assert nodes.strip() == "n[1,3]"
    finally:
        submitted.cluster.start("n2")
        submitted.wait(lambda: set(submitted.cluster.states()) == {"idle"}, "the node")
    assert_same_bits(submitted.run, undisturbed)


def test_a_process_dies(submitted: Submitted, undisturbed: Run) -> None:
    """The job keeps its nodes."""
    submitted.overrides = ("debug.faults=[step.after_backward:kill:25:1]",)
    submitted.submit()
    submitted.finish()
    assert "restart 1 of 3" in submitted.log()
    assert not list((submitted.folder / "slurm").glob("started-*"))
    assert_same_bits(submitted.run, undisturbed)


def test_a_crash_that_comes_again_ends_the_job(submitted: Submitted) -> None:
    submitted.overrides = ("debug.faults=[step.after_backward:raise:5+:1]",)
    submitted.submit()
    submitted.wait(lambda: submitted.state() == "FAILED", "the end of the job")
    assert "the same failure twice at step 4" in submitted.log()
    assert "rank 1: Provoked" in submitted.log()
    assert submitted.run.status()["state"] == "failed"


def test_what_the_ranks_refuse_is_not_tried_again(submitted: Submitted) -> None:
    """It is found on the nodes alone: the folder holds another run."""
    Run(submitted.folder, 2, ("train.steps=10",)).train()
    submitted.overrides = ("run.seed=7",)
    submitted.submit()
    submitted.wait(lambda: submitted.state() == "FAILED", "the end of the job")
    assert "attempt 0: refused" in submitted.log()
    assert "ExitCode=2:0" in submitted.cluster.run("scontrol", "show", "job", submitted.jobs[0])
    assert "holds another run" in submitted.log()


def test_a_chain_of_short_jobs(submitted: Submitted, undisturbed: Run) -> None:
    """A minute of steps, half a minute for each job with its start: three are needed, more where starts are slow."""
    slowly = "debug.faults=[data.next:delay@1:1+]"
    submitted.overrides = (slowly, "launch.requeue=false", "launch.chain=6", "launch.time_limit=30s")
    submitted.submit()
    assert len(submitted.jobs) == 6
    submitted.wait(lambda: submitted.run.status()["state"] == "finished", "the end of the run", 400)
    lives = [row for row in submitted.run.rows("events.jsonl") if row["kind"] in ("start", "resume")]
    assert len(lives) >= 3, lives
    submitted.wait(
        lambda: {submitted.state(job) for job in submitted.jobs} <= {"COMPLETED", "FAILED", "CANCELLED"}, "the chain"
    )
    assert "COMPLETED" in {submitted.state(job) for job in submitted.jobs}
    assert_same_bits(submitted.run, undisturbed)


def test_a_bad_node_is_left_out(tmp_path: Path, undisturbed: Run) -> None:
    """It is dead, and Slurm has not noticed."""
    with Cluster(tmp_path / "slurm", down_s=90) as cluster:
        cluster.kill("n2")
        submitted = Submitted(cluster, tmp_path / "run", ("launch.health_check=true",))
        submitted.submit()
        submitted.finish()
        assert "n2 failed the check; queued again without n2" in submitted.log()
        assert "Restarts=1" in cluster.run("scontrol", "show", "job", submitted.jobs[0])
        nodes = cluster.run("squeue", "--noheader", "--states=all", "--format=%N", "--jobs", submitted.jobs[0])
        assert nodes.strip() == "n[1,3]"
    assert_same_bits(submitted.run, undisturbed)


def test_a_sweep_is_one_job_array(submitted: Submitted, tmp_path: Path) -> None:
    rates = ("0.001", "0.002", "0.003")
    submitted.overrides = (f"optimizer.lr={','.join(rates)}", "launch.nodes=1", "launch.max_parallel=2", SLOWLY)
    submitted.base = tuple(part for part in TINY if not part.startswith("optimizer.lr"))
    submitted.submit()
    (job,) = submitted.jobs
    assert "3 runs" in submitted.output
    first = Run(Path(read(submitted.folder).trials[0].folder))
    submitted.wait(lambda: first.last_step() >= 5, "the first trial")
    submitted.cluster.run("scancel", "--signal=USR1", "--batch", f"{job}_0")  # queued again, it alone
    submitted.wait(lambda: submitted.queue(job) == ["COMPLETED"] * 3, "the end of the array", 400)
    told = submitted.onecurve("report", str(submitted.folder)).stdout
    assert "3 of 3 trials are finished" in told, told
    assert (submitted.folder / "sweep.html").is_file()
    trials = read(submitted.folder).trials
    assert [trial.values for trial in trials] == [{"optimizer.lr": rate} for rate in rates]
    for trial in trials:
        alone = Run(tmp_path / f"alone-{trial.number}", 1, (*RUN, f"optimizer.lr={trial.values['optimizer.lr']}"))
        alone.train()
        assert_same_bits(Run(Path(trial.folder)), alone)
    told = submitted.onecurve("status", str(submitted.folder)).stdout
    assert told.count(f"finished, step {STEPS}/{STEPS}") == 3, told


def test_cancelled(submitted: Submitted) -> None:
    submitted.overrides = (SLOWER, "launch.requeue=false", "launch.chain=2")
    submitted.submit()
    submitted.reach(5)
    twice = submitted.onecurve("submit", *TINY, *RUN, *JOB, f"run.dir={submitted.folder}")
    assert (twice.returncode, "of this run is " in twice.stderr) == (2, True)
    done = submitted.onecurve("cancel", str(submitted.folder))
    assert "is asked to save and stop" in done.stdout, done.stdout + done.stderr
    submitted.wait(lambda: submitted.run.status()["state"] == "interrupted", "the run to be saved")
    submitted.wait(lambda: submitted.state(submitted.jobs[0]) == "FAILED", "the end of the job")  # code 75
    assert "cancelled, not queued again" in submitted.log()
    assert submitted.state(submitted.jobs[1]) == "CANCELLED"
    assert submitted.run.status()["step"] < STEPS


def test_what_slurm_refuses(submitted: Submitted) -> None:
    submitted.overrides = ("launch.partition=nonsense",)
    submitted.submit(expect=2)
    assert "sbatch: invalid partition specified: nonsense" in submitted.output
    submitted.overrides = ("launch.nodes=9",)
    submitted.submit("--test-only", expect=2)
    submitted.overrides = ()
    submitted.submit("--test-only")
    assert "to start at" in submitted.output
    assert submitted.jobs == []
    assert not submitted.folder.exists()


def test_the_script_may_be_submitted_again(submitted: Submitted, undisturbed: Run) -> None:
    submitted.overrides = (SLOWER,)
    submitted.submit()
    submitted.reach(5)
    submitted.onecurve("cancel", "--now", str(submitted.folder))
    submitted.wait(lambda: submitted.state() == "CANCELLED", "the end of the job")
    submitted.wait(lambda: not _alive(submitted.folder), "its processes")
    job = submitted.cluster.run("sbatch", "--parsable", str(submitted.folder / "slurm" / "1" / "job.sbatch")).strip()
    submitted.jobs = [job]
    submitted.finish()
    assert_same_bits(submitted.run, undisturbed)


def _alive(folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(folder).encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
    return [pid for pid in found if pid != os.getpid()]
