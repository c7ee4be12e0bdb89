"""Transforms: what they change, what they own, what a plain model has instead; LoRA against plain torch in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import test_huggingface
from tests.strategies import ragged
from tests.transforms import users
from trainer.config import Config, schema
from trainer.config.compose import load
from trainer.data.tokenizer import ByteTokenizer
from trainer.errors import ConfigError
from trainer.models import ModelFactory, cast_parameters
from trainer.models.factory import check_transforms, model_factory, not_saved
from trainer.models.gpt import GPT
from trainer.precision import Precision
from trainer.strategies.arithmetic import StepOptions
from trainer.strategies.single import Single
from trainer.topology import ALONE
from trainer.transforms import apply, undo_transforms
from trainer.transforms.build import build_transforms
from trainer.transforms.lora import LoRA

GPT_SHAPE = ("model=gpt", "model.layers=2", "model.width=32", "model.heads=2")
INPUTS = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(1))


def config_of(*overrides: str) -> Config:
    return load([*overrides, "data.tokenizer=bytes", "data.sequence_length=16"])


def trained(config: Config) -> set[str]:
    return {name for name, value in model_factory(config, ByteTokenizer())().named_parameters() if value.requires_grad}


def problems(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        model_factory(config_of(*overrides), ByteTokenizer())()
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("modules", "but", "expected"),
    [
        ("[blocks, token_embedding]", "[]", {"norm.weight"}),
        ("['*']", "[blocks.1.mlp, norm.weight]", {
            "blocks.1.mlp.input.weight", "blocks.1.mlp.output.weight", "norm.weight",
        }),
        ("['blocks.?.mlp*', attention_norm, attention, token_embedding.weight]", "[]", {"norm.weight"}),
    ],
)  # fmt: skip
def test_freeze_takes_names_of_modules_and_parameters(modules: str, but: str, expected: set[str]) -> None:
    freeze = (f"model.transforms.freeze.modules={modules}", f"model.transforms.freeze.but={but}")
    assert trained(config_of(*GPT_SHAPE, *freeze)) == expected


def test_what_matches_nothing_is_refused() -> None:
    said = problems(*GPT_SHAPE, "model.transforms.freeze.modules=[tokn_embedding]", "model.transforms.freeze.but=[nrm]")
    assert (
        "model.transforms.freeze.modules: 'tokn_embedding' is not a part of the model; did you mean 'token_em" in said
    )
    said = problems(*GPT_SHAPE, "model.transforms.lora.modules=[attention.outputs]")
    assert "model.transforms.lora.modules: 'attention.outputs' is not a part of the model; did you mean" in said
    assert "all of its parameters are frozen" in problems(*GPT_SHAPE, "model.transforms.freeze.modules=['*']")


def test_one_lora_a_model() -> None:
    again = "model.transforms.again={name: lora, modules: [attention.output]}"
    said = problems(*GPT_SHAPE, "model.transforms.lora.modules=[mlp.input]", again)
    assert said.startswith("model.transforms.again: model.transforms.lora is a lora already")


def test_an_earlier_freeze_says_what_is_trained_besides_adapters() -> None:
    lora = "lora: {modules: [mlp.input]}"
    but = f"model.transforms={{freeze: {{modules: ['*'], but: [norm, blocks.0.attention_norm]}}, {lora}}}"
    adapters = {f"blocks.{layer}.mlp.input.lora_{leaf}" for layer in range(2) for leaf in "ab"}
    assert trained(config_of(*GPT_SHAPE, but)) == adapters | {"norm.weight", "blocks.0.attention_norm.weight"}
    assert trained(config_of(*GPT_SHAPE, f"model.transforms={{{lora}}}")) == adapters
    after = f"model.transforms={{{lora}, freeze: {{modules: [blocks.0]}}}}"
    assert trained(config_of(*GPT_SHAPE, after)) == {name for name in adapters if ".1." in name}
    said = problems(*GPT_SHAPE, f"model.transforms={{mine: {{name: freeze, modules: [blocks.0]}}, {lora}}}")
    assert said.startswith("model.transforms.lora.modules: blocks.1.mlp.input would be adapted, but an earlier")


def test_messages_have_the_section_and_few_names() -> None:
    said = problems(*GPT_SHAPE, "model.transforms.mine={name: freeze, modules: [xyzzy]}")
    assert said.startswith("model.transforms.mine.modules: 'xyzzy' is not a part of the model; there are: ")
    assert said.count(",") == 4


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 8)


def test_layers_that_torch_does_not_call_are_refused() -> None:
    (everywhere,) = build_transforms(config_of("model.transforms.lora={}"))
    with pytest.raises(ConfigError, match=r"linear1, layer.linear2, layer.self_attn.out_proj cannot be adapted"):
        apply([everywhere], Encoder())
    (named,) = build_transforms(config_of("model.transforms.lora.modules=[head]"))
    apply([named], model := Encoder())
    assert hasattr(model.head, "lora_a")


class Shared(nn.Module):
    """A layer under two names, and an embedding that is a head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.table.weight
        self.first = nn.Linear(4, 4)
        self.second = self.first


def test_a_layer_under_two_names_is_merged_under_both() -> None:
    (lora,) = build_transforms(config_of("model.transforms.lora={rank: 2, modules: [second]}"))
    apply([lora], model := Shared())
    with torch.no_grad():
        for parameter in (model.first.lora_a, model.first.lora_b):
            parameter.fill_(1.0)
    values = {name: value.detach() for name, value in model.named_parameters(remove_duplicate=False)}
    merged = [undo_transforms([lora], f"{name}.weight", values.__getitem__) for name in ("first", "second")]
    assert all(torch.equal(value, values["first.weight"] + 2) for value in merged)  # type: ignore[arg-type]
    assert torch.equal(undo_transforms([lora], "head.weight", values.__getitem__), values["table.weight"])  # type: ignore[arg-type]


def test_an_adapted_head_that_is_the_embedding_has_no_plain_model() -> None:
    (lora,) = build_transforms(config_of("model.transforms.lora={rank: 2, modules: [head]}"))
    apply([lora], model := Shared())
    values = dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(ConfigError, match=r"head.weight is also the weight of table.weight, which has no adapters"):
        undo_transforms([lora], "head.weight", values.__getitem__)


def test_but_sees_all_names_of_a_tied_parameter() -> None:
    (freeze,) = build_transforms(config_of("model.transforms.freeze={modules: ['*'], but: [head]}"))
    apply([freeze], model := Shared())
    assert model.table.weight.requires_grad
    assert not model.first.weight.requires_grad


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.transforms.lra={}"], "model.transforms.lra: no such transform; did you mean 'lora'?"),
        (["model.transforms.lora.rnk=2"], "model.transforms.lora.rnk: no such key; did you mean 'model.transforms.lo"),
        (["model.transforms.lora.rank=0"], "model.transforms.lora.rank=0: should be greater than or equal to 1"),
        (["model.transforms.freeze={}"], "model.transforms.freeze.modules: missing"),
        (["model.transforms=[{rank: 2}]"], "in a list each transform should have a `name` of its own"),
        (["model.transforms.lora=8"], "model.transforms.lora=8: should be a section"),
        (["model.transforms.mine.name=tests.transforms.users:Scales"], "package 'tests' is not allowed"),
        (
            ["run.plugins=[tests]", "model.transforms.mine={name: 'tests.transforms.users:Scaled'}"],
            "needs a class attribute `Config`",
        ),
    ],
)
def test_wrong_sections_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(*overrides)
    assert said in "\n".join(caught.value.problems)


def test_a_list_is_a_mapping() -> None:
    one = config_of("model.transforms=[{name: freeze, modules: [norm]}, {name: lora, rank: 2}]")
    other = config_of("model.transforms.freeze.modules=[norm]", "model.transforms.lora.rank=2")
    assert one.model == other.model
    assert list(one.resolved()["model"]["transforms"]) == ["freeze", "lora"]


def double(kind: str) -> ModelFactory:
    if kind != "gpt":
        plain = test_huggingface.factory({"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[kind], tokens=257)
    else:
        shape = config_of(*GPT_SHAPE).model
        plain = ModelFactory(lambda: GPT(shape, ragged.FACTS), seed=3)
    return ModelFactory(lambda: cast_parameters(plain.build(), torch.float64), seed=3)


@pytest.mark.parametrize("kind", ["gpt", "llama", "gpt2"])
def test_a_merged_model_computes_the_same(kind: str) -> None:
    """Of every built-in model, with layers whose weights are transposed; the names of its parameters are as before."""
    plain, changes = (
        double(kind)(),
        build_transforms(config_of("model.transforms.lora.rank=4", "model.transforms.lora.alpha=6")),
    )
    model = double(kind)()
    apply(changes, model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert changes[0].initialise(name, parameter, generator)
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    values = {name: value.detach() for name, value in model.named_parameters()}
    merged = {name: undo_transforms(changes, name, lambda name: values[name]) for name in values}
    batch = {"inputs": INPUTS % 50 if kind == "gpt" else INPUTS}
    before = plain(batch)
    missing = plain.load_state_dict({name: value for name, value in merged.items() if value is not None}, strict=False)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    torch.testing.assert_close(plain(batch), model(batch), rtol=1e-12, atol=1e-12)
    assert (before - plain(batch)).abs().max() > 1e-3


class Reference(nn.Module):
    """An adapted layer as one would write it: another module beside the frozen one."""

    def __init__(self, base: nn.Module, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.a = nn.Parameter(torch.zeros(rank, base.in_features, dtype=torch.float64))  # type: ignore[arg-type]
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float64))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.a.T) @ self.b.T * self.scale


def test_lora_is_what_plain_torch_computes() -> None:
    """Losses, gradient norms and weights in fp64; in four micro-batches here, in one batch there."""
    (lora,) = build_transforms(
        config_of("model.transforms.lora={rank: 3, alpha: 5, modules: [attention.output, mlp.input]}")
    )
    assert isinstance(lora, LoRA)

    def build() -> nn.Module:
        model = cast_parameters(GPT(ragged.SHAPE, ragged.FACTS), torch.float64)
        apply([lora], model)
        return model

    factory = ModelFactory(build, seed=5, initializers=[lora.initialise])
    options = StepOptions(clip_norm=0.0, activation_checkpointing="none", compile=False, micro_batch=2)
    made = Single(schema.Single(name="single"), ALONE, Precision(ALONE.device), ragged.Objective(), options)
    made.setup(factory, ragged.optimizer)
    start = dict(factory().named_parameters())
    model: nn.Module = ragged.model(torch.float64).requires_grad_(False)
    layers = {}
    for number, block in enumerate(model.blocks):  # type: ignore[arg-type, union-attr]
        for path in ("attention.output", "mlp.input"):
            parent, _, leaf = path.partition(".")
            name = f"blocks.{number}.{path}"
            layers[name] = Reference(block.get_submodule(path), 3, 5 / 3)
            layers[name].a.data.copy_(start[f"{name}.lora_a"])
            setattr(block.get_submodule(parent), leaf, layers[name])
            assert layers[name].a.abs().max() > 0.01
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=ragged.LR, betas=made.optimizer.defaults["betas"], eps=made.optimizer.defaults["eps"],
        weight_decay=made.optimizer.param_groups[0]["weight_decay"],
    )  # fmt: skip
    for step in range(4):
        whole = ragged.batch(step)
        batches = [{key: value[i : i + 2] for key, value in whole.items()} for i in range(0, 8, 2)]
        sums = made.train_step(batches)
        loss = F.cross_entropy(model(whole).flatten(0, 1), whole["targets"].flatten(), ignore_index=-100)
        loss.backward()
        assert (sums["loss"] / sums["num_targets"]).item() == pytest.approx(loss.item(), rel=1e-6)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        assert made.update(ragged.LR).grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        optimizer.step()
        optimizer.zero_grad()
    ours = dict(made.model.named_parameters())
    for name, layer in layers.items():
        torch.testing.assert_close(ours[f"{name}.lora_a"], layer.a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours[f"{name}.lora_b"], layer.b, rtol=1e-9, atol=1e-12)
        assert layer.b.abs().max() > 1e-3
    frozen = {name for name, value in ours.items() if "lora" not in name}
    assert all(torch.equal(ours[name], start[name]) for name in frozen)
    assert {path.split("/", 2)[2] for path in made.state() if path.startswith("optimizer/")} == ours.keys() - frozen


def test_fingerprints_are_of_what_a_checkpoint_leaves_out_too() -> None:
    model = GPT(ragged.SHAPE, ragged.FACTS)
    model.not_saved = frozenset({"norm.weight"})  # type: ignore[assignment]
    options = StepOptions(clip_norm=0.0, activation_checkpointing="none", compile=False, micro_batch=2)
    made = Single(schema.Single(name="single"), ALONE, Precision(ALONE.device), ragged.Objective(), options)
    made.setup(ModelFactory(lambda: model, seed=5), ragged.optimizer)
    assert made.state(everything=True).keys() - made.state().keys() == {"model/norm.weight"}


def test_a_checkpoint_gives_all_but_what_is_frozen_of_given_weights() -> None:
    gpt2 = ("model.positions=learned", "model.activation=gelu", "model.bias=true")
    lora = (*GPT_SHAPE, *gpt2, "model.transforms.lora.rank=2")
    assert not not_saved(config_of(*lora), ByteTokenizer())  # drawn numbers differ between processors
    config = config_of(*lora, "model.weights=weights")
    drawn = dict(model_factory(config, ByteTokenizer())().named_parameters())
    loaded = dict(model_factory(config, ByteTokenizer(), loaded=True)().named_parameters())
    frozen = not_saved(config, ByteTokenizer())
    assert frozen == {name for name in drawn if "lora" not in name}
    for name, value in loaded.items():
        assert torch.equal(value, drawn[name]) if name in frozen else value.isnan().all()


def test_a_users_own() -> None:
    key = f"model.transforms.mine={{name: '{users.__name__}:Scales', start: 2}}"
    config = config_of(*GPT_SHAPE, "model.bias=true", "run.plugins=[tests]", key, "model.transforms.lora.rank=2")
    changes, model = build_transforms(config), model_factory(config, ByteTokenizer())()
    values = dict(model.named_parameters())
    assert values["norm.scale"].eq(2).all()
    plain = GPT(config.model, ragged.FACTS)
    apply(changes, plain)
    assert undo_transforms(changes, "norm.scale", lambda name: values[name]) is None
    assert torch.equal(undo_transforms(changes, "norm.weight", lambda name: values[name]), 2 * values["norm.weight"])  # type: ignore[arg-type]
    assert "norm.scale" not in not_saved(config, ByteTokenizer())


def test_lora_on_layers_that_compute_in_fp8() -> None:
    """The frozen products are those of fp8, what is added is not."""
    pytest.importorskip("torchao")
    from trainer.config.transforms import FP8 as Emulated
    from trainer.transforms.fp8 import FP8

    fp8, (lora,) = FP8(Emulated(name="fp8", emulate=True)), build_transforms(config_of("model.transforms.lora.rank=2"))
    plain, adapted = (GPT(ragged.SHAPE.model_copy(update={"width": 32}), ragged.FACTS) for _ in range(2))
    adapted.load_state_dict(plain.state_dict())
    apply([fp8], plain)
    apply([fp8, lora], adapted)
    alone, layer = (model.blocks[0].attention.output for model in (plain, adapted))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in (layer.lora_a, layer.lora_b):
            value.normal_(generator=generator)
    x = torch.randn(4, 32, generator=generator)
    added = x @ layer.lora_a.T @ layer.lora_b.T
    torch.testing.assert_close(layer(x), alone(x) + added)
    assert not torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias) + added, rtol=1e-3, atol=1e-3)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.lora_b.grad.abs().max() > 0


def test_a_model_that_looks_at_the_data_is_made_with_it_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "looks.yaml").write_text(f"name: {users.__name__}:Looks\n")
    freeze = "model.transforms.freeze.modules=[bias]"
    sections = ["model=looks", "run.plugins=[tests]", "data.tokenizer=bytes", "data.sequence_length=16", freeze]
    config = load(sections, config_dir=str(tmp_path))
    check_transforms(config, ByteTokenizer())
    assert not_saved(config, ByteTokenizer()) == frozenset()
    model = model_factory(config, ByteTokenizer(), lambda: {"inputs": torch.zeros(1, 3)}).build()
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {"weight"}


def test_transforms_of_other_trained_models_are_checked_before_the_run_has_a_folder() -> None:
    critic = "models.trained.critic={model: {transforms: {freeze: {modules: [nrm]}}}}"
    with pytest.raises(ConfigError) as caught:
        check_transforms(config_of(*GPT_SHAPE, critic), ByteTokenizer())
    assert str(caught.value).startswith("models.trained.critic.model.transforms.freeze.modules: 'nrm' is not a part")


def test_a_tied_parameter_has_one_initial_value_by_whatever_name() -> None:
    read = []

    def fill(name: str, value: Tensor) -> None:
        read.append(name)
        value.fill_(1.0)

    factory = ModelFactory(Shared, seed=3, pretrained=fill)
    assert factory.value(Shared(), "head.weight").eq(1).all()
    assert read == ["table.weight"]
