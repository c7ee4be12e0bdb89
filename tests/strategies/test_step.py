"""One process: precision and loss scaling, no waiting for the device between logs, groups, the schedule."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.strategies import ragged
from trainer import topology
from trainer.config import schema, transforms
from trainer.models import ModelFactory, materialize
from trainer.models.gpt import GPT
from trainer.optim.adamw import adamw
from trainer.precision import Precision
from trainer.strategies.arithmetic import StepOptions
from trainer.strategies.single import Single
from trainer.topology import ALONE
from trainer.transforms.fp8 import FP8

OPTIONS = StepOptions(clip_norm=1.0, activation_checkpointing="none", compile=False)


def strategy(precision: str = "fp32", options: StepOptions = OPTIONS) -> Single:
    alone = topology.join(timeout_s=60)
    made = Single(schema.Single(name="single"), alone, Precision(alone.device, precision), ragged.Objective(), options)
    made.setup(ragged.factory(torch.float32), ragged.optimizer)
    return made


def losses(made: Single, steps: int = 30) -> list[float]:
    found = []
    for _ in range(steps):
        sums = made.train_step([ragged.batch(0)])
        made.update(0.01)
        found.append(float(sums["loss"] / sums["num_targets"]))
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_fp32(precision: str) -> None:
    exact, mixed = losses(strategy()), losses(strategy(precision))
    assert mixed[-1] < 0.5 * mixed[0]
    assert mixed != exact  # it really computes in another type
    # Short types round at 2^-8 (bf16) and 2^-11 (fp16): close at first, before the paths part.
    assert mixed[:5] == pytest.approx(exact[:5], rel=0.02)


def test_fp16_overflow_skips_the_step_and_halves_the_scale() -> None:
    made = strategy("fp16")
    made.train_step([ragged.batch(0)])
    made.update(0.01)
    before = {name: tensor.clone() for name, tensor in made.full_weights()}
    scale = made.scaler.scale
    made.train_step([ragged.batch(1)])
    next(made.model.parameters()).grad[0, 0] = math.inf
    update = made.update(0.01)
    assert update.skipped
    assert all(torch.equal(before[name], tensor) for name, tensor in made.full_weights())
    assert made.scaler.scale == scale / 2
    made.train_step([ragged.batch(1)])
    assert not made.update(0.01).skipped


@pytest.mark.slow
def test_fp16_overflow_on_one_rank_is_everybodys() -> None:
    """Both skip the step, keep weights and optimizer state, halve the scale, and count from zero again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.strategies.fp16_overflow_rank"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    expected = [f"{name} True True True 0.5 0" for name in ("ddp", "fsdp") for _ in range(2)]
    assert sorted(done.stdout.splitlines()) == expected


@pytest.mark.slow
def test_copies_of_a_pipeline_may_have_unequal_batches() -> None:
    """Of 16 sequences a step one copy has 8 or 12: as if samples were left out. It is the same curve, and ends."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]

    def curve(of_first: int) -> list[float]:
        words = [*command, "-m", "tests.strategies.unequal_batches_rank", str(of_first)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return [float(number) for number in done.stdout.split()]

    equal = curve(8)
    assert len(equal) == 4
    assert curve(12) == pytest.approx(equal, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_state_goes_on_exactly(precision: str) -> None:
    made = strategy(precision)
    losses(made, 5)
    state = {name: tensor.clone() for name, tensor in made.state().items()}
    expected = losses(made, 5)
    other = strategy(precision)
    other.load_state(state)
    assert losses(other, 5) == expected


def test_the_norm_of_short_gradients_is_not_rounded_to_their_type() -> None:
    made = Single(schema.Single(name="single"), ALONE, Precision(ALONE.device), ragged.Objective(), OPTIONS)
    gradients = [torch.full((100,), 0.25, dtype=torch.bfloat16) for _ in range(3)]
    assert made.norm(gradients).item() == pytest.approx(0.25 * math.sqrt(300), rel=1e-6)


def test_buffers_are_where_the_model_is_computed() -> None:
    """Also if its parameters are elsewhere, in host memory."""
    model = nn.BatchNorm1d(3)
    model.running_mean += 2
    materialize(model, torch.device("meta"), torch.device("cpu"))
    assert model.weight.is_meta
    assert model.running_mean.tolist() == [2, 2, 2]
    assert set(model.state_dict()) == set(nn.BatchNorm1d(3).state_dict())


class NoWaiting(TorchDispatchMode):
    """Refuses to read a number of the device. Counts and draws (int64) are read from the batch on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype != torch.int64:
            raise AssertionError(f"reads a {args[0].dtype} from the device")
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_wait_for_the_device() -> None:
    made = strategy()
    with NoWaiting():
        sums = made.train_step([ragged.batch(0), ragged.batch(1)])
        made.update(0.01)
        with pytest.raises(AssertionError, match="reads"):
            sums["loss"].item()


def test_a_micro_batch_seeds_only_the_generators_that_it_draws_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the numbers that torch.manual_seed, which seeds all devices of the machine, would have it draw."""
    made, drawn = strategy(), []
    made.wrapped.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(3)))
    torch.manual_seed(5)
    expected = torch.rand(3)

    def refuse(seed: int) -> None:
        raise AssertionError("seeds every device")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    made.train_step([ragged.batch(0) | {"draws": torch.full((ragged.SEQUENCES,), 5)}])
    assert torch.equal(drawn[0], expected)


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputation_changes_no_bit_but_memory(how: str) -> None:
    saved: dict[str, int] = {}

    def kept(mode: str) -> list[float]:
        made = strategy(options=StepOptions(1.0, mode, False))
        sizes = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            made.model(ragged.batch(0))
        saved[mode] = sum(sizes)
        return losses(made, 5)

    assert kept(how) == kept("none")
    assert saved[how] < saved["none"]


def test_compiled_layers_give_the_same_curve() -> None:
    compiled = strategy(options=StepOptions(1.0, "full", True))
    assert list(compiled.model.state_dict()) == list(ragged.model().state_dict())
    for block in compiled.model.blocks:
        block.compile(backend="aot_eager")  # the same road without minutes of code generation
    assert losses(compiled, 5) == pytest.approx(losses(strategy(), 5), rel=1e-5)


def in_fp8(model: nn.Module) -> nn.Module:
    FP8(transforms.FP8(name="fp8", emulate=True)).apply(model)
    return model


def test_fp8_learns_in_the_linear_layers_of_blocks() -> None:
    """On a CPU the rounding is the same, the products are not those of fp8 units."""
    shape = ragged.SHAPE.model_copy(update={"width": 32})
    plain = ModelFactory(lambda: GPT(shape, ragged.FACTS), seed=5)
    made = strategy()
    made.setup(ModelFactory(lambda: in_fp8(plain.build()), seed=5), ragged.optimizer)
    assert list(made.model.state_dict()) == list(plain().state_dict())
    converted = {name for name, module in made.model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert converted == {
        f"blocks.{layer}.{name}"
        for layer in range(2)
        for name in ("attention.query_key_value", "attention.output", "mlp.input", "mlp.output")
    }
    exact, found = strategy(), losses(made)
    exact.setup(plain, ragged.optimizer)
    expected = losses(exact)
    assert found[-1] < 0.5 * found[0]
    assert found != expected
    assert found[:5] == pytest.approx(expected[:5], rel=0.02)


def test_fp8_leaves_layers_that_do_not_fit() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 32), nn.Linear(32, 16))
    assert [type(layer) is nn.Linear for layer in in_fp8(model)] == [True, True, False]


def test_decay_by_kind() -> None:
    model = ragged.model()

    def undecayed(no_decay: list[str]) -> set[str]:
        config = schema.AdamW(
            name="adamw",
            implementation="auto",
            lr=1,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            no_decay=no_decay,
            ema=None,
        )
        plain = {
            id(p) for group in adamw(config, model).param_groups if not group["weight_decay"] for p in group["params"]
        }
        return {name for name, parameter in model.named_parameters() if id(parameter) in plain}

    assert undecayed([]) == set()
    assert undecayed(["embedding"]) == {"token_embedding.weight", "position_embedding.weight"}
    norms_and_biases = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert undecayed(["bias", "norm"]) == norms_and_biases
