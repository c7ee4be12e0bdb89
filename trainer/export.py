"""Exports a run's weights from a checkpoint, tensor by tensor, without building a model of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.format import DamagedCheckpoint, StoredTensor, folder_name, read_index, verify
from trainer.checkpoint.load import FoundCheckpoint, find_newest, read_state
from trainer.checkpoint.retention import complete_checkpoints, step_of
from trainer.checkpoint.state import DTYPES
from trainer.config import Config
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.facts import NoExample
from trainer.files import replace_file
from trainer.models.factory import model_factory, reads_weights, without_transforms
from trainer.models.family import Family
from trainer.models.pretrained_files import CONFIG, TOKENIZER, TOKENIZER_CONFIG, Files, export_files
from trainer.models.weight_files import LazyTensor, write_folder
from trainer.patches import without_values
from trainer.pretrained import base_of
from trainer.run_directory import CHECKPOINTS
from trainer.transforms import apply, undo_transforms
from trainer.transforms.build import build_transforms

EMA, EMA_WEIGHT = "optimizer/ema/", "optimizer/ema_weight/"


def find_checkpoint(folder: Path, step: int | None) -> FoundCheckpoint:
    """Returns the newest checkpoint of a run directory, or that of `step`. Raises ConfigError if it is missing or
    damaged."""
    if step is None:
        newest, _ = find_newest(folder / CHECKPOINTS, set_aside=False)
        if newest is None:
            raise ConfigError(f"{folder}: has no checkpoint yet")
        return newest
    path = folder / CHECKPOINTS / folder_name(step)
    if not path.is_dir():
        steps = ", ".join(str(step_of(path)) for path in complete_checkpoints(folder / CHECKPOINTS))
        raise ConfigError(f"--step {step}: {folder} has no checkpoint of it; there are: {steps or 'none'}")
    try:
        return FoundCheckpoint(path, verify(path))
    except (DamagedCheckpoint, OSError) as error:
        raise ConfigError(f"--step {step}: {path} is not whole: {error}") from None


class PlainModel:
    """The run's model without its transforms; no parameter has a value yet."""

    def __init__(self, config: Config, tokenizer: Tokenizer, checkpoint: FoundCheckpoint):
        self.transforms = build_transforms(config)
        try:
            with without_values():
                self.model = model_factory(without_transforms(config), tokenizer).build()
                frozen = apply(self.transforms, self.model)
        except NoExample:
            raise ConfigError(
                f"model={config.model.name}: looks at the data while it is made (`facts.example`), so its transforms "
                "cannot be merged into it"
            ) from None
        self.not_saved = frozen if reads_weights(config) else frozenset()
        self.factory = model_factory(config, tokenizer, pretrained=base_of(config, tokenizer, checkpoint))

    def meta_value(self, name: str) -> Tensor:
        """Returns a parameter that the checkpoint leaves out, on the meta device."""
        return self.model.get_parameter(name).detach().to("meta")

    def value(self, name: str) -> Tensor:
        return self.factory.value(self.model, name)


@dataclass(frozen=True)
class Weights:
    """The parameters in a checkpoint, or their averages (`ema`), converted to `dtype` if it is set. `plain`: the model
    without transforms, where the run has some, which are merged into the weights."""

    checkpoint: FoundCheckpoint
    ema: bool = False
    dtype: torch.dtype | None = None
    plain: PlainModel | None = None

    def tensors(self, family: Family | None = None) -> dict[str, LazyTensor]:
        """Returns the tensors by name, none of them read yet; in transformers' form if `family` is passed."""
        stored = read_index(self.checkpoint.path, self.checkpoint.manifest)
        names = [name.removeprefix("model/") for name in stored if name.startswith("model/")]
        if self.ema and not any(f"{EMA}{name}" in stored for name in names):
            raise ConfigError(
                f"--ema: {self.checkpoint.path} holds no averaged weights; they are kept where optimizer.ema is set"
            )
        names += sorted(self.plain.not_saved) if self.plain else []
        tensors = (self._tensor(name, stored, family or Family(None)) for name in names)
        return dict(tensor for tensor in tensors if tensor is not None)

    def _tensor(self, name: str, stored: dict[str, StoredTensor], family: Family) -> tuple[str, LazyTensor] | None:
        changes = self.plain.transforms if self.plain else []
        empty = undo_transforms(changes, name, lambda source: self._meta_value(source, stored))
        if empty is None:
            return None
        dtype = self.dtype if self.dtype and empty.is_floating_point() else empty.dtype

        def make() -> Tensor:
            value = undo_transforms(changes, name, lambda source: self._value(source, stored))
            assert value is not None
            return family.to_transformers(name, value).to(dtype).contiguous()

        return family.name(name), LazyTensor(dtype, tuple(family.to_transformers(name, empty).shape), make)

    def _meta_value(self, name: str, stored: dict[str, StoredTensor]) -> Tensor:
        """Returns the shape and type of `_value`, on the meta device."""
        if self.plain and name in self.plain.not_saved:
            return self.plain.meta_value(name)
        source = self._source(name, stored)
        return torch.empty(stored[source].shape, dtype=DTYPES[stored[source].dtype], device="meta")

    def _value(self, name: str, stored: dict[str, StoredTensor]) -> Tensor:
        if self.plain and name in self.plain.not_saved:
            return self.plain.value(name)
        source = self._source(name, stored)
        value = self._read(source, stored)
        return self._averaged(name, value, stored) if source.startswith(EMA) else value

    def _source(self, name: str, stored: dict[str, StoredTensor]) -> str:
        averaged = self.ema and f"{EMA}{name}" in stored  # a buffer has no average
        return f"{EMA}{name}" if averaged else f"model/{name}"

    def _averaged(self, name: str, average: Tensor, stored: dict[str, StoredTensor]) -> Tensor:
        """Returns the average of a parameter, or its value where no step has updated it."""
        source = f"{EMA_WEIGHT}{name}"
        if not average.any() and source in stored and not self._read(source, stored):
            return self._read(f"model/{name}", stored)
        return average / self._ema_weight(name, stored)

    def _ema_weight(self, name: str, stored: dict[str, StoredTensor]) -> Tensor:
        """Returns how much of the weights an average, which began as 0, holds so far."""
        source = f"{EMA_WEIGHT}{name}"
        weight = self._read(source, stored) if source in stored else torch.zeros(())
        if not 0 < weight.item() <= 1:
            raise ConfigError(f"--ema: {self.checkpoint.path} does not tell how far the average of {name} has come")
        return weight

    def _read(self, name: str, stored: dict[str, StoredTensor]) -> Tensor:
        value = torch.empty(stored[name].shape, dtype=DTYPES[stored[name].dtype])
        read_state(self.checkpoint, {name: value})
        return value


def to_transformers(
    folder: Path, tensors: dict[str, LazyTensor], family: Family, largest: int, run: Path, base: Files
) -> None:
    """Writes a folder that `from_pretrained` of transformers loads, with the run's tokenizer. `base`: the files beside
    the weights that the run started with."""
    family.config.dtype = next(tensor.dtype for tensor in tensors.values())
    for name, content in _config_files(family, run, base).items():
        replace_file(folder / name, content)
    write_folder(folder, tensors, largest, {})


def _config_files(family: Family, run: Path, base: Files) -> dict[str, bytes]:
    contents, tokenizer = {}, run / TOKENIZER
    if tokenizer.exists():
        contents[TOKENIZER] = tokenizer.read_bytes()
        # Else transformers would choose a tokenizer class by the model type.
        contents[TOKENIZER_CONFIG] = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}).encode()
    end = family.config.eos_token_id
    contents |= export_files(base, family.config, contents.get(TOKENIZER))
    if (config_file := run / TOKENIZER_CONFIG).exists():  # documents end with a token that is not the usual one
        contents[TOKENIZER_CONFIG] = json.dumps(
            json.loads(contents[TOKENIZER_CONFIG]) | json.loads(config_file.read_bytes())
        ).encode()
        ends = family.config.eos_token_id
        if end not in (ends if isinstance(ends, list) else [ends]):
            family.config.eos_token_id = end
    return contents | {CONFIG: family.config.to_json_string().encode()}


def count_elements(tensors: dict[str, LazyTensor]) -> int:
    return sum(prod(tensor.shape) for tensor in tensors.values())
