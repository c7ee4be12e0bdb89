"""Which of two modules of one name is found: Python's own, installed ones and ours before one in the working folder.

A `trainer.py`, `launch.py` or `random.py` beside a person's data must not be taken for ours or Python's. `python -m`
looks in the working folder first; packages of users are found there all the same, last.
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_START = (
    "import sys; sys.path and sys.path[0] == '' and sys.path.pop(0); sys.path.append({root!r}); "
    "import onecurve.paths; onecurve.paths._is_done = True; "
    "import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
)


_is_done = False


def put_working_folder_last() -> None:
    """Where it stands first, it came there by `python -m` (or -c), not by PYTHONPATH: once for each process."""
    global _is_done
    try:
        here = os.getcwd()
    except OSError:  # it was deleted
        return
    if not _is_done and not getattr(sys.flags, "safe_path", False) and sys.path and sys.path[0] in ("", here):
        del sys.path[0]
    _is_done = True
    # Ours as well: an editable installation is found by a hook that Python asks after all of these.
    sys.path += [folder for folder in (ROOT, here) if folder not in sys.path]


def python(module: str) -> list[str]:
    """The start of a command that runs a module of ours in a process of its own."""
    safe = ["-P"] if sys.version_info >= (3, 11) else []  # processes that it starts inherit this
    return [sys.executable, *safe, "-c", _START.format(root=ROOT, module=module)]
