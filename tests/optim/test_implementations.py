"""Implementations of AdamW: the same steps, the same state, so that a run may change between them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import Tensor, nn

from tests.optim.test_optimizers import ADAMW
from tests.strategies import ragged
from trainer import topology
from trainer.config import schema
from trainer.errors import ConfigError
from trainer.models import ModelFactory
from trainer.models.gpt import GPT
from trainer.optim.adamw import adamw
from trainer.optional_packages import without_torchao
from trainer.precision import Precision
from trainer.strategies.arithmetic import StepOptions
from trainer.strategies.single import Single

WIDE = ragged.SHAPE.model_copy(update={"width": 64})  # matrices of 4096 numbers or more are quantized

# What `pip install apex` gets; NVIDIA's where it was built without CUDA; a stand-in for one that works, which keeps its
# state as FusedAdam does (NVIDIA/apex 6424da3, apex/optimizers/fused_adam.py).
PYRAMID = {"__init__.py": "raise ImportError('pyramid')"}
UNBUILT = {
    "__init__.py": "from . import normalization, optimizers",
    "optimizers/__init__.py": """
        class FusedAdam:
            def __init__(self, params, **options):
                raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")
    """,
    "normalization/__init__.py": """
        class FusedLayerNorm:
            def __init__(self, shape):
                import fused_layer_norm_cuda
    """,
}
BUILT = {
    "__init__.py": "from . import normalization, optimizers",
    "optimizers/__init__.py": """
        import torch

        class FusedAdam(torch.optim.Optimizer):
            def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0):
                assert adam_w_mode
                super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

            def zero_grad(self):
                for group in self.param_groups:
                    for p in group["params"]:
                        p.grad = None

            @torch.no_grad()
            def step(self, closure=None):
                for group in self.param_groups:
                    group["step"] = group.get("step", 0) + 1
                    (first, second), count = group["betas"], group["step"]
                    for p in group["params"]:
                        state = self.state[p]
                        if len(state) == 0:
                            state["exp_avg"] = torch.zeros_like(p).float()
                            state["exp_avg_sq"] = torch.zeros_like(p).float()
                        state["exp_avg"].lerp_(p.grad, 1 - first)
                        state["exp_avg_sq"].lerp_(p.grad.square(), 1 - second)
                        denominator = (state["exp_avg_sq"] / (1 - second**count)).sqrt() + group["eps"]
                        p.mul_(1 - group["lr"] * group["weight_decay"])
                        p.sub_(group["lr"] * state["exp_avg"] / (1 - first**count) / denominator)
    """,
    "normalization/__init__.py": """
        import torch

        class FusedLayerNorm(torch.nn.LayerNorm):
            pass
    """,
}


def with_package(folder: Path, files: dict[str, str]) -> dict[str, str]:
    """An environment in which `apex` is this package."""
    for name, text in files.items():
        path = folder / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    return {**os.environ, "PYTHONPATH": str(folder)}


def python(code: str, env: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", dedent(code)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_apex_is_tried(tmp_path: Path) -> None:
    packages = {"none": {}, "another": PYRAMID, "unbuilt": UNBUILT, "built": BUILT}
    for name, files in packages.items():
        with_package(tmp_path / name, files)
    code = f"""
        import sys
        from trainer.optional_packages import without_apex
        for name in {list(packages)}:
            sys.path.insert(0, "{tmp_path}/" + name)
            for part in ("FusedAdam", "FusedLayerNorm"):
                print(without_apex(part))
            without_apex.cache_clear()
            sys.path.pop(0)
            for module in [module for module in sys.modules if module.startswith("apex")]:
                del sys.modules[module]
    """
    found = python(code, dict(os.environ)).splitlines()
    broken = "NVIDIA Apex is installed, but its FusedAdam does not work here: RuntimeError: apex.optimizers.FusedAdam"
    missing = "NVIDIA Apex is installed, but its FusedLayerNorm does not work here: ModuleNotFoundError: No module"
    expected = [
        *["NVIDIA Apex is not installed (NVIDIA's is built from"] * 2,
        *["the package `apex` that is installed is not NVIDIA's but another project of PyPI"] * 2,
        *[broken, missing],
    ]
    assert [line[: len(start)] for line, start in zip(found, expected, strict=False)] == expected
    assert found[6:] == ["", ""]


def strategy(implementation: str) -> Single:
    alone = topology.join(timeout_s=60)
    options = StepOptions(clip_norm=1.0, activation_checkpointing="none", compile=False)
    made = Single(schema.Single(name="single"), alone, Precision(alone.device), ragged.Objective(), options)
    config = ADAMW.model_copy(update={"implementation": implementation})
    factory = ModelFactory(lambda: GPT(WIDE, ragged.FACTS), seed=5)
    made.setup(factory, lambda model: adamw(config, model))
    return made


def losses(made: Single, steps: int = 12) -> list[float]:
    found = []
    for step in range(steps):
        sums = made.train_step([ragged.batch(step % 3)])
        made.update(0.002)
        found.append(float(sums["loss"] / sums["num_targets"]))
    return found


def copied(made: Single) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in made.state().items()}


def test_foreach_is_fused() -> None:
    assert losses(strategy("foreach")) == pytest.approx(losses(strategy("fused")), rel=1e-5)


def test_8bit_follows_fused_and_goes_on_exactly() -> None:
    exact, made = losses(strategy("fused")), strategy("8bit")
    found = losses(made)
    assert found != exact
    assert found == pytest.approx(exact, rel=0.02)
    state = copied(made)
    assert {type(tensor) for tensor in state.values()} == {Tensor}
    assert {state[name].dtype for name in state} == {torch.float32}
    held = made.optimizer.state[made.model.get_parameter("blocks.0.mlp.input.weight")]["exp_avg"]
    assert held.codes.dtype == torch.uint8
    expected = losses(made)
    other = strategy("8bit")
    other.load_state(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state().items())
    assert losses(other) == expected


def test_from_8bit_to_fused_and_back() -> None:
    made, exact = strategy("8bit"), losses(strategy("fused"), 12)
    found = losses(made, 3)
    for implementation, steps in (("fused", 3), ("8bit", 6)):
        state, made = copied(made), strategy(implementation)
        made.load_state(state)
        found += losses(made, steps)
    assert found == pytest.approx(exact, rel=0.02)


@pytest.mark.slow
def test_apex_keeps_the_state_as_torch_does(tmp_path: Path) -> None:
    """With the stand-in: the same steps as fused, and its count of steps goes over to fused and comes back. So with its
    norms: the same names, the same curve."""
    code = """
        from tests.optim import test_implementations as tests
        from tests.optim.test_implementations import copied, losses, strategy
        print(*losses(strategy("fused")), sep="\\n")
        made = strategy("apex")
        print(*losses(made, 3), sep="\\n")
        for implementation, steps in (("fused", 3), ("apex", 6)):
            state, made = copied(made), strategy(implementation)
            made.load_state(state)
            print(*losses(made, steps), sep="\\n")
        tests.WIDE = tests.WIDE.model_copy(update={"fused_norm": True})
        fused = strategy("apex")
        assert list(fused.state()) == list(made.state())
        assert type(fused.model.blocks[1].mlp_norm).__module__ == "apex.normalization"
        print(*losses(fused), sep="\\n")
    """
    numbers = [float(line) for line in python(code, with_package(tmp_path, BUILT)).split()]
    assert numbers[12:24] == pytest.approx(numbers[:12], rel=1e-5)
    assert numbers[24:] == pytest.approx(numbers[:12], rel=1e-5)


def test_8bit_without_torchao_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    without_torchao.cache_clear()
    with pytest.raises(ConfigError, match=r"torchao is not installed: pip install 'onecurve\[torchao\]'; nearest: "):
        strategy("8bit")
    without_torchao.cache_clear()


def test_norms_of_any_make_are_norms() -> None:
    class FusedLayerNorm(nn.LayerNorm):
        pass

    model = nn.Sequential(nn.Linear(4, 4), FusedLayerNorm(4))
    plain = [group["params"] for group in adamw(ADAMW, model).param_groups if not group["weight_decay"]]
    assert [len(group) for group in plain] == [3]  # two biases, and the norm's weight
