"""`python -m launch.doctor`: the same as `onecurve doctor`, for torchrun and srun."""

from __future__ import annotations

if __name__ == "__main__":  # before anything else is imported
    import onecurve.paths

    onecurve.paths.put_working_folder_last()

import sys

from launch.doctor.command import main
from trainer.processes import die_with_parent, make_printing_safe

if __name__ == "__main__":
    make_printing_safe()
    die_with_parent()
    sys.exit(main())
