"""An objective that hangs as it is told to: `objective.way` on rank 1, at its 40th micro-batch, once in a run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.config import Plugin
from trainer.objectives.causal_lm import CausalLM


class Hangs(CausalLM):
    class Config(Plugin):
        way: str
        done: str

    def __init__(self, config: Config, *arguments) -> None:
        super().__init__(config, *arguments)
        self.config, self.calls, self.done = config, 0, Path(config.done).exists()
        self.group = dist.new_group() if config.way == "skipped" and dist.is_initialized() else None

    def counts(self, batch):
        self.calls += 1
        if self.calls == 40 and not self.done:
            first = os.environ["RANK"] == "1"
            if self.config.way == "skipped":
                self.sum_that_one_leaves_out(first)
            elif first:
                Path(self.config.done).touch()
                getattr(self, self.config.way)()
        return super().counts(batch)

    def sum_that_one_leaves_out(self, leaves: bool) -> None:
        if leaves:
            Path(self.config.done).touch()
        else:
            dist.all_reduce(torch.zeros(1), group=self.group)

    def endless(self) -> None:
        while True:
            pass

    def lock(self) -> None:
        """Never lets go of Python's lock."""
        re.match(r"(a?){40}a{40}", "a" * 40)
