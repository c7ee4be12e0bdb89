"""Makes Python's own, installed and our modules win over modules of the same name in the working folder.

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
    """Moves the working folder to the end of `sys.path` if `-m` or `-c` put it first, and appends it if it is missing.
    Once in a process: later, a first entry is PYTHONPATH's."""
    global _is_done
    try:
        working_folder = os.getcwd()
    except OSError:  # it was deleted
        return
    if not _is_done and not getattr(sys.flags, "safe_path", False) and sys.path and sys.path[0] in ("", working_folder):
        del sys.path[0]
    _is_done = True
    # Ours as well: an editable installation is found by a hook that Python asks after all of these.
    sys.path += [folder for folder in (ROOT, working_folder) if folder not in sys.path]


def python(module: str) -> list[str]:
    """Returns the first words of a command that runs a module of ours in a new process."""
    safe = ["-P"] if sys.version_info >= (3, 11) else []  # processes that it starts inherit this
    return [sys.executable, *safe, "-c", _START.format(root=ROOT, module=module)]
