"""Initial values: each number is drawn once in the world, and none where a checkpoint gives them all."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parity import cells
from tests.runs import TINY, Run
from tests.strategies.traffic_rank import config_of
from trainer.models import ModelFactory

QUICK = {
    "ddp": "strategy=ddp",
    "fsdp": "strategy=fsdp",
    "zero 3": "strategy=zero strategy.stage=3",
    "pipeline": "strategy=pipeline",
}
SLOW = {
    2: {
        "hsdp": "strategy=hsdp strategy.shard_size=1",
        "cpu_offload": "strategy=fsdp strategy.cpu_offload=true",
        "tensor": "strategy=fsdp strategy.tensor_parallel=2",
        **{f"zero {stage}": f"strategy=zero strategy.stage={stage}" for stage in (0, 1, 2)},
        "offloaded": "strategy=zero strategy.stage=3 strategy.offload_parameters=true strategy.offload_optimizer=true",
        "pipeline, zbv": "strategy=pipeline strategy.schedule=zbv",
    },
    4: {
        "hsdp": "strategy=hsdp strategy.shard_size=2",
        "fsdp x tensor": "strategy=fsdp strategy.tensor_parallel=2",
        "pipeline x ddp": "strategy=pipeline strategy.stages=2",
        "pipeline x fsdp": "strategy=pipeline strategy.stages=2 strategy.data_parallel=fsdp",
        "pipeline x tensor": "strategy=pipeline strategy.stages=2 strategy.tensor_parallel=2",
        "pipeline x ddp x tensor": "strategy=pipeline strategy.stages=1 strategy.tensor_parallel=2",
    },
}


def factory() -> ModelFactory:
    return cells.factory(config_of("strategy=single", 1).model, torch.float32)


def found(processes: int, cases: dict[str, str], folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [*command, "-m", "tests.models.initial_values_rank", str(folder / "out"), json.dumps(cases)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    return torch.load(folder / "out")


def check(processes: int, cases: dict[str, str], folder: Path) -> None:
    whole = factory()()
    size = sum(parameter.numel() for parameter in whole.parameters())
    tied = whole.token_embedding.weight.numel()  # both ends of a pipeline hold it, so both draw it
    for name, its in found(processes, cases, folder).items():
        assert its["weights"].keys() == whole.state_dict().keys()
        for key, value in whole.state_dict().items():
            assert torch.equal(its["weights"][key], value), (name, key)
        split = "pipeline" in name and "stages=1" not in cases[name] and "zbv" not in name
        assert sum(its["drawn"]) == size + tied * split, name
        assert min(its["drawn"]) > 0, name
        assert sum(its["read"]) == (size if cases[name] == "strategy=fsdp" else 0)  # `model.weights`, likewise
        assert sum(its["loaded"]) == its["numbers"] == 0, name


@pytest.mark.slow
def test_each_number_is_drawn_by_one_process(tmp_path: Path) -> None:
    check(2, QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_each_number_is_drawn_by_one_process_everywhere(processes: int, tmp_path: Path) -> None:
    check(processes, SLOW[processes], tmp_path)


class Random(TorchDispatchMode):
    """Counts numbers that torch draws."""

    drawn = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not args[0].is_meta:
            self.drawn += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_modules_draw_nothing_that_is_overwritten() -> None:
    """torch's layers draw values of their own as they are made."""
    with Random() as random:
        whole = factory()()
    assert random.drawn == sum(p.numel() for p in whole.parameters() if p.ndim > 1)  # biases are 0, norms 1


def test_what_no_checkpoint_gives_is_not_a_number() -> None:
    whole = ModelFactory(factory().build, seed=5, loaded=True)()
    assert all(bool(parameter.isnan().all()) for parameter in whole.parameters())


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.other.weight = self.one.weight

        def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
            parameter.fill_(2.0)

    made = ModelFactory(Tied, seed=1)()
    assert made.one.weight is made.other.weight
    assert made.one.weight.sum() == 18


PLUGIN = """
import os, torch, trainer.config

class Net(torch.nn.Module):
    class Config(trainer.config.Plugin):
        width: int

    def __init__(self, config, facts):
        super().__init__()
        self.embedding = torch.nn.Embedding(facts.vocab_size, config.width)
        self.head = torch.nn.Linear(config.width, facts.vocab_size)

    def forward(self, batch):
        return self.head(self.embedding(batch["inputs"]))

    def initialise(self, name, parameter, generator):
        parameter.normal_(0.0, 0.1, generator=generator)
        with open(os.environ["DRAWN"], "a") as file:
            file.write(f"{parameter.numel()}\\n")
"""


@pytest.mark.slow
def test_a_resumed_run_draws_nothing(tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text(PLUGIN)
    (tmp_path / "my_conf" / "model").mkdir(parents=True)
    (tmp_path / "my_conf" / "model" / "net.yaml").write_text("name: counted:Net\nwidth: 16\n")
    base = tuple(option for option in TINY if not option.startswith("model."))
    options = ("--config-dir=my_conf", "run.plugins=[counted]", "model=net", "experiment=none", "schedule=constant")

    def train(steps: int) -> int:
        drawn = tmp_path / f"drawn-{steps}"
        run = Run(tmp_path / "run", 1, (*options, f"train.steps={steps}"), env={"DRAWN": str(drawn)}, base=base)
        run.train()
        return sum(map(int, drawn.read_text().split())) if drawn.exists() else 0

    assert train(2) == 2 * 257 * 16 + 257
    assert train(4) == 0
    assert [math.isfinite(row["loss"]) for row in Run(tmp_path / "run").metrics()] == [True] * 4


class Tied(nn.Module):
    """Both layers have one weight, which was made before either."""

    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.empty(4, 4))
        self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.one.weight = weight
        self.other.weight = weight

    def initialise(self, name: str, value: torch.Tensor, generator: torch.Generator) -> None:
        value.normal_(generator=generator)


class Shadowed(Tied):
    """A buffer is made of a parameter's own first values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shadow", self.one.weight.detach().clone())
        self.alias = self.shadow


def test_what_is_tied_by_a_variable_stays_tied() -> None:
    model = ModelFactory(Tied, seed=3)()
    assert [name for name, _ in model.named_parameters()] == ["one.weight"]
    assert model.one.weight is model.other.weight  # type: ignore[union-attr]


def test_a_model_may_compute_with_its_parameters_as_it_is_made() -> None:
    model = ModelFactory(Shadowed, seed=3)()
    assert model.shadow.shape == (4, 4)
    assert model.alias is model.shadow
    assert torch.equal(model.one.weight, ModelFactory(Tied, seed=3)().one.weight)  # type: ignore[union-attr, arg-type]
