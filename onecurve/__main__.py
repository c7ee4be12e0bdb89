"""`python -m onecurve`: the command `onecurve`, by the Python that runs this."""

from __future__ import annotations

if __name__ == "__main__":  # before anything else is imported
    import onecurve.paths

    onecurve.paths.put_working_folder_last()

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.argv[0] = "onecurve"  # as messages that can be pasted have it
    main()
