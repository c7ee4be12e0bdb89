"""Decoded samples: the members of each sample by extension, decoded as webdataset does, then turned into tensors.

    members -> fields (decoded) -> the user's functions -> tensors: images of one size, tokens, numbers

Nothing is ever unpickled. The result depends on the sample's bytes and its draw alone.
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
    """Reads the samples of `shards` as the examples of a run; see `trainer.data.stream.Source`. It is thread-safe."""

    def __init__(self, shards: Shards, recipe: Recipe):
        self.shards, self._recipe = shards, recipe
        self.n, self.bytes, self.faults, self.fingerprint = shards.n, shards.bytes, shards.faults, shards.fingerprint

    def read(self, example_index: int, draw: int) -> Row:
        """Reads the fields of a sample as tensors. If `draw` is 0, nothing is random.

        Raises DataError (shard, key, byte) for a sample that cannot be read or decoded, ConfigError for a missing
        package.
        """
        number, i = self.shards.locate(example_index)
        key, members = self.shards.sample(number, i, self._recipe.extensions)
        try:
            return self._recipe({name: bytes(content) for name, content in members.items()}, key, draw)
        except Unusable as error:
            index = self.shards.index(number)
            all_members, shard = index.members(i), shown(index.url)
            byte = all_members[error.extension][0] if error.extension else next(iter(all_members.values()))[0]
            available = f"; it has: {', '.join(sorted(all_members))}" if error.missing else ""
            text = f"{shard}: byte {byte}: sample {key!r}: {error}{available}"
            raise DataError(text, shard=shard, key=key, byte=byte) from error.__cause__

    def foresee(self, example_indices: Sequence[int]) -> None:
        """Hints that these examples will be read soon."""
        self.shards.foresee(np.asarray(example_indices, np.int64))

    def entry(self, example_index: int) -> list[str]:
        """Returns the example as the ledger names it: [shard, key]."""
        return list(self.shards.name(example_index))

    def check(self) -> None:
        """Raises ConfigError for a field that no sample of the first shard has."""
        index = self.shards.index(self.shards.locate(0)[0])
        problems = [
            f"data.fields.{name}={';'.join(extensions)}: no sample of {shown(index.url)} has it; there are: "
            f"{', '.join(sorted(index.extensions))}"
            for name, extensions in self._recipe.fields.items()
            if not set(extensions) & set(index.extensions)
        ]
        if problems:
            raise ConfigError(problems)


class Unusable(Exception):
    """Says why a sample cannot be used: because of the member `extension`, or as a whole."""

    def __init__(self, cause: str, extension: str | None = None, *, missing: bool = False):
        super().__init__(cause)
        self.extension, self.missing = extension, missing


class Recipe:
    """Turns the members of a sample into named tensors of one shape. It can be pickled, and is thread-safe.

    `fields`: name -> extensions such as `jpg;png`, of which the first present is used. `maps`: the user's functions,
    `package.module:function` of a package in `plugins`, each called with the sample (dict) and its own draw. After
    them, images become float32 [3, H, W]; the field `tokens`, a text, becomes `inputs` and `targets` int64 [length]:
    with the separator at both ends, cut, or padded with it where there is no target (-100).
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
        self.fields = {name: extensions.lower().split(";") for name, extensions in fields.items()}
        self.extensions = frozenset(extension for extensions in self.fields.values() for extension in extensions)
        self._tokenizer, self._length, self._image = tokenizer, length, image
        self._map_names_and_plugins = list(maps), list(plugins)
        problems = [
            f"data.fields.{name}={extension}: is a pickle, which can run any code when it is read; {decode.INSTEAD}"
            for name, extensions in self.fields.items()
            for extension in extensions
            if decode.kind(extension) in decode.PICKLES
        ]
        self._import_maps(problems)
        if any(decode.kind(extension) in images.EXTENSIONS for extension in self.extensions):
            _collect(problems, partial(images.require_pillow, "data.fields"))
        if problems:
            raise ConfigError(problems)

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer) -> Recipe:
        """Makes the recipe of a config with `data=samples`."""
        data: schema.Samples = config.data
        image = ImageTensor(data.image.size, data.image.augment, data.image.mean, data.image.std)
        return cls(data.fields, tokenizer, data.sequence_length, image, data.maps, config.run.plugins)

    def __call__(self, members: Mapping[str, bytes], key: str, draw: int) -> Row:
        """Returns the tensors of a sample. Raises Unusable, or ConfigError for a missing package."""
        sample = {"__key__": key, **{name: self._field(name, members) for name in self.fields}}
        for number, (name, function) in enumerate(self._maps):
            with _BlameSample(f"data.maps {name}"):
                sample = function(sample, random_key(draw, "map", number) if draw else 0)
                if not isinstance(sample, dict):
                    raise TypeError(f"returned {type(sample).__name__}, but must return the sample, a dict")
        row: Row = {}
        for name, value in sample.items():
            if not name.startswith("__"):
                with _BlameSample(f"field {name!r}"):
                    row |= self._tensors(name, value, draw)
        return row

    def _field(self, name: str, members: Mapping[str, bytes]) -> Any:
        for extension in self.fields[name]:
            if extension in members:
                with _BlameSample(f"{extension!r} cannot be decoded", extension):
                    return decode.decode(extension, members[extension])
        alternatives = " or ".join(map(repr, self.fields[name]))
        raise Unusable(f"has no {alternatives} (data.fields.{name})", missing=True)

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

    def _import_maps(self, problems: list[str]) -> None:
        self._maps: list[tuple[str, Callable[[Sample, int], Sample]]] = []
        names, plugins = self._map_names_and_plugins
        for name in names:
            if function := _collect(problems, partial(_function, name, plugins)):
                self._maps.append((name, function))

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the functions out, as they go by name: decorated ones, partials and lambdas cannot be pickled."""
        return {name: value for name, value in vars(self).items() if name != "_maps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        problems: list[str] = []
        self._import_maps(problems)
        if problems:
            raise ConfigError(problems)


class _BlameSample:
    """Turns errors in its block into Unusable, named after `subject`; but not a missing package.

    Lack of memory counts, too: a sample that needs too much would need it in every attempt of the run.
    """

    def __init__(self, subject: str, extension: str | None = None):
        self._subject, self._extension = subject, extension

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ImportError):
            raise ConfigError(f"{self._subject}: {error}; install what it needs") from error
        if isinstance(error, OSError) and error.errno in LIMITS:
            return  # a limit of this process
        if isinstance(error, OSError) and is_outage(error):  # of a file that a user's function reads
            raise Outage(f"{self._subject}: {cause(error)}", DataError.exit_code) from error
        if isinstance(error, Exception) and not isinstance(error, (OnecurveError, Unusable)):
            # One line, and the same in every attempt of the run: without addresses.
            reason = re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}".partition("\n")[0])
            raise Unusable(f"{self._subject}: {reason}", self._extension) from error


def _tensor(name: str, value: Any) -> torch.Tensor:
    """Makes a tensor of numbers, arrays or lists of numbers; nothing else can be batched."""
    try:
        if isinstance(value, np.ndarray):  # torch knows neither foreign byte orders nor views that it may not write to
            return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        problem = f"field {name!r} is not a tensor but of type {type(value).__name__}"
        raise Unusable(f"{problem}: make numbers of it in a function of data.maps, or leave it out") from None


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
