"""Tokenizers, text to token ids and back: raw bytes, or any Hugging Face `tokenizer.json`; and training small ones."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from trainer.errors import ConfigError
from trainer.files import read_file, replace_file, with_file

SEPARATOR = "<|endoftext|>"
# The default separator is the first of these that a tokenizer has. New ones go at the end.
_SEPARATORS = (
    SEPARATOR, "</s>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<EOS_TOKEN>", "[EOS]", "<|im_end|>",
    "[SEP]",
)  # fmt: skip
_SETTINGS = "tokenizer_config.json"  # of transformers, beside a tokenizer.json
_MAX_NAMED = 8  # special tokens that a message lists
_UNKNOWN = "\ufffd"  # a character tokenizer's token for unknown characters

Ids = npt.NDArray[np.int32]


class Tokenizer(ABC):
    """Converts text to ids and back.

    `vocab_size`: ids are below it. `separator`: the id that ends a document. `token_bytes`, `token_chars`:
    int32 [vocab_size], UTF-8 bytes that a token stands for, and characters that start in it; 0 for special
    tokens. `fingerprint`: sha256 of all that defines the tokenizer. `content`: the text of the tokenizer.json that
    it was made from, to keep beside what was trained with it (`save`); None for bytes. `settings`: what must be kept of
    its tokenizer_config.json; {} for most.
    """

    vocab_size: int
    separator: int
    token_bytes: Ids
    token_chars: Ids
    fingerprint: str
    content: str | None
    settings: dict[str, str]

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Returns the ids of `text`, int32 [n], without separator: a document cannot smuggle one in. Other special
        tokens spelled out in it are ordinary text, too, unless the tokenizer was made with `special_tokens`."""

    def count_special(self, text: str) -> int:
        """Returns how many special tokens are spelled out in `text` and taken for ordinary text."""
        return 0

    def save(self, folder: Path) -> None:
        """Writes the files from which `load` makes the same tokenizer, if any."""
        if self.settings:  # first: without them the tokenizer would be another one
            replace_file(folder / _SETTINGS, json.dumps(self.settings).encode())
        if self.content is not None:
            replace_file(folder / "tokenizer.json", self.content.encode())

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""


class ByteTokenizer(Tokenizer):
    """Makes a token of each byte of UTF-8; the separator is 256."""

    def __init__(self) -> None:
        self.vocab_size, self.separator = 257, 256
        pieces = [bytes([byte]) for byte in range(256)] + [b""]
        self.token_bytes, self.token_chars = _measure(pieces)
        self.fingerprint = hashlib.sha256(b"bytes").hexdigest()
        self.content, self.settings = None, {}

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i != self.separator).decode("utf-8", "replace")


class JsonTokenizer(Tokenizer):
    """Wraps a Hugging Face tokenizer, with padding, truncation and template switched off."""

    def __init__(
        self,
        content: str,
        source: str = "tokenizer.json",
        *,
        separator: str | None = None,
        eos_token: str | None = None,
        special_tokens: bool = False,
    ):
        """Parses `content`, the JSON text of file `source`. `separator`: the token that ends a document; by default
        `eos_token`, if the tokenizer has it, or else a well-known one. `special_tokens`: whether special tokens that
        texts spell out become tokens. Raises `ConfigError` for a malformed tokenizer, or one without separator."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
            description = json.loads(content)
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"data.tokenizer: {source} is not a tokenizer.json: {error}") from error
        self.content = content
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = not special_tokens
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        self._special = re.compile("|".join(map(re.escape, special))) if special and not special_tokens else None
        separator_text = _find_separator(source, vocabulary, special, separator, eos_token)
        self.vocab_size, self.separator, self._separator_text = (
            max(vocabulary.values()) + 1,
            vocabulary[separator_text],
            separator_text,
        )
        added = self._tokenizer.get_added_tokens_decoder().get(self.separator)
        if added is None or not added.special:  # whatever the file says of it
            self._tokenizer.add_special_tokens([tokenizers.AddedToken(separator_text, special=True, normalized=False)])
        self.token_bytes, self.token_chars = _measure(list(self._pieces(vocabulary, description)))
        for part in ("padding", "truncation"):
            description.pop(part, None)
        self.settings = {} if separator_text == _known_separator(vocabulary) else {"eos_token": separator_text}
        options = self.settings | ({"special_tokens": "tokens"} if special_tokens else {})
        description_text = json.dumps([description, options] if options else description, sort_keys=True)
        self.fingerprint = hashlib.sha256(description_text.encode()).hexdigest()

    def encode(self, text: str) -> Ids:
        ids = self._ids(text)
        if self._separator_text in text and self.separator in ids:  # the model has it as a word, too: take it apart
            first, *later_parts = text.split(self._separator_text)
            begin, end = self._separator_text[:1], self._separator_text[1:]
            parts = [first + begin, *(end + part + begin for part in later_parts[:-1]), end + later_parts[-1]]
            ids = np.concatenate([self._ids(part) for part in parts])
        return ids

    def count_special(self, text: str) -> int:
        return sum(1 for _ in self._special.finditer(text)) if self._special is not None else 0

    def _ids(self, text: str) -> Ids:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _pieces(self, vocabulary: dict[str, int], description: dict) -> Iterator[bytes]:
        """Yields the bytes that each id stands for."""
        tokens = {i: token for token, i in vocabulary.items()}
        added = self._tokenizer.get_added_tokens_decoder()
        kinds = _kinds(description.get("decoder"))
        context = self._tokenizer.encode("a", add_special_tokens=False).ids
        context_text = self._tokenizer.decode(context)
        for i in range(self.vocab_size):
            token = tokens.get(i)
            if token is None or i == self.separator:
                yield b""
            elif i in added:
                yield b"" if added[i].special else token.encode("utf-8")
            elif "ByteLevel" in kinds:
                is_byte_level = all(character in _BYTE_OF for character in token)  # else the decoder leaves it as it is
                yield bytes(_BYTE_OF[character] for character in token) if is_byte_level else token.encode("utf-8")
            elif "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x"):
                yield bytes.fromhex(token[3:5])
            else:  # decoded in mid-text: at the start of a text decoders drop the space of a word
                text = self._tokenizer.decode([*context, i])
                yield (text[len(context_text) :] if text.startswith(context_text) else self.decode([i])).encode("utf-8")


def _known_separator(vocabulary: Mapping[str, int]) -> str | None:
    return next((token for token in _SEPARATORS if token in vocabulary), None)


def _find_separator(
    source: str, vocabulary: Mapping[str, int], special: Sequence[str], separator: str | None, eos_token: str | None
) -> str:
    """Returns the token that ends a document. Raises `ConfigError` if it cannot be determined."""
    if separator is not None and separator in vocabulary:
        return separator
    special_tokens = (
        f"its special tokens: {', '.join(special[:_MAX_NAMED]) or 'none'}{', ...' if len(special) > _MAX_NAMED else ''}"
    )
    if separator is not None:
        raise ConfigError(f"data.separator={separator}: {source} has no such token; {special_tokens}")
    if (known_separator := eos_token if eos_token in vocabulary else _known_separator(vocabulary)) is None:
        candidates = ", ".join(_SEPARATORS)
        raise ConfigError(
            f"data.tokenizer: {source} has no end-of-document token (one of {candidates}): name another one that it "
            f"has by data.separator; {special_tokens}"
        )
    return known_separator


def _kinds(decoder: dict | None) -> set[str]:
    """Returns the types of a decoder and of its parts."""
    parts = [decoder, *decoder.get("decoders", [])] if decoder else []
    return {part["type"] for part in parts}


def _measure(pieces: Sequence[bytes]) -> tuple[Ids, Ids]:
    """Counts the bytes of each piece, and the characters that start in it (bytes that are not 0b10xxxxxx)."""
    sizes = [len(piece) for piece in pieces]
    starts = [sum(byte & 0xC0 != 0x80 for byte in piece) for piece in pieces]
    return np.array(sizes, dtype=np.int32), np.array(starts, dtype=np.int32)


def _byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's character for each byte: the byte itself if printable, else the next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(unprintable)}


_BYTE_OF = _byte_alphabet()


def load(spec: str, separator: str | None = None, special_tokens: bool = False) -> Tokenizer:
    """Loads a tokenizer: `bytes`, or the path of a `tokenizer.json` (or of its folder); see `JsonTokenizer`. A
    tokenizer_config.json beside it may say what ends a document. Raises `ConfigError`."""
    if spec == "bytes":
        if separator is not None:
            raise ConfigError(f"data.separator={separator}: data.tokenizer=bytes has one of its own, which is not text")
        return ByteTokenizer()
    path = Path(spec).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = with_file(path, lambda file: io.TextIOWrapper(file, "utf-8").read())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        advice = (
            "; bpe:SIZE and chars are made by `onecurve data pack`, which writes a tokenizer.json beside the shards"
        )
        raise ConfigError(
            f"data.tokenizer: {path}: {reason}; give 'bytes' or a tokenizer.json"
            f"{advice if re.fullmatch(r'chars|bpe:.*', spec) else ''}"
        ) from error
    eos_token = _read_eos_token(path.with_name(_SETTINGS))
    return JsonTokenizer(content, str(path), separator=separator, eos_token=eos_token, special_tokens=special_tokens)


def _read_eos_token(settings: Path) -> str | None:
    """Reads the end-of-text token from a tokenizer_config.json: a string, or a token with properties."""
    with suppress(FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        token = json.loads(read_file(settings)).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None
    return None


def check_bpe_size(vocab_size: int) -> int:
    """Returns `vocab_size` if a byte-level BPE can have it. Raises `ConfigError`."""
    if vocab_size < 257:
        raise ConfigError(f"bpe:{vocab_size}: at least 257 tokens are needed (256 bytes and the separator)")
    return vocab_size


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE of at most `vocab_size` tokens: separator (id 0), 256 bytes, merges. It is lossless."""
    check_bpe_size(vocab_size)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(_BYTE_OF),
        show_progress=False,
    )
    with _one_thread():
        tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_chars(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """Makes a token for each character of `texts`: separator (id 0), U+FFFD for all others (id 1), then by code."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocabulary = {token: i for i, token in enumerate([SEPARATOR, _UNKNOWN, *sorted(characters - {_UNKNOWN})])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=_UNKNOWN))
    tokenizer.add_special_tokens([SEPARATOR])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps the library from starting its thread pool: a process that forks after that is warned, or hangs."""
    name = "TOKENIZERS_PARALLELISM"
    old_value = os.environ.get(name)
    os.environ.setdefault(name, "false")
    try:
        yield
    finally:
        if old_value is None:
            del os.environ[name]
