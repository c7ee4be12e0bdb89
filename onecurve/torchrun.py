"""`python -m onecurve.torchrun`: torchrun, which by `python -m torch.distributed.run` would take files in the working
folder for Python's own modules."""

from __future__ import annotations

if __name__ == "__main__":  # before anything else is imported
    import onecurve.paths

    onecurve.paths.put_working_folder_last()

from torch.distributed.run import main

if __name__ == "__main__":
    main()
