"""The data options in real runs: mixtures, ramps, masks, remote shards; killed, resized, foretold by `data order`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from webdataset import TarWriter

from tests.data.servers import Fault, Request, http_server, s3_server
from tests.runs import TINY, Run, assert_same_bits, assert_same_curve

STEPS = 24
BASE = ("data=webdataset", f"train.steps={STEPS}", "train.log_every=1", "checkpoint.every=8", "data.lanes=6")


def write(folder: Path, names: str, documents: int = 30) -> None:
    random = Random(5)
    folder.mkdir(exist_ok=True)
    for name in names:
        with TarWriter(str(folder / f"{name}.tar")) as tar:
            for i in range(documents):
                text = "".join(random.choices("to be or not", k=random.randint(20, 900)))
                tar.write({"__key__": f"{name}{i:02d}", "txt": text})


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two sources, weights that change, a ramp, whole documents packed and masked."""
    folder = tmp_path_factory.mktemp("mixture")
    write(folder / "in", "abcd", documents=9)
    web, code = ({"shards": f"{folder}/in/{{{names}}}.tar", "weight": w} for names, w in (("a,b", 3), ("c,d", 1)))
    sources = f"{{web: {{shards: '{web['shards']}', weight: 3}}, code: {{shards: '{code['shards']}', weight: 1}}}}"
    return (
        *BASE, f"data.sources={sources}", "data.reweight={10: {web: 1, code: 1}}", "train.batch_ramp={4: 12}",
        "data.packing=best_fit", "data.document_mask=true", f"data.cache={folder}/cache", "track.by_source=true",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(mixture: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("whole") / "run", 2, mixture)
    run.train()
    return run


def test_each_source_has_metrics_of_its_own(whole: Run) -> None:
    before = 0
    for row, dealt in zip(whole.metrics(), whole.ledger(), strict=True):
        there = {"web" if sequence[0][0] in ("a.tar", "b.tar") else "code" for sequence in dealt["samples"]}
        assert {name for name in ("web", "code") if f"loss/{name}" in row} == there
        counts = {name: row[f"num_targets/{name}"] for name in there}
        assert sum(counts.values()) == row["tokens"] - before
        mean = sum(row[f"loss/{name}"] * count for name, count in counts.items()) / sum(counts.values())
        assert mean == pytest.approx(row["loss"], rel=1e-6)
        before = row["tokens"]
    assert whole.metrics()[-1]["loss/web"] != whole.metrics()[-1]["loss/code"]
    assert not [name for name in whole.metrics()[-1].get("eval", {}) if "/" in name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        "fsdp strategy.tensor_parallel=2 strategy.sequence_parallel=true strategy.loss_parallel=true",
        "pipeline train.micro_batch=3",
        "zero strategy.stage=3 data.workers=1 data.processes=true",
    ],
)
def test_metrics_of_sources_are_the_same_under(
    strategy: str, mixture: tuple[str, ...], whole: Run, tmp_path: Path
) -> None:
    few = 4  # steps
    run = Run(tmp_path / "run", 2, (*mixture, *f"strategy={strategy}".split(), f"train.steps={few}"))
    run.train()
    for ours, theirs in zip(run.metrics(), whole.metrics()[:few], strict=True):
        names = [name for name in theirs if name.startswith(("loss", "num_targets/"))]
        assert len(names) > 3
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-5)


def test_a_mixture_is_dealt_exactly(whole: Run) -> None:
    sequences = [sequence for row in whole.ledger() for sequence in row["samples"]]
    assert [len(row["samples"]) for row in whole.ledger()] == [12] * 4 + [24] * (STEPS - 4)
    sources = ["web" if sequence[0][0] in ("a.tar", "b.tar") else "code" for sequence in sequences]
    until = 4 * 12 + 6 * 24  # step 10
    for part, share in ((sources[:until], 3 / 4), (sources[until:], 1 / 2)):
        for k in range(1, len(part) + 1):
            assert abs(part[:k].count("web") - k * share) < 1
    for names in (("a.tar", "b.tar"), ("c.tar", "d.tar")):
        own = [json.dumps(sequence) for sequence in sequences if sequence[0][0] in names]
        epoch = len(set(own))
        assert len(own) > epoch  # a second one was begun
        assert set(Counter(own[:epoch]).values()) == {1}


@pytest.mark.slow
def test_a_mixture_killed_and_resized(whole: Run, mixture: tuple[str, ...], tmp_path: Path) -> None:
    killed = Run(tmp_path / "killed", 2, mixture)
    killed.kill_at(6)
    killed.kill_at(13)
    (sources,) = (option for option in mixture if option.startswith("data.sources="))
    web, code = re.findall(r"\w+: {shards.*?}(?=, code|}$)", sources)
    other_way = f"data.sources={{{code}, {web}}}"  # in which order they are written does not matter
    killed.overrides = tuple(other_way if option == sources else option for option in mixture)
    killed.train()
    assert_same_bits(killed, whole)
    resized = Run(tmp_path / "resized", 3, (*mixture, "train.micro_batch=2", "data.workers=2"))
    resized.kill_at(9)
    resized.procs = 1
    resized.train()
    assert_same_curve(resized, whole, STEPS)


@pytest.mark.slow
def test_order_is_known_beforehand(whole: Run, mixture: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from launch.cli import main; main()", "data", "order"]
    done = subprocess.run(
        [*command, "--steps", "3:12", *TINY, *mixture], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    foretold = [json.loads(line) for line in done.stdout.splitlines()]
    happened = [{name: row[name] for name in ("step", "samples")} for row in whole.ledger()[2:12]]
    assert foretold == happened
    for steps in ("0:3", "3", "5:4"):
        done = subprocess.run([*command, "--steps", steps, *mixture], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert "--steps" in done.stderr


@pytest.mark.slow
def test_only_what_is_to_come_may_change(mixture: tuple[str, ...], tmp_path: Path) -> None:
    run = Run(tmp_path / "run", 1, (*mixture, "train.steps=16"))
    run.train()
    for changed, key in (
        ("data.reweight={10: {web: 1, code: 2}}", "data.reweight.10"),
        ("train.batch_ramp={3: 12}", "train.batch_ramp"),
        ("data.packing=concat", "data.packing"),
    ):
        output = Run(run.folder, 1, (*mixture, changed)).train(expect=2)
        assert key in output
    run.overrides = (*mixture, "+data.reweight.20={web: 0, code: 1}")
    run.train()
    late = [sequence for row in run.ledger()[20:] for sequence in row["samples"]]
    assert {sequence[0][0] for sequence in late} == {"c.tar", "d.tar"}


@pytest.mark.slow
def test_other_texts_of_the_same_sizes_are_noticed(tmp_path: Path) -> None:
    write(tmp_path / "in", "a")
    overrides = (*BASE, f"data.shards={tmp_path}/in/a.tar", f"data.cache={tmp_path}/cache", "data.tokenizer=bytes")
    run = Run(tmp_path / "run", 1, (*overrides, "train.steps=8"))
    run.train()
    shard = tmp_path / "in" / "a.tar"
    content = shard.read_bytes()
    at = content.index(b"not", len(content) // 2)
    shard.write_bytes(content[:at] + b"NOT" + content[at + 3 :])
    run.overrides = overrides
    for procs in (1, 2):
        run.procs = procs
        assert "other texts than those that the run" in run.train(expect=2)
        assert run.last_step() == 8
    shard.write_bytes(content)
    run.train()


@pytest.fixture(params=[pytest.param("http", marks=pytest.mark.slow), "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the shards of tmp_path/in can be had: by a web server that fails often, or from S3."""
    write(tmp_path / "in", "ab")
    contents = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    if request.param == "s3":
        import boto3

        with s3_server(monkeypatch):
            for name, content in contents.items():
                boto3.client("s3").put_object(Bucket="shards", Key=f"in/{name}", Body=content)
            yield "s3://shards/in"
        return
    with http_server() as server:
        for name, content in contents.items():
            server.put(name, content)
        kinds = (Fault(status=500), None, Fault(after=3000), Fault(after=9000, reset=True), None, Fault(slow_s=0.2))

        def fault(request: Request) -> Fault | None:
            return kinds[len(server.requests) % len(kinds)]

        server.fault = fault
        yield server.url
        assert len(server.faults) > 10


@pytest.mark.slow
def test_remote_shards_give_the_same_run(remote: str, tmp_path: Path) -> None:
    local = Run(tmp_path / "local", 2, (*BASE, f"data.shards={tmp_path}/in/*.tar", f"data.cache={tmp_path}/one"))
    local.train()
    shards = f"data.shards='{remote}/{{a,b}}.tar'"
    far = Run(tmp_path / "far", 2, (*BASE, shards, f"data.cache={tmp_path}/two"))
    far.kill_at(10)
    far.train()
    assert_same_bits(far, local)
