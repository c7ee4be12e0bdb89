"""Runs with transforms: one curve under every strategy, killed and resumed to the bit; checkpoints that hold what is
trained alone, and all who read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.exported import onecurve
from tests.runs import Run, assert_same_bits, assert_same_curve
from tests.zoo.cells import KILLED, SAVED, STEPS, Zoo
from trainer.checkpoint.retention import complete_checkpoints
from trainer.sampling import load_run

MODEL = ("model=gpt", "model.layers=2", "model.width=32", "model.heads=2", "optimizer.lr=0.01")
GPT2 = (*MODEL, "model.positions=learned", "model.activation=gelu", "model.bias=true")
TRANSFORMS = {
    "freeze": ("model.transforms.freeze.modules=[token_embedding, blocks.0, blocks.1.mlp]",),
    "lora": ("model.transforms.lora.rank=4", "model.transforms.lora.alpha=8"),
}
STRATEGIES = {
    "ddp 2": (2, ("strategy=ddp",)),
    "fsdp 2": (2, ("strategy=fsdp",)),
    "zero2 2": (2, ("strategy=zero", "strategy.stage=2")),
    "zero3 2": (2, ("strategy=zero", "strategy.stage=3")),
    "tensor 2": (2, ("strategy=fsdp", "strategy.tensor_parallel=2")),
    "pipeline 2": (2, ("strategy=pipeline",)),
}
QUICK = {("lora", "fsdp 2")}
ADAPTED = {
    f"blocks.{layer}.{name}.{leaf}"
    for layer in range(2)
    for name in ("attention.query_key_value", "attention.output", "mlp.input", "mlp.output")
    for leaf in ("lora_a", "lora_b")
}
TRAINED = {
    "freeze": {"norm.weight"}
    | {f"blocks.1.{name}.weight" for name in ("attention_norm", "attention.query_key_value")}
    | {f"blocks.1.{name}.weight" for name in ("attention.output", "mlp_norm")},
    "lora": ADAPTED,
}
INPUTS = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("transforms")).prepare()


def train(zoo: Zoo, name: str, procs: int, *overrides: str, expect: int = 0, says: str = "") -> Run:
    run = zoo.run(name, procs, overrides)
    codes, output = zoo.train(run)
    assert set(codes) == {expect}, output
    assert says in output
    return run


def alone(zoo: Zoo, transform: str) -> Run:
    """The run of one process; once."""
    run = zoo.run(f"{transform}-single", 1, (*MODEL, *TRANSFORMS[transform], "strategy=single"))
    return run if run.folder.exists() else train(zoo, f"{transform}-single", 1, *run.overrides)


@pytest.mark.parametrize(
    ("transform", "strategy"),
    [
        pytest.param(transform, strategy, marks=[] if (transform, strategy) in QUICK else pytest.mark.slow)
        for transform in TRANSFORMS
        for strategy in STRATEGIES
    ],
)
def test_one_curve_killed_and_resumed(transform: str, strategy: str, zoo: Zoo) -> None:
    procs, where = STRATEGIES[strategy]
    overrides, name = (*MODEL, *TRANSFORMS[transform], *where), f"{transform}-{strategy.replace(' ', '-')}"
    whole = train(zoo, name, procs, *overrides)
    assert_same_curve(whole, alone(zoo, transform), STEPS)
    assert whole.metrics()[-1]["loss"] < 0.99 * whole.metrics()[0]["loss"]
    killed = f"{name}-killed"
    run = train(zoo, killed, procs, *overrides, f"debug.faults=[step.after_update:kill:{KILLED}]", expect=-9)
    assert SAVED <= run.last_step() < KILLED
    assert_same_bits(train(zoo, killed, procs, *overrides), whole)
    weights = {path.removeprefix("model/") for path in whole.weights() if path.startswith("model/")}
    assert weights > TRAINED[transform]
    assert "token_embedding.weight" in weights  # drawn, on other processors to other bits
    optimized = {path.split("/", 2)[2] for path in whole.weights() if path.startswith("optimizer/")}
    assert optimized == TRAINED[transform]


@pytest.mark.slow
def test_other_transforms_are_another_run(zoo: Zoo) -> None:
    lora = ("strategy=single", *MODEL, "model.transforms.lora.rank=2", "train.steps=3")
    train(zoo, "other", 1, *lora)
    train(zoo, "other", 1, *lora, "model.transforms.lora.rank=4", expect=2, says="model.transforms.lora.rank: the run")
    freeze = "model.transforms.freeze.modules=[norm]"
    train(zoo, "other", 1, *lora, freeze, expect=2, says="model.transforms.freeze.modules")
    one, other = "freeze: {modules: [token_embedding]}", "scales: {name: 'tests.transforms.users:Scales', start: 2}"
    alone = ("strategy=single", *MODEL, "train.steps=3")
    train(zoo, "order", 1, *alone, f"model.transforms={{{one}, {other}}}")
    train(zoo, "order", 1, *alone, f"model.transforms={{{other}, {one}}}", expect=2, says="model.transforms_order")


def test_patterns_are_refused_before_there_is_a_folder(zoo: Zoo) -> None:
    run = train(
        zoo, "refused", 1, *MODEL, "strategy=single", "model.transforms.freeze.modules=[nrm]", expect=2,
        says="'nrm' is not a part of the model; did you mean 'norm'?",
    )  # fmt: skip
    assert not run.folder.exists()


def command(*words: object, expect: int = 0) -> None:
    with pytest.MonkeyPatch.context() as patch:
        onecurve(patch, words, expect)


def export(run: Path, out: Path) -> Path:
    command("export", run, "--out", out)
    return out


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()({"inputs": INPUTS})


@pytest.fixture(scope="module")
def tuned(zoo: Zoo) -> Run:
    """A LoRA run of weights that another run has exported."""
    pytest.importorskip("transformers")
    base = train(zoo, "base", 1, *GPT2, "strategy=single", "run.seed=7")
    weights = export(base.folder, zoo.folder / "weights")
    return train(zoo, "tuned", 1, *GPT2, *TRANSFORMS["lora"], "strategy=single", f"model.weights={weights}")


def test_a_checkpoint_is_as_large_as_what_is_trained(tuned: Run) -> None:
    numbers = sum(tensor.numel() for path, tensor in tuned.weights().items() if path.startswith("model/"))
    newest = complete_checkpoints(tuned.folder / "checkpoints")[-1]
    files = [file for file in newest.iterdir() if file.suffix == ".safetensors"]
    size, header = sum(file.stat().st_size for file in files), 16_384
    assert numbers == 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    assert 3 * 4 * numbers <= size < 3 * 4 * numbers + header  # the weights, and AdamW's two moments of each


@pytest.mark.slow
def test_a_flipped_bit_in_frozen_weights_is_found_and_read_again(tuned: Run, zoo: Zoo) -> None:
    """No checkpoint holds them, so going back alone would keep it."""
    weights = f"model.weights={zoo.folder / 'weights'}"
    overrides = (
        *GPT2,
        *TRANSFORMS["lora"],
        "strategy=ddp",
        weights,
        "track.fingerprint=true",
        "guard.replicas_every=1",
    )
    whole = train(zoo, "replicas", 2, *overrides)
    fault = "debug.faults=[step.weights:flip:5:1]"  # blocks.1.attention_norm.weight
    run = train(zoo, "flipped", 2, *overrides, fault, expect=4, says="reads frozen weights again")
    assert [event["ranks"] for event in run.rows("events.jsonl") if event["kind"] == "corrupted"] == [
        [0, 1]
    ]  # no majority
    assert_same_bits(train(zoo, "flipped", 2, *overrides), whole)


def test_a_run_of_given_weights_is_read_and_exported_merged(tuned: Run, zoo: Zoo, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert {path.removeprefix("model/") for path in tuned.weights() if path.startswith("model/")} == ADAPTED
    model = load_run(tuned.folder)[1]
    base = load_run(zoo.folder / "base")[1]
    assert torch.equal(model.token_embedding.weight, base.token_embedding.weight)
    assert (logits(model) - logits(base)).abs().max() > 1e-2
    theirs = AutoModelForCausalLM.from_pretrained(export(tuned.folder, tmp_path / "merged"))
    torch.testing.assert_close(theirs(INPUTS).logits, logits(model), rtol=1e-5, atol=1e-5)


def test_a_merged_file_is_a_plain_model(zoo: Zoo, tmp_path: Path) -> None:
    """Of a run whose frozen weights are drawn."""
    from safetensors.torch import load_file

    from trainer.models.factory import without_transforms
    from trainer.sampling import with_weights

    config, model, tokenizer = load_run(alone(zoo, "lora").folder)
    merged = load_file(export(alone(zoo, "lora").folder, tmp_path / "model.safetensors"))
    plain = with_weights(without_transforms(config), tokenizer, merged)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


def test_it_is_sampled_evaluated_and_replayed(tuned: Run, capsys: pytest.CaptureFixture[str]) -> None:
    command("sample", tuned.folder, "--count", "1", "--tokens", "4")
    capsys.readouterr()
    command("evaluate", tuned.folder, "--json")
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["loss"] == pytest.approx(tuned.metrics()[-1]["eval"]["loss"], rel=1e-6)
    command("replay", tuned.folder, "--step", "8")


def student_of(teacher: Run, zoo: Zoo) -> tuple[str, ...]:
    from tests.recipes import distillation

    (zoo.folder / "objective").mkdir(exist_ok=True)
    recipe = f"name: {distillation.__name__}:{distillation.Distillation.__name__}\n"
    (zoo.folder / "objective" / "distillation.yaml").write_text(recipe)
    return (*GPT2, "objective=distillation", f"models.frozen.teacher={teacher.folder}", "train.steps=3")


@pytest.mark.slow
def test_it_can_be_a_teacher(tuned: Run, zoo: Zoo) -> None:
    """Sharded or not, it computes the same."""
    overrides = student_of(tuned, zoo)
    one = train(zoo, "student", 1, *overrides, "strategy=single")
    assert_same_curve(train(zoo, "student-fsdp", 2, *overrides, "strategy=fsdp"), one, 3)


@pytest.mark.slow
def test_base_weights_that_are_gone_or_others_are_named(
    tuned: Run, zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without them the run's checkpoint is not the whole model."""
    from safetensors.torch import load_file, save_file

    weights, aside = zoo.folder / "weights", zoo.folder / "aside"
    weights.rename(aside)
    try:
        more = (*TRANSFORMS["lora"], "strategy=single", f"model.weights={weights}")
        train(zoo, "tuned", 1, *GPT2, *more, "train.steps=12", expect=2, says=f"model.weights={weights}")
        command("sample", tuned.folder, expect=2)
        said = capsys.readouterr().err
        assert f"model.weights={weights}" in said
        assert "say where they are now with model.weights=PATH" in said
        command("sample", tuned.folder, f"model.weights={aside}", "--count", "1", "--tokens", "4")
        command("export", tuned.folder, f"model.weights={aside}", "--out", tmp_path / "merged")
        command("export", tuned.folder, "model.layers=1", expect=2)
        assert "only model.weights=PATH can be said anew" in capsys.readouterr().err
        student = train(
            zoo, "orphan", 2, *student_of(tuned, zoo), "strategy=ddp", expect=2,
            says=f"models.frozen.teacher={tuned.folder}: model.weights={weights}",
        )  # fmt: skip
        assert not student.folder.exists()
        shutil.copytree(aside, weights)
        tensors = load_file(weights / "model.safetensors")
        tensors["transformer.h.1.attn.c_attn.weight"] += 1e-3
        save_file(tensors, weights / "model.safetensors", {"format": "pt"})
        command("sample", tuned.folder, expect=2)
        assert "not the weights that the run" in capsys.readouterr().err
    finally:
        shutil.rmtree(weights, ignore_errors=True)
        aside.rename(weights)
