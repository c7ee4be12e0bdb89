"""An independent check of model, objective, optimizer and loop: transformers' GPT-2 with the same weights."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import nn

from tests.runs import Run
from trainer.config.schema import GPT as GPTConfig
from trainer.facts import Facts
from trainer.models import initialise
from trainer.models.family import gpt2_name, to_gpt2
from trainer.models.gpt import GPT
from trainer.sampling import load_run

transformers = pytest.importorskip("transformers")


def gpt2_of(model: GPT, vocab_size: int) -> nn.Module:
    """transformers' GPT-2 in the shape, and with the weights, of our model with learned positions and biases."""
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_positions=model.sequence_length,
        n_embd=model.config.width,
        n_layer=model.config.layers,
        n_head=model.config.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    theirs = transformers.GPT2LMHeadModel(config)
    weights = {gpt2_name(name): to_gpt2(name, value, model.config.heads) for name, value in model.state_dict().items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.endswith("attn.bias")]
    return theirs


def test_same_logits() -> None:
    gpt2 = {"positions": "learned", "activation": "gelu", "bias": True, "fused_norm": False}
    config = GPTConfig(name="gpt", layers=3, width=48, heads=4, dropout=0.0, **gpt2)
    model = GPT(config, Facts(100, 32, steps=1))
    initialise(model, seed=3)
    with torch.no_grad():  # biases are 0 at the start: make them count
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    inputs = torch.randint(0, 100, (4, 32), generator=torch.Generator().manual_seed(1))
    theirs = gpt2_of(model, 100).eval()
    torch.testing.assert_close(model({"inputs": inputs}), theirs(inputs).logits, rtol=1e-5, atol=1e-5)


def test_same_loss_curve(tmp_path) -> None:
    """20 steps of the product on 2 processes, against plain torch AdamW on GPT-2 with the ledger's batches."""
    steps, lr, batch, length = 20, 0.003, 24, 48
    gpt2 = ("model.positions=learned", "model.activation=gelu", "model.bias=true")
    plain = ("train.clip_norm=0", "optimizer.no_decay=[]", "schedule.warmup_steps=0", "schedule.min_ratio=1")
    size = (f"train.steps={steps}", "train.micro_batch=6", f"optimizer.lr={lr}")
    run = Run(tmp_path / "run", 2, (*gpt2, *plain, *size))
    run.train()

    config, model, tokenizer = load_run(run.folder)
    initialise(model, config.run.seed)
    theirs = gpt2_of(model, tokenizer.vocab_size).train()
    optimizer = torch.optim.AdamW(
        theirs.parameters(), lr=lr, betas=config.optimizer.betas, eps=config.optimizer.eps, weight_decay=0.1
    )
    documents = shakespeare_documents(run)
    line = [token for tokens in documents.values() for token in tokens]
    starts = dict(zip(documents, accumulate(map(len, documents.values()), initial=0), strict=False))
    for ledger, row in zip(run.ledger(), run.metrics(), strict=True):
        inputs, targets = [], []
        for pieces in ledger["samples"]:
            tokens = [token for shard, key, first, end in pieces for token in documents[shard, key][first:end]]
            start = starts[tuple(pieces[0][:2])] + pieces[0][2]
            following = line[start + 1 : start + length + 1]  # one document after the other, in stored order
            inputs.append(tokens + [0] * (length - len(tokens)))
            targets.append(following + [-100] * (length - len(following)))
        inputs, targets = torch.tensor(inputs), torch.tensor(targets)
        loss = nn.functional.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in theirs.parameters()])
        optimizer.step()
        assert loss.item() == pytest.approx(row["loss"], rel=2e-5)
        assert norm.item() == pytest.approx(row["grad_norm"], rel=2e-4)
    assert inputs.shape == (batch, length)


def shakespeare_documents(run: Run) -> dict[tuple[str, str], list[int]]:
    """Bytes and separator of every sample, read with Python's own tarfile."""
    import os
    import tarfile
    from pathlib import Path

    documents = {}
    for shard in sorted(Path(os.environ["ONECURVE_CACHE"]).glob("shakespeare-*-bytes/train-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                content = tar.extractfile(member)
                if content is not None and member.name.endswith(".txt"):
                    documents[shard.name, member.name.removesuffix(".txt")] = [*content.read(), 256]
    return documents
