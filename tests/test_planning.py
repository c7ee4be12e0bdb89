"""What `onecurve plan` works out without values, against real passes and real arithmetic."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.plan import lines
from launch.planning.gpus import target
from launch.planning.memory import accountant
from launch.planning.planned_model import PlannedModel, example, planned_model, recomputing
from launch.planning.propose import proposals
from tests.runs import TINY
from trainer.config.compose import load
from trainer.objectives import NUM_TARGETS

PLUGIN = """
import torch
import trainer.config


class Net(torch.nn.Module):
    class Config(trainer.config.Plugin):
        depth: int

    def __init__(self, config, facts):
        super().__init__()
        self.table = torch.nn.Embedding(facts.vocab_size, 16)
        self.layers = torch.nn.ModuleList(torch.nn.GRU(16, 16, batch_first=True) for _ in range(config.depth))
        self.out = torch.nn.Linear(16, facts.vocab_size)

    def forward(self, batch):
        x = self.table(batch["inputs"])
        for layer in self.layers:
            x = torch.tanh(x) * x + layer.weight_ih_l0.sum() * x
        return self.out(x)

    def initialise(self, name, parameter, generator):
        parameter.normal_(0.0, 0.02, generator=generator)
"""


def subject_of(*overrides: str, procs: int = 1, config_dir: str | None = None) -> PlannedModel:
    return planned_model(load([*TINY, *overrides], procs, config_dir), bf16=False)


def kept(subject: PlannedModel, rows: int, recomputed: str) -> int:
    """Bytes that a real forward pass keeps for its backward pass, as autograd's hooks see them."""
    model, batch = subject.factory(), {n: v.repeat_interleave(rows, 0) for n, v in example(subject.config).items()}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *batch.values())}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    blocks = list(getattr(model, "blocks", []))
    with recomputing(model, blocks, recomputed), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = subject.objective.loss(model(batch), batch, {NUM_TARGETS: torch.ones(())})
    assert loss.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("layers", [2, 6])  # six: one block stands for those in the middle
def test_traced_activations_are_those_a_real_pass_keeps(layers: int) -> None:
    subject = subject_of(f"model.layers={layers}")
    assert subject.whole.trace_model(3, "none").retained == pytest.approx(kept(subject, 3, "none"), rel=0.001)
    full = subject.whole.trace_model(3, "full")
    assert full.retained < subject.whole.trace_model(3, "none").retained / 2
    assert full.flops > subject.whole.trace_model(3, "none").flops


def test_a_users_own_model_gets_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planned_net.py").write_text(PLUGIN)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "net.yaml").write_text("name: planned_net:Net\ndepth: 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = [text for text in TINY if not text.startswith("model.")]
    config = load(["model=net", "run.plugins=[planned_net]", *own], 2, str(tmp_path))
    subject = planned_model(config, bf16=False)
    assert not subject.whole.cuttable
    assert subject.whole.trace_model(3, "none").retained == pytest.approx(kept(subject, 3, "none"), rel=0.001)
    fit, _ = proposals(subject, config, 2, target("h100", None))
    assert {one.overrides[0] for one in fit} >= {"strategy=ddp", "strategy=fsdp"}


def test_a_model_that_looks_at_values_gets_all_but_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = "def forward(self, batch):"
    looks = PLUGIN.replace(forward, f"{forward}\n        batch['inputs'].sum().item()")
    assert looks != PLUGIN
    (tmp_path / "looking_net.py").write_text(looks)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "net.yaml").write_text("name: looking_net:Net\ndepth: 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = [text for text in TINY if not text.startswith("model.")]
    config = load(["model=net", "run.plugins=[looking_net]", *own], 2, str(tmp_path))
    told = dict(lines(config, 2, target("h100", None)))
    assert told["memory"].startswith("not known: the model or the objective cannot be traced without values (")
    assert "checkpoint" in told
    assert "fits" not in told


def test_shares_of_fsdp_and_parts_of_the_sum() -> None:
    peaks = {}
    subject = subject_of()
    for strategy, procs in (("single", 1), ("ddp", 4), ("fsdp", 4)):
        parts = accountant(subject, load([*TINY, f"strategy={strategy}"], procs), procs).peak()
        assert parts.total == sum(parts)
        peaks[strategy] = parts
    whole = sum(parameter.nbytes for parameter in subject.whole.parameters)
    assert peaks["ddp"].parameters == peaks["ddp"].gradients == whole
    assert peaks["ddp"].optimizer == sum(parameter.state for parameter in subject.whole.parameters)
    assert peaks["fsdp"].parameters == pytest.approx(whole / 4, rel=0.02)
    assert peaks["fsdp"].optimizer == pytest.approx(peaks["ddp"].optimizer / 4, rel=0.02)


@pytest.mark.parametrize(
    ("processes", "strategy", "sums"),
    [
        (1, ("strategy=single",), 6),  # of 24 leaves: 0 to 11, 12 to 17, 18 to 20, 21, 22, and the gradient of 23
        (2, ("strategy=fsdp",), 5),
        pytest.param(3, ("strategy=ddp",), 5, marks=pytest.mark.slow),
    ],
)
def test_sums_over_leaves_are_counted(processes: int, strategy: tuple[str, ...], sums: int) -> None:
    mode = ("train.global_batch=24", "train.micro_batch=1", *strategy)
    peaks = []
    for way in ("run", "topology"):
        config = load([*TINY, *mode, f"train.deterministic={way}"], processes)
        peaks.append(accountant(planned_model(config, bf16=False), config, processes).peak())
    share = peaks[1].gradients if "fsdp" in strategy[0] else peaks[0].gradients
    assert peaks[1].buffers - peaks[0].buffers == pytest.approx((sums - 1) * share, rel=0.1)


@pytest.mark.slow
def test_proposals_are_taken_by_the_check() -> None:
    own = [text for text in TINY if not text.startswith("strategy")]
    config = load([*own, "strategy=pipeline", "strategy.stages=2", "train.micro_batch=12"], 4)  # not one for ddp on 4
    fit, too_large = proposals(planned_model(config, bf16=True), config, 4, target("h100", 0.01))
    assert {"strategy=ddp", "strategy=fsdp"} <= {one.overrides[0] for one in (*fit, *too_large)}
    assert fit
    assert too_large
    assert all(one.parts.total <= 0.009 * 2**30 for one in fit)
    for one in [*fit, *too_large]:
        load([*own, *one.overrides], 4)


@pytest.mark.slow
def test_seventy_billion_parameters_on_512_gpus(tmp_path: Path) -> None:
    sizes = ("num_hidden_layers=80", "hidden_size=8192", "intermediate_size=28672", "num_attention_heads=64")
    model = [f"model.config.{size}" for size in (*sizes, "num_key_value_heads=8", "vocab_size=128256")]
    overrides = ["experiment=none", "model=llama", *model, "data=webdataset", "data.shards=x.tar", "strategy=fsdp"]
    overrides += ["data.sequence_length=4096", "train.global_batch=1024", "train.micro_batch=1"]
    command = [sys.executable, "-c", "from launch.cli import main; main()", "plan", "-n", "512", *overrides]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)  # of other tests
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "70,553,706,496 parameters" in done.stdout
    assert "proposed" in done.stdout
    assert used.ru_maxrss < 4 * 2**20  # KiB
    assert used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime < 60
    assert used.ru_maxrss < 4 * 2**20
