"""A trial's command comes by stdin, from a file that has no name: what the list of processes shows has no secrets."""

import json
import sys

from launch.cli import main

if __name__ == "__main__":
    sys.argv = json.load(sys.stdin)
    main()
