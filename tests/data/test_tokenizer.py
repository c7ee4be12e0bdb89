"""Tokenizers: lossless, measured in bytes and characters, deterministic, deaf to spelt-out special tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from trainer.data import tokenizer as tokenization
from trainer.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load, train_bpe, train_chars
from trainer.errors import ConfigError

TEXTS = [
    "To be, or not to be, that is the question:\n" * 3,
    "naïve café — 漢字 😀\r\n\ttab",
    "the the then them\n\n",
]
BPE = JsonTokenizer(train_bpe(TEXTS, 300).to_str())
CHARS = JsonTokenizer(train_chars(TEXTS).to_str())
BYTES = ByteTokenizer()
SPELT = "a<|endoftext|>b</s>"


def check_measures(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_chars[ids].sum() == len(text)
    assert tokenizer.separator not in ids


@pytest.mark.parametrize("tokenizer", [BPE, BYTES])
@given(st.text() | st.sampled_from([*TEXTS, SPELT, ""]))
@settings(deadline=None, max_examples=150)
def test_any_text_round_trips_and_is_measured(tokenizer: Tokenizer, text: str) -> None:
    check_measures(tokenizer, text)


@pytest.mark.parametrize("text", [*TEXTS, "", "question", "漢😀"])
def test_characters_round_trip(text: str) -> None:
    check_measures(CHARS, text)
    assert len(CHARS.encode(text)) == len(text)


def test_unknown_characters_become_one_token_each() -> None:
    assert CHARS.decode(CHARS.encode("tßβ字")) == "t\ufffd\ufffd字"
    assert CHARS.vocab_size == 2 + len(set("".join(TEXTS)))
    assert (CHARS.token_bytes[CHARS.separator], CHARS.token_chars[CHARS.separator]) == (0, 0)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES, CHARS])
def test_vocabulary_and_separator(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes.shape == tokenizer.token_chars.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes.dtype == tokenizer.token_chars.dtype == np.int32
    assert 0 <= tokenizer.separator < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.separator, *tokenizer.encode("to"), tokenizer.separator]) == "to"
    assert (tokenizer.token_bytes == 0).sum() == 1


def test_byte_alphabet_is_the_librarys() -> None:
    assert sorted(tokenization._BYTE_OF) == sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = BPE.encode(bytes(range(128)).decode())
    assert ids.max() < BPE.vocab_size


def test_bpe_vocabulary_has_the_size_asked_for() -> None:
    assert BPE.vocab_size == 300
    assert BPE.separator == 0
    with pytest.raises(ConfigError, match="at least 257"):
        train_bpe(TEXTS, 256)


def test_training_is_the_same_in_every_process() -> None:
    code = (
        "import sys, json; from trainer.data.tokenizer import train_bpe; "
        "sys.stdout.write(train_bpe(json.load(sys.stdin), 600).to_str())"
    )
    text = Path(tokenization.__file__).read_text()
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], input=json.dumps([text]), capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1] == train_bpe([text], 600).to_str()


def test_forking_after_training_neither_warns_nor_hangs() -> None:
    code = """
import os
from trainer.data.tokenizer import JsonTokenizer, train_bpe
assert "TOKENIZERS_PARALLELISM" not in os.environ
tokenizer = JsonTokenizer(train_bpe(["some text " * 1000] * 100, 300).to_str())
assert "TOKENIZERS_PARALLELISM" not in os.environ
tokenizer.encode("in the parent")
child = os.fork()
if child == 0:
    os._exit(0 if tokenizer.decode(tokenizer.encode("in the child")) == "in the child" else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    clean = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""


def test_load(tmp_path: Path) -> None:
    assert load("bytes").vocab_size == 257
    path = tmp_path / "tokenizer.json"
    path.write_text(train_bpe(TEXTS, 300).to_str(pretty=True))
    for spec in (str(path), str(tmp_path)):
        assert load(spec).fingerprint == BPE.fingerprint  # whatever the layout of the file
        assert load(spec).content == (tmp_path / "tokenizer.json").read_text()
    assert BYTES.content is None
    assert len({BPE.fingerprint, CHARS.fingerprint, BYTES.fingerprint}) == 3


def test_padding_truncation_and_template_are_off(tmp_path: Path) -> None:
    trained = train_bpe(TEXTS, 300)
    trained.enable_truncation(4)
    trained.enable_padding(length=64)
    trained.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    padded = JsonTokenizer(trained.to_str())
    assert padded.encode(TEXTS[0]).tolist() == BPE.encode(TEXTS[0]).tolist()


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": 7}'])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*tokenizer\.json is not a tokenizer\.json"):
        load(str(path))


def test_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: No such file.*give 'bytes' or a tokenizer\.json"):
        load(str(tmp_path / "nowhere"))
    for trained in ("bpe:1024", "chars"):
        with pytest.raises(ConfigError, match=f"{trained}: No such file.*are made by `onecurve data pack`"):
            load(trained)
    (tmp_path / "spm.model").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(str(tmp_path / "spm.model"))


def test_separator_is_found_or_missed() -> None:
    def words(*tokens: str) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="a"))

    assert JsonTokenizer(words("a", "<eos>", "</s>").to_str()).separator == 2
    with pytest.raises(ConfigError, match="has no end-of-document token"):
        JsonTokenizer(words("a", "b").to_str(), "x.json")


def family(folder: Path, special: list[str], **settings: object) -> Path:
    """A byte-level BPE with special tokens as a family of models has them, with its tokenizer_config.json."""
    folder.mkdir()
    description = json.loads(train_bpe(TEXTS, 300).to_str())
    description["model"]["vocab"][special[0]] = description["model"]["vocab"].pop("<|endoftext|>")
    description["added_tokens"][0]["content"] = special[0]
    made = tokenizers.Tokenizer.from_str(json.dumps(description))
    made.add_special_tokens(special[1:])
    made.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


FAMILIES = {
    "deepseek": (["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], {}, "<｜end▁of▁sentence｜>"),
    "deepseek-told": (
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
        {"eos_token": {"__type": "AddedToken", "content": "<｜end▁of▁sentence｜>"}},
        "<｜end▁of▁sentence｜>",
    ),
    "command": (["<BOS_TOKEN>", "<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"], {}, "<EOS_TOKEN>"),
    "command-told": (
        ["<BOS_TOKEN>", "<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"],
        {"eos_token": "<|END_OF_TURN_TOKEN|>"},
        "<|END_OF_TURN_TOKEN|>",
    ),
    "bert": (["[PAD]", "[CLS]", "[SEP]"], {"sep_token": "[SEP]", "eos_token": None}, "[SEP]"),
    "chatml": (["<|im_start|>", "<|im_end|>"], {}, "<|im_end|>"),
    "two": (["</s>", "<|endoftext|>"], {"eos_token": "</s>"}, "</s>"),
    "two, as before": (["</s>", "<|endoftext|>"], {"eos_token": "not there"}, "<|endoftext|>"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_separators_of_other_families(name: str, tmp_path: Path) -> None:
    special, settings, separator = FAMILIES[name]
    folder = family(tmp_path / "it", special, **settings)
    found = load(str(folder))
    assert found.separator == load(str(folder), separator=separator).separator
    assert (
        found.separator
        == json.loads((folder / "tokenizer.json").read_text())["added_tokens"][special.index(separator)]["id"]
    )
    (tmp_path / "kept").mkdir()
    found.save(tmp_path / "kept")  # as a run keeps it
    again = load(str(tmp_path / "kept"))
    assert (again.separator, again.fingerprint) == (found.separator, found.fingerprint)
    assert found.separator not in found.encode(f"a{separator}b")


def test_the_separator_can_be_named(tmp_path: Path) -> None:
    folder = family(tmp_path / "it", ["<|bos|>", "<|assistant_end|>"])
    with pytest.raises(ConfigError) as caught:
        load(str(folder))
    assert "name another one that it has by data.separator; its special tokens: <|bos|>, <|assistant_end|>" in str(
        caught.value
    )
    with pytest.raises(
        ConfigError, match=r"data\.separator=</s>: .*tokenizer\.json has no such token; its special tokens"
    ):
        load(str(folder), separator="</s>")
    with pytest.raises(ConfigError, match=r"data\.separator=</s>: data\.tokenizer=bytes has one of its own"):
        load("bytes", separator="</s>")
    one, other = (load(str(folder), separator=token) for token in ("<|bos|>", "<|assistant_end|>"))
    assert one.separator != other.separator
    assert one.fingerprint != other.fingerprint  # tokens that end otherwise are others
    usual = family(tmp_path / "usual", ["<|endoftext|>", "<|im_end|>"], eos_token="<|endoftext|>")
    assert load(str(usual), separator="<|endoftext|>").fingerprint == load(str(usual)).fingerprint
    (usual / "tokenizer_config.json").unlink()
    assert load(str(usual), separator="<|endoftext|>").fingerprint == load(str(usual)).fingerprint


def test_special_tokens_in_texts_are_text_unless_they_are_asked_for(tmp_path: Path) -> None:
    folder = family(tmp_path / "it", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    chat = "<|im_start|>user\nhello<|im_end|>\n<|endoftext|>"
    text, tokens = load(str(folder)), load(str(folder), special_tokens=True)
    start, end, separator = (text._tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    assert not {start, end, separator} & set(text.encode(chat).tolist())
    assert text.decode(text.encode(chat)) == chat
    assert (text.count_special(chat), tokens.count_special(chat)) == (3, 0)
    found = tokens.encode(chat).tolist()
    assert (found.count(start), found.count(end), found.count(separator)) == (1, 1, 0)
    assert found[0] == start
    assert text.fingerprint != tokens.fingerprint
    assert ByteTokenizer().count_special(chat) == 0


def test_a_document_cannot_smuggle_in_a_separator() -> None:
    """Whether the file has it as a special token, as any other, or only as a word of the model."""
    description = json.loads(train_bpe(TEXTS, 300).to_str())
    (special,) = description["added_tokens"]
    vocabulary = [("<unk>", 0.0), ("</s>", -1.0), *((letter, -9.0) for letter in "ab</s>")]
    unigram = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0))
    found = [JsonTokenizer(unigram.to_str())]
    for added in ([special], [{**special, "special": False}], [{**special, "special": False, "normalized": True}], []):
        found.append(JsonTokenizer(json.dumps({**description, "added_tokens": added})))
    unigram.add_special_tokens(["</s>"])
    found.append(JsonTokenizer(unigram.to_str()))
    for tokenizer in found:
        spelt = "</s>" if tokenizer in (found[0], found[-1]) else "<|endoftext|>"
        for text in (f"a{spelt}b{spelt}{spelt}", spelt):
            ids = tokenizer.encode(text).tolist()
            assert tokenizer.separator not in ids
            assert tokenizer.decode(ids) == text or tokenizer in (found[0], found[-1])
        assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.separator]) == "a"


def test_a_token_outside_the_byte_alphabet_is_measured_as_it_is_decoded() -> None:
    description = json.loads(train_bpe(TEXTS, 300).to_str())
    description["model"]["vocab"]["日 x"] = 300
    found = JsonTokenizer(json.dumps(description))
    assert found.decode([300]) == "日 x"
    assert (found.token_bytes[300], found.token_chars[300]) == (5, 3)


def test_training_on_characters_takes_no_memory_for_each_text() -> None:
    texts = (chr(97 + i % 26) * 100 + "abcdefghijklmnopqrstuvwxyz" for i in range(20_000))
    tracemalloc.start()
    try:
        train_chars(texts)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_wordpiece_is_measured_in_context() -> None:
    vocabulary = ["[UNK]", "</s>", "a", "play", "##ing", "fields"]
    pieces = tokenizers.Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="[UNK]"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    found = JsonTokenizer(pieces.to_str())
    assert found.decode(found.encode("playing fields")) == "playing fields"
    assert found.token_bytes[3:].tolist() == [len(" play"), len("ing"), len(" fields")]


def test_sentencepiece_style_with_byte_fallback() -> None:
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "n", "a", "▁a"]
    bpe = models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    pieces = tokenizers.Tokenizer(bpe)
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    found = JsonTokenizer(pieces.to_str())
    ids = found.encode("an é a")
    assert found.decode(ids) == "an é a"
    assert found.token_bytes[ids].sum() == len(" an é a".encode())  # the space that the tokenizer puts in front
    assert found.token_chars[ids].sum() == len(" an é a")
    assert found.token_bytes[tokens.index("▁the")] == 4
