"""The building blocks of every config section: bounded types, `Section` and `Plugin`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from trainer.config.faults import Fault
from trainer.config.interval import Interval

MISSING = "???"  # Hydra's mark of a value that must be given


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not true or false")
    return value


def _interval(text: str) -> str:
    Interval.parse(text)
    return text


def _fault(text: str) -> str:
    Fault.parse(text)
    return text


Int = Annotated[int, BeforeValidator(_no_bool)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_no_bool)]
Float = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_no_bool)]
Share = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_no_bool)]
Positive = Annotated[float, Field(allow_inf_nan=False, gt=0), BeforeValidator(_no_bool)]
IntervalText = Annotated[str, AfterValidator(_interval)]
FaultText = Annotated[str, AfterValidator(_fault)]


class Section(BaseModel):
    """A group of keys. Unknown keys are refused; values cannot be changed after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_missing(cls, value: Any) -> Any:
        if value == MISSING:
            raise PydanticCustomError("missing", "missing")
        return value

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        """Yields the conflicts with other keys or the number of processes, one message each: the key, what is wrong and
        what to do. `sections`: all valid sections by name; invalid ones are missing.

        For a second model that is trained, the checks see it, its optimizer and its schedule under the names of the
        run's own (`model`, ...); the messages are then given the names in the config.
        """
        return iter(())


class Plugin(Section):
    """A section with options. User plugins subclass it as `Config` of their class and add their own keys."""

    name: str = Field(
        description="Which option this is. Of model, objective, strategy, optimizer, schedule and transform also "
        "`package.module:Class` of a package in `run.plugins`."
    )
