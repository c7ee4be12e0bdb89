"""Exported weights: transformers loads them and computes the same; in shards, converted, averaged, of an older step."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from launch.export import size
from tests.exported import GPT, INPUTS, LENGTH, MODELS, config_of, onecurve, saved, shaken
from trainer.data.tokenizer import ByteTokenizer
from trainer.models.family import family_of, from_gpt2, to_gpt2
from trainer.models.pretrained_files import files_beside, keep
from trainer.pretrained import open_pretrained
from trainer.sampling import with_weights
from trainer.topology import ALONE

transformers = pytest.importorskip("transformers")
Export = Callable[..., str]


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Export:
    def run(*words: Any, expect: int = 0) -> str:
        onecurve(monkeypatch, ["export", *words], expect)
        told = capsys.readouterr()
        return told.err if expect else told.out

    return run


def logits(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model(INPUTS).logits.float()


def expected(model: nn.Module) -> Tensor:
    return model({"inputs": INPUTS})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_size", [None, "20KB"])
def test_transformers_computes_the_same(name: str, shard_size: str | None, tmp_path: Path, export: Export) -> None:
    config = config_of(*MODELS[name])
    model = shaken(config)
    folder = saved(tmp_path / "run", config, {7: model})
    told = export(folder, *(("--shard-size", shard_size) if shard_size else ()))
    out = folder / "export"
    assert f"from_pretrained('{out}')" in told
    torch.testing.assert_close(logits(out), expected(model), rtol=1e-5, atol=1e-5)
    names = {path.name for path in out.iterdir()}
    told = json.loads((out / "config.json").read_text())
    assert told["eos_token_id"] == ByteTokenizer().separator
    assert len(told["architectures"]) == 1
    if shard_size is None:
        assert names == {"config.json", "model.safetensors"}
        return
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = {file: safetensors.torch.load_file(out / file) for file in set(index["weight_map"].values())}
    assert len(shards) > 2
    assert names == {"config.json", "model.safetensors.index.json", *shards}
    sizes = {file: sum(tensor.nbytes for tensor in tensors.values()) for file, tensors in shards.items()}
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert all(bytes <= size("20KB") or len(shards[file]) == 1 for file, bytes in sizes.items())
    assert all(index["weight_map"][name] == file for file, tensors in shards.items() for name in tensors)


def test_an_export_takes_the_place_of_another(tmp_path: Path, export: Export) -> None:
    """In other files, too: what is loaded is never a mixture. Other files stay."""
    config = config_of(*MODELS["llama"])
    models = {step: shaken(config, seed=step) for step in (1, 2)}
    folder, out = saved(tmp_path / "run", config, models), tmp_path / "out"
    for sizes in [("5GB", "20KB"), ("20KB", "5GB"), ("20KB", "30KB")]:
        for step, shard_size in zip((1, 2), sizes, strict=True):
            export(folder, "--out", out, "--step", step, "--shard-size", shard_size)
            (out / "README.md").touch()
            torch.testing.assert_close(logits(out), expected(models[step]), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_that_is_not_there(tmp_path: Path, export: Export) -> None:
    config = config_of(*MODELS["llama"])
    folder = saved(tmp_path / "run", config, {3: shaken(config), 5: shaken(config)})
    assert "--step 4: " in (told := export(folder, "--step", 4, expect=2))
    assert "there are: 3, 5" in told
    (folder / "checkpoints/step-00000003/rank-00000.safetensors").write_bytes(b"")
    assert "is not whole: rank-00000.safetensors has 0 bytes" in export(folder, "--step", 3, expect=2)
    assert not (folder / "export").exists()


def test_converted(tmp_path: Path, export: Export) -> None:
    config = config_of(*MODELS["gpt2"])
    model = shaken(config)
    folder = saved(tmp_path / "run", config, {1: model})
    export(folder, "--dtype", "bf16")
    tensors = safetensors.torch.load_file(folder / "export/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((folder / "export/config.json").read_text())["dtype"] == "bfloat16"
    weights = {name: value.bfloat16().float() for name, value in model.state_dict().items()}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    rounded = with_weights(config, ByteTokenizer(), weights)
    torch.testing.assert_close(theirs(INPUTS).logits, expected(rounded), rtol=1e-5, atol=1e-5)


def test_averaged(tmp_path: Path, export: Export) -> None:
    """Averages began at zero: they are divided by what they have of the weights."""
    config = config_of(*MODELS["gpt"])
    model, average = shaken(config), shaken(config, seed=2)
    state = {f"optimizer/ema/{name}": value * 0.25 for name, value in average.state_dict().items()}
    weights = {f"optimizer/ema_weight/{name}": torch.tensor(0.25) for name in average.state_dict()}
    folder = saved(tmp_path / "run", config, {1: model}, **state, **weights)
    for flags, weighed in ((), model), (("--ema",), average):
        export(folder, *flags)
        torch.testing.assert_close(logits(folder / "export"), expected(weighed), rtol=1e-5, atol=1e-5)
    without = saved(tmp_path / "without", config, {1: model})
    assert "holds no averaged weights; they are kept where optimizer.ema is set" in export(without, "--ema", expect=2)
    weights = dict.fromkeys(weights, torch.tensor(0.0))
    broken = saved(tmp_path / "broken", config, {1: model}, **state, **weights)
    assert "does not tell how far the average" in export(broken, "--ema", expect=2)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_one_file_has_the_names_of_the_checkpoint(name: str, tmp_path: Path, export: Export) -> None:
    config = config_of(*MODELS[name])
    model = shaken(config)
    folder = saved(tmp_path / "run", config, {1: model})
    export(folder, "--out", tmp_path / "weights.safetensors")
    weights = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert torch.equal(expected(with_weights(config, ByteTokenizer(), weights)), expected(model))


def test_a_model_that_transformers_does_not_have(
    tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(*GPT)  # rotary, relu2, no biases
    folder = saved(tmp_path / "run", config, {1: shaken(config)})
    told = export(folder)
    assert (folder / "model.safetensors").exists()
    assert not (folder / "export").exists()
    assert "no config.json: transformers has no such model; it is GPT-2 with model.positions=learned model.a" in told
    assert "model.bias=true" in told
    assert "--shard-size: this export is one file: transf" in export(folder, "--shard-size", "1GB", expect=2)


def test_the_tokenizer_goes_with_it(tmp_path: Path, export: Export) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    tokenizer = tokenizers.Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    config = config_of(*MODELS["gpt2"], "model.config.vocab_size=257")
    folder = saved(tmp_path / "run", config, {1: shaken(config)})
    tokenizer.save(str(folder / "tokenizer.json"))
    export(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "export")
    assert theirs("b a zz b").input_ids == [2, 1, 3, 2]
    assert json.loads((folder / "export/config.json").read_text())["eos_token_id"] == 0


def word_tokenizer(*words: str) -> str:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    return tokenizer.to_str()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of a model that somebody else trained, with all that is served by."""
    folder = tmp_path / "base"
    config = family_of(config_of(*MODELS["llama"]), ByteTokenizer()).config
    config.max_position_embeddings = 512
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, [2, 6], 3
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, True
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(word_tokenizer("a", "b", "<|end|>"))
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "bos_token": "<s>", "eos_token": "</s>",
        "pad_token": "<pad>", "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} <|end|>{% endfor %}")
    return folder


def test_a_fine_tuned_model_says_what_its_base_said(tmp_path: Path, export: Export, base: Path) -> None:
    """Wherever that is by now."""
    config = config_of(*MODELS["llama"], "model.config.vocab_size=257", f"model.weights={base}")
    given = open_pretrained(config, ALONE, ByteTokenizer())
    assert given is not None
    model = shaken(config)
    folder = saved(tmp_path / "run", config, {1: model})
    (folder / "tokenizer.json").write_text((base / "tokenizer.json").read_text())
    for gone in (False, True):
        if gone:
            keep(folder, given.other_files)
            shutil.rmtree(base)
        export(folder)
        out = folder / "export"
        told = transformers.AutoConfig.from_pretrained(out)
        assert told.max_position_embeddings == 512
        assert (told.bos_token_id, told.eos_token_id, told.pad_token_id) == (1, [2, 6], 3)
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("</s>", "<pad>", 512)
        talk = tokenizer.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False)
        assert talk == "a b <|end|>"
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        assert theirs.generation_config.temperature == 0.6
        assert theirs.generation_config.eos_token_id == [2, 6]
        torch.testing.assert_close(theirs(INPUTS).logits.float(), expected(model), rtol=1e-5, atol=1e-5)
        shutil.rmtree(out)


def test_with_another_tokenizer_the_ids_are_its_own(tmp_path: Path, export: Export, base: Path) -> None:
    config = config_of(*MODELS["llama"], f"model.weights={base}")
    folder = saved(tmp_path / "run", config, {1: shaken(config)})
    (folder / "tokenizer.json").write_text(word_tokenizer("b", "a"))
    export(folder)
    told = transformers.AutoConfig.from_pretrained(folder / "export")
    assert told.max_position_embeddings == 512
    assert (told.eos_token_id, told.pad_token_id) == (2, None)
    assert not (folder / "export/generation_config.json").exists()
    assert not (folder / "export/chat_template.jinja").exists()


LONGROPE = (
    "model.config.rope_parameters={rope_theta: 10000.0, rope_type: longrope, original_max_position_embeddings: 8, "
    "short_factor: [1, 1, 1, 1], long_factor: [2, 2, 2, 2]}"
)


@pytest.mark.parametrize(
    ("name", "longest", "more"), [("llama", 512, []), ("llama", LENGTH, [LONGROPE]), ("gpt2", LENGTH, [])]
)
def test_longest_position(name: str, longest: int, more: list[str], tmp_path: Path, export: Export, base: Path) -> None:
    """The base's, unless rotations are scaled by it, or a table has that size."""
    config = config_of(*MODELS[name], *more)
    folder = saved(tmp_path / "run", config, {1: shaken(config)})
    keep(folder, files_beside(base))
    export(folder)
    assert transformers.AutoConfig.from_pretrained(folder / "export").max_position_embeddings == longest


def test_gpt2s_layout_there_and_back() -> None:
    shapes = {
        "query_key_value.weight": (96, 32),
        "query_key_value.bias": (96,),
        "output.weight": (32, 32),
        "output.bias": (32,),
    }
    for name, shape in shapes.items():
        name, value = f"blocks.0.attention.{name}", torch.randn(shape)
        assert torch.equal(from_gpt2(name, to_gpt2(name, value, 4), 4), value)


@pytest.mark.parametrize(("text", "bytes"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5kb", 1500)])
def test_sizes(text: str, bytes: int) -> None:
    assert size(text) == bytes


@pytest.mark.parametrize("text", ["", "5", "GB", "0GB", "-1GB", "5 PB", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size; write 500MB or 2GB"):
        size(text)
