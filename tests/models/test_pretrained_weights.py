"""`model.weights`: a model starts with what transformers saved, in whatever way; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.config.test_config import problems
from tests.exported import GPT, INPUTS, LLAMA, MODELS, config_of, saved, shaken
from trainer.checkpoint.format import verify
from trainer.config import Config
from trainer.data.tokenizer import ByteTokenizer
from trainer.errors import ConfigError
from trainer.models.factory import model_factory
from trainer.models.family import family_of
from trainer.pretrained import open_pretrained
from trainer.topology import ALONE

transformers = pytest.importorskip("transformers")


def theirs(name: str) -> Any:
    """A model of transformers that none of ours was made of; biases and norms count."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(family_of(config_of(*MODELS[name]), ByteTokenizer()).config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def started(path: Path, *overrides: str) -> tuple[Config, nn.Module]:
    config = config_of(*overrides, f"model.weights={path}", "run.dir=/nowhere")
    given = open_pretrained(config, ALONE, ByteTokenizer())
    assert given is not None
    return config, model_factory(config, ByteTokenizer(), pretrained=given.fill)()


def refused(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        started(Path(path), *overrides)
    (problem,) = error.value.problems
    assert problem.startswith(f"model.weights={path}: ")
    return problem.removeprefix(f"model.weights={path}: ")


def same(model: nn.Module, expected: Any) -> None:
    torch.testing.assert_close(model({"inputs": INPUTS}), expected(INPUTS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
def test_it_starts_as_transformers_saved_it(name: str, shards: dict[str, str], tmp_path: Path) -> None:
    expected = theirs(name)
    expected.save_pretrained(tmp_path, **shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
    _, model = started(tmp_path, *MODELS[name])
    same(model, expected)


@pytest.mark.parametrize("name", ["llama tied", "gpt2", "gpt"])
def test_saved_without_its_head(name: str, tmp_path: Path) -> None:
    """Then names have no `model.` or `transformer.` before them."""
    expected = theirs(name)
    expected.base_model.save_pretrained(tmp_path)
    same(started(tmp_path, *MODELS[name])[1], expected)


def test_a_tied_one_starts_an_untied_one_and_the_other_way_round_only_if_it_is_tied(tmp_path: Path) -> None:
    expected = theirs("llama tied")
    expected.save_pretrained(tmp_path / "tied")
    same(started(tmp_path / "tied", *MODELS["llama"])[1], expected)
    weights = safetensors.torch.load_file(tmp_path / "tied/model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # as older versions saved it
    safetensors.torch.save_file(weights, tmp_path / "both.safetensors")
    same(started(tmp_path / "both.safetensors", *MODELS["llama tied"])[1], expected)
    theirs("llama").save_pretrained(tmp_path / "untied")
    assert "no place in this model: lm_head.weight" in refused(tmp_path / "untied", *MODELS["llama tied"])


def test_lower_precision_is_widened(tmp_path: Path) -> None:
    theirs("llama").bfloat16().save_pretrained(tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    same(started(tmp_path, *LLAMA)[1], expected)


def test_weights_of_another_shape(tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path)
    told = refused(tmp_path, *LLAMA, "model.config.num_hidden_layers=3")
    assert "9 of 30 parameters are not in it: model.layers.2.self_attn.q_proj.weight, " in told
    assert " and 6 more; " in told
    assert told.endswith(
        "its config.json is of another model; this one would be it with: model.config.num_hidden_layers=2"
    )
    told = refused(tmp_path, *LLAMA, "model.config.num_hidden_layers=1", "model.config.vocab_size=300")
    assert "of another shape: model.embed_tokens.weight [257, 32], here [300, 32], lm_head.weight [257, 32]" in told
    assert "9 of its tensors have no place in this model: model.layers.1.input_layernorm.weight, " in told
    assert "model.config.vocab_size=257" in told
    (tmp_path / "config.json").unlink()
    assert "config.json" not in refused(tmp_path, *LLAMA, "model.config.num_hidden_layers=1")


def test_weights_that_mean_something_else(tmp_path: Path) -> None:
    """What shapes do not show, their config.json does; what it says to set is enough."""
    model = theirs("llama")
    model.config.rope_parameters = {"rope_theta": 500000.0, "rope_type": "default"}
    model.config.rms_norm_eps = 1e-5
    model.save_pretrained(tmp_path)
    told = refused(tmp_path, *LLAMA)
    _, _, told = told.partition("its config.json is of another model; this one would be it with: ")
    ways = told.split(", ")
    assert ways == [
        "model.config.rms_norm_eps=1e-05",
        "'model.config.rope_parameters={rope_theta:500000.0,rope_type:default}'",
    ]
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    same(started(tmp_path, *LLAMA, *(way.strip("'") for way in ways))[1], expected)
    theirs("gpt2").save_pretrained(tmp_path / "gpt2")
    assert "its config.json is of a gpt2, this model is a llama" in refused(tmp_path / "gpt2", *LLAMA)
    assert "would be it with: n_head=2" in refused(tmp_path / "gpt2", *MODELS["gpt"], "model.heads=4")


def test_what_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert "pytorch_model.bin is a pickle, which can run any code when it is read; " in refused(path, *LLAMA)
        assert "save_pretrained, which makes safetensors" in refused(path, *LLAMA)
    outside = tmp_path / "outside.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, outside)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("../outside.safetensors", str(outside), "..", "", 3, "model.bin"):
        index = {"metadata": {}, "weight_map": {"a": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "which is not a safetensors file in this folder" in refused(folder, *LLAMA)


def test_files_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    assert "no such file or folder; nothing is downloaded" in refused("meta-llama/Llama-3.2-1B", *LLAMA)
    assert "the folder has neither model.safetensors nor model.safetensors.index.json" in refused(tmp_path, *LLAMA)
    theirs("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = next(tmp_path.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-4])
    assert f"{shard.name} cannot be read: " in refused(tmp_path, *LLAMA)
    shard.unlink()
    assert f"{shard.name} cannot be read: " in refused(tmp_path, *LLAMA)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert "model.safetensors.index.json cannot be read" in refused(tmp_path, *LLAMA)


def test_only_gpt2_has_weights_there() -> None:
    (problem,) = problems(*GPT, "model.weights=x")
    needed = "model.positions=learned model.activation=gelu model.bias=true"
    assert problem == f"model.weights=x: transformers has no weights for it; it is GPT-2 with {needed}"


def test_fingerprints_tell_weights_apart(tmp_path: Path) -> None:
    """Where they are does not matter; which numbers they are does."""

    def print_of(path: Path) -> str:
        given = open_pretrained(config_of(*LLAMA, f"model.weights={path}"), ALONE, ByteTokenizer())
        assert given is not None
        return given.fingerprint

    model = theirs("llama")
    for name in ("one", "again"):
        model.save_pretrained(tmp_path / name)
    with torch.no_grad():
        model.lm_head.weight.add_(1e-3)
    model.save_pretrained(tmp_path / "other")
    assert print_of(tmp_path / "one") == print_of(tmp_path / "again") != print_of(tmp_path / "other")


def test_a_run_that_goes_on_does_not_need_them(tmp_path: Path) -> None:
    config = config_of(*LLAMA, f"model.weights={tmp_path}/gone", f"run.dir={tmp_path}/run")
    saved(tmp_path / "run", config, {3: shaken(config)}, about={"identity": {"model": {"weights": "abc"}}})
    assert verify(tmp_path / "run/checkpoints/step-00000003")
    given = open_pretrained(config, ALONE, ByteTokenizer())
    assert given is not None
    assert given.fingerprint == "abc"
    with pytest.raises(ConfigError, match="no such file or folder"):
        open_pretrained(config_of(*LLAMA, f"model.weights={tmp_path}/gone", "run.fresh=true"), ALONE, ByteTokenizer())


ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.1, 2.2, 2.3],
        "original_max_position_embeddings": 16,
    },
}


def turned(kind: str, longest: int, *overrides: str) -> Any:
    """A model with so many positions, and a way to scale them."""
    config = family_of(config_of(*LLAMA, *overrides), ByteTokenizer()).config
    config.max_position_embeddings = longest
    config.rope_parameters = {"rope_theta": 10000.0, "rope_type": kind, **ROPES.get(kind, {})}
    torch.manual_seed(7)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def advised(told: str) -> list[str]:
    return [way.strip("'") for way in told.partition("this one would be it with: ")[2].split(", ") if way]


@pytest.mark.parametrize("kind", ROPES)
def test_rotations_that_are_scaled(kind: str, tmp_path: Path) -> None:
    """The longest position has to be set where it has a part in them; what is said to be set is enough."""
    turned(kind, 512).save_pretrained(tmp_path)
    ways = advised(refused(tmp_path, *LLAMA))
    assert ("model.config.max_position_embeddings=512" in ways) == (kind == "longrope")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    same(started(tmp_path, *LLAMA, *ways)[1], expected)


@pytest.mark.slow
def test_what_is_not_supported_is_said_at_once(tmp_path: Path) -> None:
    """Not behind advice that would be refused in its turn."""
    turned("dynamic", 16).save_pretrained(tmp_path / "short")
    told = refused(tmp_path / "short", *LLAMA)
    assert "is of a model that is not supported: model.config: its 16 positions are fewer than data.seq" in told
    assert advised(told) == []
    window, mistral = "model.config.sliding_window", (*LLAMA, "model.architecture=MistralForCausalLM")
    model = turned("default", 512, *mistral[4:])
    model.config.sliding_window = 16
    model.save_pretrained(tmp_path / "windows")
    told = refused(tmp_path / "windows", *mistral)
    assert f"{window}=16: windows shorter than data.sequence_length=24 are not supported; nearest: data.seq" in told
    assert advised(told) == []
    (problem,) = problems(*mistral, f"{window}=16", "data.sequence_length=24")
    assert problem in told
    assert f"{window}=32" in advised(refused_with(tmp_path / "windows", 32, *mistral))


def refused_with(folder: Path, window: int, *overrides: str) -> str:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "sliding_window": window}))
    return refused(folder, *overrides)


def test_a_config_that_cannot_be_read_is_no_config_that_is_not_there(tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("config.json")
    assert "config.json" in refused(tmp_path, *LLAMA)


def test_a_head_is_the_embedding_only_if_all_of_it_is(tmp_path: Path) -> None:
    theirs("llama tied").save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["lm_head.weight"][-1, -1] += 1
    safetensors.torch.save_file(weights, tmp_path / "other.safetensors")
    assert "no place in this model: lm_head.weight" in refused(tmp_path / "other.safetensors", *MODELS["llama tied"])
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].bfloat16()
    safetensors.torch.save_file(weights, tmp_path / "other.safetensors")
    assert "no place in this model: lm_head.weight" in refused(tmp_path / "other.safetensors", *MODELS["llama tied"])


def test_a_head_that_is_lost(tmp_path: Path) -> None:
    """The embedding does not stand for it where its config.json says that they are two."""
    theirs("llama").save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    for name in ("llama", "llama tied"):
        told = refused(tmp_path, *MODELS[name])
        assert told == "its config.json says tie_word_embeddings=false, but its head is lost: lm_head.weight"
