"""Models of transformers: they compute what transformers does, in parts that can be cut; wrong configs are refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tests.config.test_config import problems
from trainer.config import schema
from trainer.config.compose import load
from trainer.errors import ConfigError
from trainer.facts import Facts
from trainer.models import ModelFactory, huggingface
from trainer.models.attention import Spec
from trainer.optim.groups import kind, names
from trainer.patches import without_values
from trainer.strategies.fsdp import materialize

transformers = pytest.importorskip("transformers")

LENGTH, VOCABULARY = 16, 50
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 3, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
# Those of the option `llama`, and one as a user's own subclass of the adapter may have it.
OTHERS = ["MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "OlmoForCausalLM"]
TIES = [("LlamaForCausalLM", False), ("LlamaForCausalLM", True), ("GPT2LMHeadModel", True), ("GPT2LMHeadModel", False)]


def factory(architecture: str, tokens: int = VOCABULARY, **config: Any) -> ModelFactory:
    if architecture == "GPT2LMHeadModel":
        gpt2 = schema.GPT2(name="gpt2", architecture=architecture, config=GPT2 | config)
        return ModelFactory(lambda: huggingface.GPT2(gpt2, Facts(tokens, LENGTH, steps=1)), seed=3)
    llama = schema.HuggingFace(name="own.package:OfLlamasLayout", architecture=architecture, config=LLAMA | config)
    return ModelFactory(lambda: huggingface.Llama(llama, Facts(tokens, LENGTH, steps=1)), seed=3)


def shaken(architecture: str, **config: Any) -> Any:
    """A model whose biases and norms count."""
    model = factory(architecture, **config)()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return model


@pytest.mark.parametrize(("architecture", "tied"), [*TIES, *((name, False) for name in OTHERS)])
def test_it_computes_what_transformers_does(architecture: str, tied: bool) -> None:
    model = shaken(architecture, tie_word_embeddings=tied)
    theirs = getattr(transformers, architecture)(model.config)
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)  # the same names
    assert not unexpected
    assert missing == (["lm_head.weight"] if tied else [])
    inputs = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model({"inputs": inputs}), theirs(inputs).logits, rtol=1e-6, atol=1e-6)
    documents, positions = torch.tensor([[0] * 6 + [1] * 10] * 2), torch.tensor([[*range(6), *range(10)]] * 2)
    packed = model({"inputs": inputs, "documents": documents, "positions": positions})
    expected = theirs(
        inputs, attention_mask=Spec(documents=documents).allowed(LENGTH, documents.device), position_ids=positions
    ).logits
    torch.testing.assert_close(packed, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(packed[:, 6:], model({"inputs": inputs[:, 6:]}), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("architecture", "tied"), TIES)
def test_it_can_be_cut(architecture: str, tied: bool) -> None:
    """Each part uses no module but its own."""
    model, batch = shaken(architecture, tie_word_embeddings=tied), {"inputs": torch.arange(LENGTH)[None]}
    whole = model(batch)
    ends = {name: model.get_submodule(name) for name in (*model.embedding_parts, *model.head_parts)}

    def keep(*needed: str) -> None:
        for name, module in ends.items():
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, module if name in needed else torch.nn.Identity())

    keep(*model.embedding_parts)
    x = model.embed(batch)
    keep()
    for block in model.blocks:
        x = model.run([block], x, batch)
    keep(*model.head_parts)
    assert torch.equal(model.project(x, batch), whole)


@pytest.mark.parametrize(("architecture", "tied"), TIES)
def test_made_without_values_it_is_the_same(architecture: str, tied: bool) -> None:
    make = factory(architecture, tie_word_embeddings=tied)
    with without_values():
        model = make.build()
    assert all(parameter.is_meta for parameter in model.parameters())
    materialize(model, torch.device("cpu"), torch.device("cpu"))
    make.fill(model)
    expected, batch = make(), {"inputs": torch.arange(LENGTH)[None]}
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(model(batch), expected(batch))  # buffers that are not saved have their values, too


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_initial_values_are_those_of_transformers(architecture: str) -> None:
    """The same mean and deviation of every parameter that is large enough to tell."""
    wide = {"hidden_size": 128, "intermediate_size": 256} if architecture == "LlamaForCausalLM" else {"n_embd": 128}
    ours = factory(architecture, tokens=400, **wide)()
    torch.manual_seed(0)
    theirs = dict(getattr(transformers, architecture)(ours.config).named_parameters())
    for name, parameter in ours.named_parameters():
        deviation, by_chance = theirs[name].std().item(), 5 * parameter.numel() ** -0.5
        assert parameter.std().item() == pytest.approx(deviation, rel=by_chance), name
        mean = theirs[name].mean().item()
        assert parameter.mean().item() == pytest.approx(mean, abs=by_chance * deviation * 2**0.5), name


def test_what_its_parameters_are() -> None:
    model = factory("LlamaForCausalLM")()
    kinds = {name: kind(model, name) for name in names(model)}
    assert {kinds.pop(f"model.layers.{layer}.input_layernorm.weight") for layer in range(3)} == {"norm"}
    assert kinds["model.embed_tokens.weight"] == "embedding"
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == kinds["lm_head.weight"] == "matrix"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.config.hiden_size=8",), "hiden_size: no such key; did you mean 'model.config.hidden_size'?"),
        (("model.config.hidden_size=wide",), "model.config: TypeError: Field 'hidden_size' expected int, got str"),
        (("model.config.num_attention_heads=3",), "The hidden size (128) is not a multiple"),
        (("model.config.num_attention_heads=4", "model.config.num_key_value_heads=3"), "num_key_value_heads=3: does"),
        (("model.config.max_position_embeddings=8",), "its 8 positions are fewer than data.sequence_length="),
        (("model.architecture=BertModel",), "model.architecture=BertModel: should be 'LlamaForCausalLM',"),
        (("model.architecture=MistralForCausalLM", "model.config.sliding_window=8"), "sliding_window=8: windows sh"),
        (("strategy=fsdp", "strategy.tensor_parallel=4"), "its 2 heads of keys do not divide by strategy.tens"),
        (("model=gpt2", "model.config.hidden_size=64"), "is another name of model.config.n_embd; give one of the two"),
        (("model=gpt2", "model.config.n_head=3"), "its width 128 does not divide by its 3 attention heads"),
        (("model=gpt2", "model.config.add_cross_attention=true"), "model.config.add_cross_attention: no such key"),
    ],
)  # fmt: skip
def test_refused(overrides: tuple[str, ...], message: str) -> None:
    found = problems("model=llama", *overrides) if "model=gpt2" not in overrides else problems(*overrides)
    assert any(message in problem for problem in found), found


def test_the_vocabulary_is_that_of_the_tokenizer_unless_it_is_larger() -> None:
    assert factory("LlamaForCausalLM")().lm_head.out_features == VOCABULARY
    assert factory("LlamaForCausalLM", vocab_size=64)().lm_head.out_features == 64
    with pytest.raises(ConfigError, match=r"model\.config\.vocab_size=40: fewer than the 50 tokens of data\.tokenizer"):
        factory("LlamaForCausalLM", vocab_size=40)()


def test_an_architecture_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"model\.architecture=LamaForCausalLM: no such class in transformers"):
        factory("LamaForCausalLM")()


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (problem,) = problems("model=llama")
    expected = "needs the package transformers: pip install 'onecurve[transformers]'"
    assert problem == f"model.architecture=LlamaForCausalLM: {expected}"
    load([])  # nothing else needs it
