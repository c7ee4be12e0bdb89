"""One rank of many runs, one after the other: under torchrun, `python -m tests.anywhere.rank JOBS.json`.

JOBS.json: a list of command lines (lists of overrides).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from trainer.config.compose import load
from trainer.run import run
from trainer.topology import world_size

if __name__ == "__main__":
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        run(load(overrides, world_size()), time.monotonic())
