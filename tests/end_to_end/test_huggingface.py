"""Models of transformers are trained as any other: one curve, killed and resumed, sampled and exported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from launch.cli import main
from tests.runs import TINY, Run, assert_same_bits, assert_same_curve
from trainer.sampling import load_run, with_weights

transformers = pytest.importorskip("transformers")

STEPS = 12
BASE = (*(key for key in TINY if not key.startswith("model.")), f"train.steps={STEPS}", "train.log_every=1")
LLAMA = (
    "model=llama", "model.config.hidden_size=32", "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2", "model.config.num_attention_heads=4",
)  # fmt: skip
GPT2 = ("model=gpt2", "model.config.n_embd=32", "model.config.n_layer=2")
MODELS = {"llama": LLAMA, "llama tied": (*LLAMA, "model.config.tie_word_embeddings=true"), "gpt2": GPT2}
STRATEGIES = {
    "fsdp": ("strategy=fsdp",),
    "ddp": ("strategy=ddp",),
    "hsdp": ("strategy=hsdp",),
    "zero": ("strategy=zero", "strategy.stage=3"),
    "pipeline": ("strategy=pipeline",),
    "tensor": (
        "strategy=fsdp", "strategy.tensor_parallel=2", "strategy.sequence_parallel=true", "strategy.loss_parallel=true"
    ),
}  # fmt: skip
MASKED = ("data.packing=best_fit", "data.document_mask=true")


def made(folder: Path, procs: int, *overrides: str) -> Run:
    return Run(folder, procs, overrides, base=BASE)


@pytest.fixture(scope="module", params=["llama", *(pytest.param(m, marks=pytest.mark.slow) for m in list(MODELS)[1:])])
def single(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = made(tmp_path_factory.mktemp("single") / "run", 1, *MODELS[request.param], *MASKED, "strategy=single")
    run.train()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_curve(strategy: str, single: Run, tmp_path: Path) -> None:
    """Also with accumulation and recomputation."""
    if strategy == "tensor" and "model=gpt2" in single.overrides:
        pytest.skip("transformers has no plan for it")
    others = ("train.micro_batch=4", "train.activation_checkpointing=selective")
    run = made(tmp_path / "run", 2, *single.overrides[:-1], *others, *STRATEGIES[strategy])
    run.train()
    assert_same_curve(run, single, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_and_resumed_to_the_bit(strategy: str, single: Run, tmp_path: Path) -> None:
    runs = [made(tmp_path / name, 2, *single.overrides[:-1], f"strategy={strategy}") for name in ("whole", "killed")]
    runs[0].train()
    runs[1].kill_at(9)
    runs[1].train()
    assert_same_bits(runs[1], runs[0])


def test_sampled_and_exported(
    single: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers takes the exported weights as they are, and gives the same logits."""

    def onecurve(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["onecurve", *words])
        with pytest.raises(SystemExit, match="0"):
            main()
        return capsys.readouterr().out

    text = onecurve("sample", str(single.folder), "--prompt", "JULIET:", "--count", "1", "--tokens", "8")
    assert text.startswith("JULIET:")
    onecurve("export", str(single.folder), "--out", str(tmp_path / "model.safetensors"))
    exported = safetensors.torch.load_file(tmp_path / "model.safetensors")
    config, model, tokenizer = load_run(single.folder)
    model.config.save_pretrained(tmp_path)
    theirs = getattr(transformers, config.model.architecture).from_pretrained(tmp_path)
    inputs = torch.arange(48)[None]
    torch.testing.assert_close(theirs(inputs).logits, model({"inputs": inputs}), rtol=1e-6, atol=1e-6)
    assert torch.equal(with_weights(config, tokenizer, exported)({"inputs": inputs}), model({"inputs": inputs}))
