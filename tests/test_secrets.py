"""What is secret in a command line leaves the process in no file, message, name or title."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.submit import compose_config
from launch.sweeps.trials import Sweep, expand
from tests.tracking.demo_run import demo_run, info
from trainer.config.compose import load, with_overrides
from trainer.errors import ConfigError, DataError
from trainer.run_directory import _refuse_other_run
from trainer.secrets import holds_secret, masked, prose, shown, shown_override
from trainer.tracking import JsonlTracker, Trackers
from trainer.tracking.jsonl import read
from trainer.tracking.report import write_report

DATA = ("experiment=none", "data=webdataset")
ADDRESS = "http://joe:hush@127.0.0.1:8765/a.tar?X-Amz-Signature=hush"
SECRET = (
    f"data.shards='{ADDRESS}'", f"data.validation=['{ADDRESS}','pipe:curl -H \"Authorization: hush\" http://h/b.tar']",
    "checkpoint.mirror='s3://joe:hush@bucket/run?token=hush'", "data.allow_pipe=true",
)  # fmt: skip


@pytest.mark.parametrize(
    "override",
    [
        f"data.shards={ADDRESS}",
        f"+data.sources.web.shards={ADDRESS}",
        f"data.sources={{web: {{shards: '{ADDRESS}', weight: 3}}}}",
        f"data.shards=['{ADDRESS}','{ADDRESS}']",
        "data.shards='pipe:curl -u me:hush https://h/a.tar'",
        "data.shards=['pipe:curl -u me:hush https://h/a.tar', 'pipe:curl -u me:hush https://h/b.tar']",
        "launch.env.HF_TOKEN=hush",
        "model={hub_token: hush}",
        "model={api_key: 'hush hush'}",
        "++objective.judge.password=hush",
    ],
)
def test_an_override_is_shown_without_its_secret(override: str) -> None:
    told = shown_override(override)
    assert "hush" not in told
    assert told.split("=")[0] == override.split("=")[0]


@pytest.mark.parametrize(
    "override",
    [
        "data.tokenizer=bytes", "data.fields={tokens: txt, image: 'jpg;png'}", "sample.tokens=3", "-n", "train",
        "data.shards='/data/train-{000000..000099}.tar'", "model.config.eos_token_id=3", "model={mask_token: x}",
        "data.shards='s3://bucket/a.tar'", "optimizer.lr=1e-4", "data.shards='${oc.env:SHARDS}'",
    ],
)  # fmt: skip
def test_what_is_no_secret_is_shown_as_it_is(override: str) -> None:
    assert shown_override(override) == override
    assert prose(f"{override}: is wrong") == f"{override}: is wrong"


def test_masks_stay_as_they_are_with_the_words_behind_them() -> None:
    once = masked(ADDRESS)
    assert once == "http://***@127.0.0.1:8765/a.tar?***"
    assert masked(once) == once
    assert prose(f"{once}: byte 5 (of {ADDRESS}): damaged") == f"{once}: byte 5 (of {once} damaged"
    assert "hush" not in prose(f"{once}&sig=hush")


def test_the_config_that_is_written_has_none_and_the_one_that_is_read_has_all() -> None:
    config = load([*DATA, *SECRET])
    assert "hush" not in json.dumps(config.resolved())
    assert json.dumps(config.with_secrets()).count("hush") == 7
    assert config.resolved()["data"]["shards"] == "http://***@127.0.0.1:8765/a.tar?***"
    again = with_overrides(config.resolved(), [f"data.shards={ADDRESS}"])
    assert again["data"]["shards"] == config.data.shards
    assert again["data"]["tokenizer"] == config.data.tokenizer


def test_a_renewed_signature_is_the_same_run(tmp_path: Path) -> None:
    def identity(config: Any) -> dict[str, Any]:
        return {"model": masked(config.model.model_dump(mode="json"))}

    before = load([*DATA, *SECRET])
    after = load([*DATA, *(override.replace("hush", "renewed") for override in SECRET)])
    assert before.data.shards != after.data.shards
    for written in (before.resolved(), before.with_secrets()):  # as earlier versions wrote it
        then = {"identity": identity(before), "config": written, "step": 0}
        assert _refuse_other_run(then, identity(after), after, tmp_path) == []
    other = load([*DATA, *SECRET, "data.shards=http://joe:hush@127.0.0.1:8765/other.tar"])
    (event,) = _refuse_other_run(then, identity(other), other, tmp_path)
    assert list(event["changes"]) == ["data.shards"]
    assert "hush" not in json.dumps(event)


def test_errors_and_events_have_none(tmp_path: Path) -> None:
    assert "hush" not in str(ConfigError([f"data.shards={ADDRESS}: is wrong"]))
    assert "hush" not in str(DataError(f"{ADDRESS}: Bearer hush was refused"))
    with pytest.raises(ConfigError) as error:
        load(
            [*DATA, f"checkpoint.mirror={ADDRESS}", "data.shards={a: 'pipe:curl -u me:hush x'}", "--x=http://a:hush@b"]
        )
    assert "hush" not in str(error.value)
    assert len(error.value.problems) >= 3
    trackers = Trackers(JsonlTracker(tmp_path))
    trackers.start(info(tmp_path))
    trackers.event({"kind": "checkpoint_not_mirrored", "step": 1, "reason": f"cannot reach {ADDRESS}", "key": "a"})
    (event,) = read(tmp_path / "events.jsonl")
    assert event["reason"] == f"cannot reach {masked(ADDRESS)}"
    assert event["key"] == "a"


def test_the_report_of_an_earlier_versions_run(tmp_path: Path) -> None:
    """Which wrote them into its folder."""
    folder = demo_run(tmp_path / "run", steps=4)
    (folder / "config.yaml").write_text(yaml.safe_dump(load([*DATA, *SECRET[:1]]).with_secrets()))
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "config_changed", "step": 4, "changes": {"data.shards": ["a", ADDRESS]}}) + "\n")
    report = write_report(folder).read_text()
    assert "hush" not in report
    assert report.count("/a.tar?***") == 2


def test_a_sweep_over_addresses(tmp_path: Path) -> None:
    words = [*DATA, f"run.dir={tmp_path}", f"data.shards='{ADDRESS}','{ADDRESS.replace('a.tar', 'b.tar')}'"]
    trials = expand(words, 1)
    assert len({trial.folder for trial in trials}) == 2
    assert "hush" in str(trials[0].overrides)
    told = " ".join(trial.folder + trial.name for trial in trials)
    Sweep(tmp_path / "sweep", ["data.shards"], 1, None, trials).save()
    assert "hush" not in told + (tmp_path / "sweep/sweep.json").read_text()
    renewed = expand([word.replace("hush", "renewed") for word in words], 1)
    assert [trial.folder for trial in renewed] == [trial.folder for trial in trials]
    with pytest.raises(ConfigError, match="differ in secrets alone"):
        expand([*words[:-1], "data.shards='http://h/a.tar?sig=1','http://h/a.tar?sig=2'"], 1)


def test_a_search_over_addresses(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from launch.sweeps.search import Search

    words = [*DATA, f"run.dir={tmp_path}", f"data.shards='{ADDRESS}','{ADDRESS.replace('a.tar', 'b.tar')}'"]
    search = Search(words, 2, "loss", 1, tmp_path, None)
    trials = list(search.trials())
    wanted = {ADDRESS, ADDRESS.replace("a.tar", "b.tar")}
    assert {load(trial.overrides).data.shards for trial in trials} <= wanted
    assert "hush" not in (tmp_path / "study.journal").read_text()
    assert "***" in (tmp_path / "study.journal").read_text()


def test_a_job_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the file that its processes read has them, and nobody else can read that."""
    from launch.submit import write

    monkeypatch.chdir(tmp_path)
    script = write(
        compose_config([*DATA, *SECRET, "launch=slurm", f"run.dir={tmp_path}/run", "train.global_batch=64"], None)
    )
    with_them = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"hush" in path.read_bytes()]
    assert with_them == [script.parent / "config.yaml"]
    assert with_them[0].stat().st_mode & 0o777 == 0o600
    assert yaml.safe_load(with_them[0].read_bytes())["data"]["shards"] == ADDRESS
    for override in (
        "env={HTTPS_PROXY: 'http://joe:hush@proxy'}",
        "setup=['curl http://joe:hush@h/x']",
        "options=['--comment=http://h/a?X-Amz-Signature=hush']",
    ):
        with pytest.raises(ConfigError) as error:
            compose_config([*DATA, "launch=slurm", f"launch.{override}"], None)
        assert "export" in str(error.value)
        assert "hush" not in str(error.value)
    assert not holds_secret("curl http://$NAME:$PASSWORD@h/x?version=3")


@pytest.mark.parametrize("option", ["--cfg job", "--cfg all --resolve", "--cfg job -p data.shards", "--info all"])
def test_what_hydra_prints(option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.config.hydra_cli import hydra_command

    monkeypatch.setattr(sys, "argv", ["trainer"])
    hydra_command([*option.split(), *DATA, *SECRET], time.monotonic(), print)
    told = capsys.readouterr().out
    assert "hush" not in told
    assert "/a.tar?***" in told


def test_titles_of_processes(tmp_path: Path) -> None:
    """What anybody can list on the machine."""
    script = (
        "import sys; from trainer.secrets import hide_arguments; given = list(sys.argv); hide_arguments();"
        "print(open('/proc/self/cmdline').read().split(chr(0))[3:]); print(sys.argv[1:])"
    )
    words = ["run.dir=x", f"data.shards={ADDRESS}", "data.shards='pipe:curl -u me:hush http://h/a'", "last=1"]
    told = subprocess.check_output([sys.executable, "-c", script, *words], text=True)
    assert "hush" not in told
    assert told.count("run.dir=x") == told.count("last=1") == 2
    assert told.count("http://***@127.0.0.1:8765/a.tar?***") == 2


@pytest.mark.parametrize(
    ("address", "seen"),
    [
        ("https://u:p'w@h/x.tar", "https://***@h/x.tar"),
        ("https://a.net/c/x.tar?sv=1&rscd=inline;filename='a'&sig=hush", "https://a.net/c/x.tar?***"),
        ("s3://b/tokenizer=gpt2/train-{000..999}.tar", "s3://b/tokenizer=gpt2/train-{000..999}.tar"),
        ("/data/tokenizer=gpt2/train-000017.tar", "/data/tokenizer=gpt2/train-000017.tar"),
        ("/data/Basic English/train-1.tar", "/data/Basic English/train-1.tar"),
        ("zip://a.tar::s3://u:hush@b/a.zip", "zip://a.tar::s3://***@b/a.zip"),
    ],
)
def test_an_address_is_shown_without_its_secrets_and_a_path_as_it_is(address: str, seen: str) -> None:
    assert shown(address) == seen
    assert masked({"data": [address]}) == {"data": [seen]}


def test_under_the_name_of_a_secret_nothing_is_shown_whatever_it_is() -> None:
    secret = {"password": ["x"], "credentials": {"user": "a"}, "api_key": 123, "hf_token": "", "use_api_key": True}
    assert masked(secret) == {
        "password": "***",
        "credentials": "***",
        "api_key": "***",
        "hf_token": "",
        "use_api_key": True,
    }


def test_what_replay_is_given_is_taken_as_it_is() -> None:
    command = "pipe:curl -H 'Authorization: Bearer T' https://h/x.tar"
    assert with_overrides({"data": {"shards": "a"}}, [f"data.shards={command}"]) == {"data": {"shards": command}}
    listed = with_overrides({"data": {"shards": "a"}}, ['data.shards=["a.tar", "b.tar"]'])
    assert listed == {"data": {"shards": ["a.tar", "b.tar"]}}
