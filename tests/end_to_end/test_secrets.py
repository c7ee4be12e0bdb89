"""Secrets in every address of a run: they open its data, and are in nothing that is left, told or sent."""

from __future__ import annotations

import base64
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.data.servers import Fault, Request, Server, http_server, s3_server
from tests.data.texts import write_shards
from tests.end_to_end.test_refusals import onecurve, trainer
from tests.runs import TINY, Run, descendants

pytest.importorskip("obstore")
pytestmark = pytest.mark.slow

USER, PASSWORD = "canary-user", "canary-password"
SIGNATURES = ("canary-first-signature", "canary-second-signature")
HEADER = "canary-header"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
SECRETS = [text.encode() for text in (USER, PASSWORD, *SIGNATURES, HEADER, BASIC, "canary")]


class Store:
    """Shards behind a password, a signature and a header, and a bucket; what anybody can see of their reader."""

    def __init__(self, cwd: Path, server: Server, s3: Any):
        self.cwd, self.server, self.s3 = cwd, server, s3
        self.valid, self.told, self.refused = SIGNATURES[0], list[bytes](), 0
        server.fault = self.judge
        for path in map(Path, write_shards(cwd / "shards", [40, 40, 12])):
            server.put(path.name, path.read_bytes())
            path.unlink()

    def judge(self, request: Request) -> Fault | None:
        headers = {name.lower(): value for name, value in request.header.items()}
        by_password = headers.get("authorization") == f"Basic {BASIC}" and f"sig={self.valid}" in request.path
        if by_password or headers.get("x-key") == HEADER:
            return None
        self.refused += 1
        return Fault(status=403)

    def keys(self, signature: str) -> list[str]:
        """All keys of a run that hold addresses."""
        piped = f"pipe:curl -sSf -H 'X-Key: {HEADER}' {self.server.url}/s-1.tar"
        address = f"http://{USER}:{PASSWORD}@{self.server.host}/{{}}?sig={signature}"
        web = address.format("s-0.tar")
        sources = f'{{web: {{shards: "{web}", weight: 1}}, own: {{shards: "{piped}", weight: 1}}}}'
        return [
            "experiment=none", "data=webdataset", *TINY, "sample.count=1", "track.report=true", "train.log_every=1",
            "eval.every=5", "checkpoint.every=5", "data.shards=null", f"data.sources={sources}", "data.allow_pipe=true",
            f"data.validation='{address.format('s-2.tar')}'", f"data.cache={self.cwd}/cache",
            "track.wandb.mode=offline", f"checkpoint.mirror='s3://{USER}:{PASSWORD}@shards/runs/one?sig={signature}'",
        ]  # fmt: skip

    def run(self, command: list[str], expect: int = 0) -> str:
        """Also looks at what everybody can list of its processes meanwhile, once it has had time to hide it."""
        log = self.cwd / "console.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=self.cwd, stdout=output, stderr=subprocess.STDOUT)
            began = time.monotonic()
            while process.poll() is None:
                for child in descendants(process.pid) + [process.pid] * (time.monotonic() > began + 20):
                    with suppress(OSError):
                        title = Path(f"/proc/{child}/cmdline").read_bytes()
                        if title.split(b"\0")[0] not in (b"/bin/sh", b"curl"):  # the user's own command
                            self.told.append(title)
                time.sleep(0.1)
        text = log.read_text(errors="replace")
        self.told.append(log.read_bytes())
        log.unlink()
        assert process.returncode == expect, text
        return text

    def left(self) -> Iterator[tuple[str, bytes]]:
        """All that is on disk or in the bucket, and was on the terminal."""
        for path in self.cwd.rglob("*"):
            yield f"name {path}", os.fsencode(path)
            if path.is_file():
                yield str(path), path.read_bytes()
        for item in self.s3.list_objects_v2(Bucket="shards").get("Contents", []):
            yield item["Key"], self.s3.get_object(Bucket="shards", Key=item["Key"])["Body"].read()
        yield from (("told", text) for text in self.told)

    def hits(self) -> list[tuple[str, bytes]]:
        return [(name, secret) for name, text in self.left() for secret in SECRETS if secret in text]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    import boto3

    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    with http_server() as server, s3_server(monkeypatch):
        store = Store(tmp_path, server, boto3.client("s3"))
        yield store
        assert store.hits() == []  # whatever else failed


def test_nothing_has_them(store: Store) -> None:
    folder = store.cwd / "runs/mine"
    first, renewed = ([*store.keys(signature), "run.dir=runs/mine"] for signature in SIGNATURES)
    killed = "debug.faults=[step.after_backward:kill:8:0]"
    told = store.run(onecurve("train", "-n", "1", *first, "train.steps=12", killed))
    assert "restart 1 of 3" in told
    assert f"http://***@{store.server.host}/s-0.tar?***" in told  # in the command to go on with

    store.valid = SIGNATURES[1]
    store.run(trainer(*renewed, "train.steps=16"))  # by which nothing but the steps has changed
    changes = [event["changes"] for event in Run(folder).rows("events.jsonl") if event["kind"] == "config_changed"]
    assert {name for change in changes for name in change} == {"train.steps", "debug.faults"}
    assert len(Run(folder).metrics()) == 16

    told = store.run(onecurve("replay", "runs/mine", "--step", "13", *_again(renewed)))
    assert "the samples are those of ledger.jsonl" in told
    assert "config.yaml has it without its secrets; add --set data.sources.NAME.shards=" in store.run(
        onecurve("replay", "runs/mine", "--step", "13"), expect=2
    )
    store.run(onecurve("report", "runs/mine"))
    store.run(trainer("--cfg", "job", *renewed))
    store.run(onecurve("plan", *renewed))
    few = ("run.dir=runs/many", "checkpoint.mirror=null", "train.steps=2", "optimizer.lr=0.001,0.002")
    store.run(onecurve("sweep", "-n", "1", *renewed, *few))
    store.valid = "another one"
    refused = [*renewed, "run.dir=runs/refused", f"data.cache={store.cwd}/empty", "checkpoint.mirror=null"]
    assert store.refused == 0
    assert "answered 403" in store.run(trainer(*refused), expect=3)
    assert store.refused > 0

    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "report.html", "wandb", "environment.json", "samples.txt", "logs"} <= names
    assert list(folder.glob("wandb/*/logs/debug.log"))
    left = list(store.left())
    assert any(name.startswith("runs/one/step-") for name, _ in left)
    assert len([text for name, text in left if name == "told"]) > 20
    assert store.hits() == []
    print(f"{len(left)} texts, {sum(len(text) for _, text in left):,} bytes")  # -s: figures


def _again(keys: list[str]) -> list[str]:
    """Where the data is, for replay."""
    (sources,) = [key for key in keys if key.startswith("data.sources=")]
    web, own = (part.split('"')[1] for part in sources.split("shards: ")[1:])
    return ["--set", f"data.sources.web.shards={web}", "--set", f'data.sources.own.shards="{own}"']
