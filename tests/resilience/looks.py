"""An objective that counts how often this process looks at the run's folder while steps go on, by patching `os.stat`:
the counts of steps 4 to 8, in which nothing is saved or read, go to `looks-RANK` in the folder that holds the run's."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from trainer.config import Plugin
from trainer.objectives.causal_lm import CausalLM


class Looks(CausalLM):
    class Config(Plugin):
        run_dir: str

    def __init__(self, config: Config, *arguments) -> None:
        super().__init__(config, *arguments)
        self.config, self.calls, self.looks = config, 0, []
        self.stat = os.stat
        os.stat = self.counted

    def counted(self, path, *arguments, **keywords):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.config.run_dir):
            self.looks.append((threading.current_thread().name, os.fspath(path)))
        return self.stat(path, *arguments, **keywords)

    def counts(self, batch):
        self.calls += 1
        if self.calls == 4:
            self.looks.clear()
        if 4 <= self.calls < 8:
            time.sleep(0.7)  # longer than the watchdog takes between two looks
        if self.calls == 8:
            looks = "".join(f"{thread} {path}\n" for thread, path in self.looks)
            (Path(self.config.run_dir).parent / f"looks-{os.environ.get('RANK', '0')}").write_text(looks)
        return super().counts(batch)
