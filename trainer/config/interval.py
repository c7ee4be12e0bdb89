"""Parses how often something happens: "100" (steps), "30min" (wall time), "2e9tok" (target tokens), 0 (never)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNITS = {"": ("steps", 1), "step": ("steps", 1), "steps": ("steps", 1), "tok": ("tokens", 1)}
_UNITS |= {"s": ("seconds", 1), "sec": ("seconds", 1), "min": ("seconds", 60), "h": ("seconds", 3600)}


@dataclass(frozen=True)
class Interval:
    """An amount of steps, tokens or seconds (`unit`). An amount of 0 means never."""

    amount: int
    unit: str

    @classmethod
    def parse(cls, text: str | int) -> Interval:
        """Parses an interval. Raises ValueError with the accepted forms."""
        match = re.fullmatch(r"\s*([0-9.]+(?:[eE]\+?[0-9]+)?)\s*([a-z]*)\s*", str(text))
        if not match or match[2] not in _UNITS:
            raise ValueError(f"'{text}' is not an interval: write 100 (steps), 30min (also s, h) or 2e9tok")
        unit, factor = _UNITS[match[2]]
        try:
            amount = float(match[1]) * factor
        except ValueError:
            raise ValueError(f"'{match[1]}' in '{text}' is not a number") from None
        if amount != int(amount):
            raise ValueError(f"'{text}' is not a whole number of {unit}")
        return cls(int(amount), unit)

    def due(self, before: dict[str, float], now: dict[str, float]) -> bool:
        """Returns whether a multiple of the interval was reached between two readings of steps, tokens and seconds."""
        return bool(self.amount) and now[self.unit] // self.amount > before[self.unit] // self.amount
