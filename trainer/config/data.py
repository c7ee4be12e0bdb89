"""Keys of data: where the shards are, which parts of their samples are used, and refused combinations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from trainer.config.section import Count, Float, Int, Positive, Section
from trainer.config.tokenization import Tokenization

SMALLEST_SHARE = 2**-14  # of a source in a mixture: one sequence in a cycle (trainer.data.mixture.LONGEST_CYCLE)
TOKENS = "tokens"  # the field of decoded samples whose text becomes inputs and targets
IMAGES = {"jpg", "jpeg", "png", "webp", "ppm", "pgm", "pbm"}


def _class_names(value: Any) -> Any:
    """Replaces the path of a file by the class names in it: they are then in the config, and the file is not needed."""
    if not isinstance(value, str):
        return value
    try:
        numbers = json.loads(Path(value).expanduser().read_text(encoding="utf-8"))
        names = [name for _, name in sorted((number, name) for name, number in numbers.items())]
        if sorted(numbers.values()) != list(range(len(names))):
            raise ValueError("classes are not numbered from 0 on")
    except OSError as error:
        raise ValueError(f"{value}: {error.strerror or error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{value}: should be JSON as onecurve data pack writes it, {{NAME: NUMBER}}: {error}"
        ) from error
    return names


def _distinct(names: list[str]) -> list[str]:
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"names a class twice: {', '.join(duplicates)}")
    return names


class DataSource(Section):
    shards: str | list[str] = Field(description="Its training shards, as `data.shards`.")
    weight: Float = Field(ge=0, description="Its share of the sequences is its weight over the sum of all.")


class Data(Tokenization):
    """The keys that text and decoded samples share: where the shards are, their order, faults, reading."""

    decoded: ClassVar[bool] = False
    """True: samples are decoded one by one. False: their text is packed into sequences."""

    shards: str | list[str] | None = Field(
        description="Training shards: paths of WebDataset tars or `http(s)://`, `s3://`, `gs://` addresses; braces "
        "`{000000..000099}`, globs of local files, `.tar.gz`; `pipe:COMMAND` with `data.allow_pipe=true`. null: "
        "`data.sources` names them."
    )
    sources: dict[str, DataSource] = Field(
        description="A mixture instead of `data.shards`: `{web: {shards: ..., weight: 3}, code: {shards: ..., "
        "weight: 1}}`. At every point of the run each source has had its share, to within one sequence (weights that "
        "need more than four or five digits are rounded to 16,384ths of their sum); each has its own epochs."
    )
    reweight: dict[Count, dict[str, Annotated[Float, Field(ge=0)]]] = Field(
        description="Other weights after that many steps: `{1000: {web: 1, code: 1}}`."
    )
    validation: str | list[str] | None = Field(description="Validation shards, likewise. null: no evaluation.")
    sequence_length: Count = Field(description="Tokens of a sequence.")
    classes: Annotated[list[str], AfterValidator(_distinct), BeforeValidator(_class_names)] | None = Field(
        default=None,  # sections of earlier runs do not have it
        description="Names of the classes in the order of their numbers, or the `classes.json` that has them. Models "
        "and objectives find them in `facts.classes`. Part of what the run is.",
    )
    workers: Int = Field(ge=0, description="Threads that read ahead. 0: read in the training thread.")
    processes: bool = Field(description="The workers are processes instead: for decoding that keeps a core busy.")
    lanes: Count = Field(
        description="Parallel streams the data is dealt to, fixed when the run starts. Best a multiple of the "
        "number of processes: each then reads only its own lanes."
    )
    window: Count = Field(description="Blocks of samples that a lane shuffles among each other.")
    on_error: Literal["fail", "quarantine"] = Field(
        description="What data that cannot be read does: fail (exit code 3), or quarantine: it is left out and named "
        "in `events.jsonl` and `quarantine.jsonl`; what a damaged shard holds before the damage is used. Validation "
        "data must be whole."
    )
    error_budget: Int = Field(
        ge=0, description="How many samples and shards may be quarantined in the whole run; more end it (exit code 3)."
    )
    ledger: bool = Field(description="Write `ledger.jsonl`: which samples, or pieces of them, each step consumed.")
    cache: str = Field(
        min_length=1,
        description="Folder for prepared data sets, tokens, indexes of read-only shards, copies of remote ones.",
    )
    cache_gb: Float = Field(
        ge=0, description="Most that copies of remote shards may take of `data.cache`, GB. 0: none."
    )
    patience_s: Float = Field(
        ge=0,
        description="How long a server or file system with shards may not answer during the run before that ends the "
        "run (exit code 3, tried again from the last checkpoint), seconds. Never a reason to quarantine a sample. At "
        "the start half a minute has to do; with several processes `launch.timeout_s` is a limit, too.",
    )
    mmap: bool = Field(
        description="Map local shards into memory instead of reading them: fewer copies, but a shard that is cut short "
        "during the run kills the process, and so does storage that fails then."
    )
    allow_pipe: bool = Field(description="Allow `pipe:COMMAND` among the shards: it runs COMMAND in a shell.")

    @property
    def has_text(self) -> bool:
        """Returns whether batches have `inputs` and `targets` made of text."""
        return True

    def without_text(self, group: str, name: str) -> Iterator[str]:
        """Yields a problem of an option that needs text (`name` of `group`) if the samples have none."""
        return iter(())

    def row(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns torch's data type and the shape of each field of a batch row, as far as the config tells them."""
        raise NotImplementedError

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        if self.shards is None and not self.sources:
            yield "data.shards: missing; name the training shards, or several sources of them in data.sources"
        if self.shards is not None and self.sources:
            yield "data.sources: the run reads these or data.shards, not both; set data.shards=null"
        if self.processes and not self.workers:
            yield "data.processes=true: needs data.workers of 1 or more"
        if self.reweight and not self.sources:
            yield "data.reweight: there is nothing to weigh without data.sources"
        yield from self._weights("data.sources", {name: source.weight for name, source in self.sources.items()})
        for step, weights in sorted(self.reweight.items()):
            yield from self._weights(f"data.reweight.{step}", weights)

    def _weights(self, key: str, weights: Mapping[str, float]) -> Iterator[str]:
        if unknown := sorted(set(weights) - set(self.sources)):
            yield f"{key}: {', '.join(unknown)}: no such source; there are: {', '.join(self.sources)}"
        if missing := sorted(set(self.sources) - set(weights)):
            yield f"{key}: lacks the weight of {', '.join(missing)} (0 leaves a source out)"
        total = sum(weights.values())
        if weights and not total:
            yield f"{key}: all weights are 0"
        for name, weight in weights.items():
            if 0 < weight < SMALLEST_SHARE * total:
                share = f"a share of {weight / total:.2g} is below the smallest, {SMALLEST_SHARE:.2g}"
                yield f"{key}.{name}={weight}: {share}; 0 leaves the source out"


class Text(Data):
    field: str = Field(
        description="Which member of a sample is the text, by its extension, such as `txt`; `u16` or `u32`: token ids "
        "that `onecurve data pack --tokenize` stored."
    )
    packing: Literal["concat", "best_fit"] = Field(
        description="How documents become sequences: concat (one after the other, cut every `data.sequence_length` "
        "tokens) or best_fit (whole documents of a shard, as tightly as they fit; only longer ones are cut)."
    )
    document_mask: bool = Field(
        description="Documents of a sequence do not see each other: attention, positions and targets end with each."
    )

    def row(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        masked = ("documents", "positions") if self.document_mask else ()
        return dict.fromkeys(("inputs", "targets", *masked), ("int64", (self.sequence_length,)))


class Image(Section):
    size: Count | None = Field(
        description="Height and width that images are brought to: the shorter side is scaled to it, the center cut "
        "out. null: as large as they are, which must then be the same for all."
    )
    augment: bool = Field(
        description="In training take a random part of each image instead (8 % to 100 % of its area), scaled to "
        "`data.image.size`, and flip half of them from left to right."
    )
    mean: tuple[Float, Float, Float] = Field(
        description="Subtracted from red, green and blue, which are from 0 to 1; the default is that of ImageNet."
    )
    std: tuple[Positive, Positive, Positive] = Field(description="What they are divided by then.")


class Samples(Data):
    decoded = True

    fields: dict[str, str] = Field(
        description="What is taken of each sample, by extension, and what it is called in a batch: `{image: 'jpg;png', "
        "label: cls}`; of several extensions the first that is there. They are decoded as webdataset does (numbers, "
        "JSON, text, NumPy arrays, images); pickles are refused. The text of a field called `tokens` becomes `inputs` "
        "and `targets` of `data.sequence_length` tokens."
    )
    maps: list[str] = Field(
        description="Functions of yours that change a decoded sample, in this order, such as `[my_package.data:crop]`, "
        "of packages in `run.plugins`. Each is called with the sample (a dict; images are Pillow's) and a random "
        "63-bit integer that depends on seed and position only (0 in an evaluation), and returns the sample."
    )
    image: Image = Field(description="What images become: float32 [3, height, width].")

    @property
    def has_text(self) -> bool:
        return TOKENS in self.fields

    def without_text(self, group: str, name: str) -> Iterator[str]:
        if not self.has_text and not self.maps:  # maps could make text of anything
            yield (
                f"{group}.name={name}: takes text, which data.fields has none of: call it `tokens`, such as "
                f"data.fields={{tokens: txt}}, or take {group} of your own"
            )

    def row(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns the fields of a row. Images have a known size; all else that is not text counts as a number."""
        fields: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, extensions in self.fields.items():
            if name == TOKENS:
                fields |= dict.fromkeys(("inputs", "targets"), ("int64", (self.sequence_length,)))
            elif set(extensions.lower().split(";")) & IMAGES:
                side = self.image.size or 224
                fields[name] = "float32", (3, side, side)
            else:
                fields[name] = "int64", ()
        return fields

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        yield from super().problems(sections, world_size)
        if not self.fields:
            yield "data.fields: missing; name what to take of each sample, such as {image: 'jpg;png', label: cls}"
        for name, extensions in self.fields.items():
            if name == "draws" or name.startswith("__"):
                yield f"data.fields.{name}: this name is taken; choose another one"
            if not all(extensions.split(";")):
                yield f"data.fields.{name}={extensions}: should be an extension, or several with a semicolon between"
        if self.image.augment and self.image.size is None:
            yield "data.image.augment=true: needs data.image.size"
