"""Keys of objectives, and refused combinations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config.section import Plugin


class CausalLM(Plugin):
    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        if data := sections.get("data"):
            yield from data.without_text("objective", self.name)
