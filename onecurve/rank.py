"""`python -m onecurve.rank`: `python -m trainer` under a name that no file in the working folder has."""

from __future__ import annotations

if __name__ == "__main__":  # before anything else is imported
    import onecurve.paths

    onecurve.paths.put_working_folder_last()

from trainer.__main__ import main

if __name__ == "__main__":
    main()
