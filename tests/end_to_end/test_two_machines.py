"""Two torchrun agents, each in a network of its own, joined by a cable that can be pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import Run, assert_same_bits

MACHINES = ("a", "b")
STEPS = 60
RUN = (f"train.steps={STEPS}", "train.log_every=1")
SLOWLY = "debug.faults=[data.next:delay@0.3:1+]"
PATIENCE_S = 10  # of collectives


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _why_not() -> str | None:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "no ip or unshare here: apt install iproute2 util-linux"
    done = subprocess.run(["unshare", "--net", "true"], capture_output=True)
    return "network namespaces need root" if done.returncode else None


pytestmark = [pytest.mark.slow, pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))]


class Network:
    """Two namespaces and a cable. `addresses`: of each."""

    def __init__(self) -> None:
        tag = uuid.uuid4().hex[:6]
        self.spaces = {name: f"onecurve-{tag}-{name}" for name in MACHINES}
        self.ends = {name: f"oc{tag}{name}" for name in MACHINES}
        self.addresses = {"a": "10.213.7.1", "b": "10.213.7.2"}

    def __enter__(self) -> Network:
        a, b = (self.ends[name] for name in MACHINES)
        for space in self.spaces.values():
            _ip("netns", "add", space)
        _ip("link", "add", a, "type", "veth", "peer", "name", b)
        for name, space in self.spaces.items():
            _ip("link", "set", self.ends[name], "netns", space)
            _ip("-n", space, "addr", "add", f"{self.addresses[name]}/24", "dev", self.ends[name])
            _ip("-n", space, "link", "set", self.ends[name], "up")
            _ip("-n", space, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for space in self.spaces.values():
            _ip("netns", "delete", space)

    def cable(self, state: str) -> None:
        _ip("-n", self.spaces["b"], "link", "set", self.ends["b"], state)

    def torchrun(self, machine: str, run: Run, overrides: tuple[str, ...], log: Path) -> subprocess.Popen[bytes]:
        launcher = [
            "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=5",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={self.addresses['a']}:29400", "--rdzv-id=two",
            # Both have this machine's name, so that names do not tell who hosts the meeting.
            f"--rdzv-conf=last_call_timeout=5,is_host={'1' if machine == 'a' else '0'}",
            f"--local-addr={self.addresses[machine]}",
        ]  # fmt: skip
        command = [sys.executable, *launcher, "-m", "trainer", *run.base, f"run.dir={run.folder}", *overrides]
        inside = ["ip", "netns", "exec", self.spaces[machine], *command]
        with log.open("wb") as file:
            return subprocess.Popen(inside, stdout=file, stderr=file, env={**os.environ})


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


def test_a_cable_is_pulled(network: Network, tmp_path: Path) -> None:
    undisturbed = Run(tmp_path / "undisturbed", 2, RUN)
    undisturbed.train()
    run, logs = Run(tmp_path / "run", 2), {name: tmp_path / f"{name}.log" for name in MACHINES}
    overrides = (*RUN, SLOWLY, f"launch.timeout_s={PATIENCE_S}")
    agents = {name: network.torchrun(name, run, overrides, logs[name]) for name in MACHINES}

    def told() -> str:
        return "\n".join(f"{log}:\n{log.read_text(errors='replace')[-6000:]}" for log in logs.values())

    try:
        deadline = time.monotonic() + 120
        while run.last_step() < 15:
            assert time.monotonic() < deadline, told()
            assert all(agent.poll() is None for agent in agents.values()), told()
            time.sleep(0.1)
        network.cable("down")
        time.sleep(PATIENCE_S + 5)
        assert run.last_step() < STEPS
        network.cable("up")
        for agent in agents.values():
            assert agent.wait(240) == 0, told()
    finally:
        for agent in agents.values():
            agent.kill()
            agent.wait()
    assert [event["kind"] for event in run.rows("events.jsonl")].count("resume") >= 1
    assert_same_bits(run, undisturbed)
