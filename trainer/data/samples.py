"""Decoded samples: the members of each sample by extension, as webdataset decodes them, then as tensors.

    members -> fields (decoded) -> the user's functions -> tensors: images of one size, tokens, numbers

Nothing is ever unpickled. What comes of a sample depends on its bytes and on its draw alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from trainer.config import Config, schema
from trainer.config.data import TOKENS
from trainer.data import decode, images
from trainer.data.images import ImageTensor
from trainer.data.shards import Shards
from trainer.data.storage import shown
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError, DataError, OnecurveError, Outage
from trainer.outage import LIMITS, cause, is_outage
from trainer.randomness import key as random_key
from trainer.registry import import_named

NO_TARGET = -100

Sample = dict[str, Any]
Row = dict[str, torch.Tensor]


class Samples:
    """The samples of `shards` as the units of a run; see `trainer.data.stream.Source`. Any thread may read."""

    def __init__(self, shards: Shards, recipe: Recipe):
        self.shards, self._recipe = shards, recipe
        self.n, self.bytes, self.faults, self.fingerprint = shards.n, shards.bytes, shards.faults, shards.fingerprint

    def read(self, example_index: int, draw: int) -> Row:
        """The fields of a sample as tensors. Where `draw` is 0, nothing is random.

        Raises DataError (shard, key, byte) for what cannot be read or decoded, ConfigError for a missing package.
        """
        number, i = self.shards.locate(example_index)
        key, members = self.shards.sample(number, i, self._recipe.extensions)
        try:
            return self._recipe({name: bytes(content) for name, content in members.items()}, key, draw)
        except Unusable as error:
            index = self.shards.index(number)
            found, shard = index.members(i), shown(index.url)
            byte = found[error.extension][0] if error.extension else next(iter(found.values()))[0]
            lacks = f"; it has: {', '.join(sorted(found))}" if error.missing else ""
            text = f"{shard}: byte {byte}: sample {key!r}: {error}{lacks}"
            raise DataError(text, shard=shard, key=key, byte=byte) from error.__cause__

    def foresee(self, example_indices: Sequence[int]) -> None:
        """A hint that these units will be read soon."""
        self.shards.foresee(np.asarray(example_indices, np.int64))

    def entry(self, example_index: int) -> list[str]:
        """The unit as the ledger names it: [shard, key]."""
        return list(self.shards.name(example_index))

    def check(self) -> None:
        """Raises ConfigError for a field that no sample of the first shard has."""
        index = self.shards.index(self.shards.locate(0)[0])
        problems = [
            f"data.fields.{name}={';'.join(wanted)}: no sample of {shown(index.url)} has it; there are: "
            f"{', '.join(sorted(index.extensions))}"
            for name, wanted in self._recipe.fields.items()
            if not set(wanted) & set(index.extensions)
        ]
        if problems:
            raise ConfigError(problems)


class Unusable(Exception):
    """A sample that cannot be used, in words; because of the member `extension`, or as a whole."""

    def __init__(self, cause: str, extension: str | None = None, *, missing: bool = False):
        super().__init__(cause)
        self.extension, self.missing = extension, missing


class Recipe:
    """Turns the members of a sample into named tensors of one shape. It can be pickled and used by any thread.

    `fields`: name -> extensions, the first that is there is taken, such as `jpg;png`. `maps`: functions of the user's,
    `package.module:function` of a package in `plugins`, each called with the sample (dict) and a draw of its own. What
    is an image after them becomes float32 [3, H, W]; the field `tokens`, a text, becomes `inputs` and `targets` int64
    [length]: begun and ended by the separator, cut, or padded with it where there is no target (-100).
    Raises ConfigError for pickles, functions that cannot be imported, and images without Pillow.
    """

    def __init__(
        self,
        fields: Mapping[str, str],
        tokenizer: Tokenizer,
        length: int,
        image: ImageTensor,
        maps: Sequence[str] = (),
        plugins: Sequence[str] = (),
    ):
        self.fields = {name: wanted.lower().split(";") for name, wanted in fields.items()}
        self.extensions = frozenset(extension for wanted in self.fields.values() for extension in wanted)
        self._tokenizer, self._length, self._image = tokenizer, length, image
        self._given = list(maps), list(plugins)
        problems = [
            f"data.fields.{name}={extension}: is a pickle, which can run any code when it is read; {decode.INSTEAD}"
            for name, wanted in self.fields.items()
            for extension in wanted
            if decode.kind(extension) in decode.PICKLES
        ]
        self._import(problems)
        if any(decode.kind(extension) in images.EXTENSIONS for extension in self.extensions):
            _collect(problems, partial(images.require_pillow, "data.fields"))
        if problems:
            raise ConfigError(problems)

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer) -> Recipe:
        """What `data=samples` asks for."""
        data: schema.Samples = config.data
        image = ImageTensor(data.image.size, data.image.augment, data.image.mean, data.image.std)
        return cls(data.fields, tokenizer, data.sequence_length, image, data.maps, config.run.plugins)

    def __call__(self, members: Mapping[str, bytes], key: str, draw: int) -> Row:
        """The tensors of a sample. Raises Unusable, or ConfigError for a package that is missing."""
        sample = {"__key__": key, **{name: self._field(name, members) for name in self.fields}}
        for number, (name, function) in enumerate(self._maps):
            with _Blame(f"data.maps {name}"):
                sample = function(sample, random_key(draw, "map", number) if draw else 0)
                if not isinstance(sample, dict):
                    raise TypeError(f"returned {type(sample).__name__}, but must return the sample, a dict")
        row: Row = {}
        for name, value in sample.items():
            if not name.startswith("__"):
                with _Blame(f"field {name!r}"):
                    row |= self._tensors(name, value, draw)
        return row

    def _field(self, name: str, members: Mapping[str, bytes]) -> Any:
        for extension in self.fields[name]:
            if extension in members:
                with _Blame(f"{extension!r} cannot be decoded", extension):
                    return decode.decode(extension, members[extension])
        wanted = " or ".join(map(repr, self.fields[name]))
        raise Unusable(f"has no {wanted} (data.fields.{name})", missing=True)

    def _tensors(self, name: str, value: Any, draw: int) -> Row:
        if images.is_image(value):
            value = self._image(value, random_key(draw, "image") if draw else 0)
        elif name == TOKENS and isinstance(value, (str, bytes)):
            return self._tokens(value if isinstance(value, str) else str(value, "utf-8"))
        return {name: _tensor(name, value)}

    def _tokens(self, text: str) -> Row:
        separator = self._tokenizer.separator
        line = np.array([separator, *self._tokenizer.encode(text), separator], np.int64)[: self._length + 1]
        row = {"inputs": np.full(self._length, separator), "targets": np.full(self._length, NO_TARGET)}
        row["inputs"][: len(line) - 1], row["targets"][: len(line) - 1] = line[:-1], line[1:]
        return {name: torch.from_numpy(values) for name, values in row.items()}

    def _import(self, problems: list[str]) -> None:
        self._maps: list[tuple[str, Callable[[Sample, int], Sample]]] = []
        names, plugins = self._given
        for name in names:
            if function := _collect(problems, partial(_function, name, plugins)):
                self._maps.append((name, function))

    def __getstate__(self) -> dict[str, Any]:
        """Functions go by name: what a user's module makes by decorators, partial or lambda cannot be pickled."""
        return {name: value for name, value in vars(self).items() if name != "_maps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        problems: list[str] = []
        self._import(problems)
        if problems:
            raise ConfigError(problems)


class _Blame:
    """What goes wrong within is the sample's fault, named after `what`; but not a missing package.

    Nor is memory spared: what asks for more than there is would do so in every life of the run.
    """

    def __init__(self, what: str, extension: str | None = None):
        self._what, self._extension = what, extension

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ImportError):
            raise ConfigError(f"{self._what}: {error}; install what it needs") from error
        if isinstance(error, OSError) and error.errno in LIMITS:
            return  # of this process
        if isinstance(error, OSError) and is_outage(error):  # of a file that a function of the user's reads
            raise Outage(f"{self._what}: {cause(error)}", DataError.exit_code) from error
        if isinstance(error, Exception) and not isinstance(error, (OnecurveError, Unusable)):
            # One line, and the same in every life of the run: without addresses.
            why = re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}".partition("\n")[0])
            raise Unusable(f"{self._what}: {why}", self._extension) from error


def _tensor(name: str, value: Any) -> torch.Tensor:
    """A tensor of numbers, arrays or lists of numbers; nothing else can be put together to a batch."""
    try:
        if isinstance(value, np.ndarray):  # torch knows neither foreign byte orders nor views that it may not write to
            return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        what = f"field {name!r} is not a tensor but of type {type(value).__name__}"
        raise Unusable(f"{what}: make numbers of it in a function of data.maps, or leave it out") from None


def _function(name: str, plugins: Sequence[str]) -> Callable[[Sample, int], Sample]:
    function = import_named("data.maps", name, plugins)
    if not callable(function):
        raise ConfigError(f"data.maps={name}: is not a function")
    return function


def _collect(problems: list[str], make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ConfigError as error:
        problems += error.problems
