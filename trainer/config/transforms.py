"""Keys of the built-in transforms (`model.transforms`). Unlike other keys, their defaults are here: no file of conf/
lists the transforms of a run."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import Field, field_validator

from trainer.config.section import Count, Plugin, Positive
from trainer.errors import ConfigError

Patterns = list[str]


class Freeze(Plugin):
    modules: Patterns = Field(
        min_length=1,
        description="What is not trained: names of modules or parameters, of which the end is enough "
        "(`attention.output`), with `*` and `?`, such as `[token_embedding, 'blocks.[01]']`.",
    )
    but: Patterns = Field(
        default=[], description="Names likewise, of what in them is trained all the same: `modules=['*'] but=[norm]`."
    )


class LoRA(Plugin):
    rank: Count = Field(default=8, description="Rank of what is added to each matrix.")
    alpha: Positive | None = Field(
        default=None, description="What is added is multiplied by `alpha / rank`. null: as much as the rank, so by 1."
    )
    modules: Patterns = Field(
        default=["*"],
        min_length=1,
        description="Which linear layers are adapted: names as in `freeze`. All of the model's own parameters are "
        "frozen, unless a transform before it says what is: `{freeze: {modules: ['*'], but: [norm]}, lora: {}}` trains "
        "the norms, too. The layers that are adapted have to be frozen.",
    )


class FP8(Plugin):
    """The transform that `precision.compute=fp8` adds."""

    emulate: bool = False


class Transformed(Plugin):
    """A section of a model, built-in or a user's."""

    # With a default, unlike all others: sections of users' own models, and of earlier runs, do not have it.
    transforms: dict[str, Any] = Field(
        default={},
        description="Changes of the model before it is sharded, one after the other: by name the keys of each, such as "
        "`model.transforms.lora.rank=8` or `'model.transforms={lora: {}, freeze: {modules: [blocks.0]}}'` "
        "(a list of them, each with its `name`, does as well). A transform of yours has any name, and says where its "
        "class is: `model.transforms.mine.name=my_package.mine:Mine`. What they "
        "freeze of `model.weights` is not saved.",
    )

    @field_validator("transforms", mode="before")
    @classmethod
    def _index_by_name(cls, value: Any) -> Any:
        """Turns a list of sections into a mapping by name."""
        if not isinstance(value, list):
            return {} if value is None else value
        names = [section.get("name") if isinstance(section, dict) else None for section in value]
        if None in names or len(set(names)) < len(names):
            raise ValueError("in a list each transform should have a `name` of its own; or write {NAME: {KEY: VALUE}}")
        return dict(zip(names, value, strict=True))


@cache
def transformed(name: str, section: type[Plugin]) -> type[Plugin]:
    """Returns a user's model section with the key `transforms` added."""
    if issubclass(section, Transformed):
        return section
    if "transforms" in section.model_fields:
        raise ConfigError(f"model.name={name}: its key `transforms` is one that every model has; rename it")

    class WithTransforms(section, Transformed):  # type: ignore[valid-type, misc]
        def __reduce__(self) -> Any:  # no module has this class
            return _rebuild, (name, section), self.__getstate__()

    WithTransforms.__name__, WithTransforms.__module__ = section.__name__, section.__module__
    return WithTransforms


def _rebuild(name: str, section: type[Plugin]) -> Plugin:
    section_class = transformed(name, section)
    return section_class.__new__(section_class)
