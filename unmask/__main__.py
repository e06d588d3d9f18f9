"""`python -m unmask`."""

import os
import sys

from unmask.cli import main

if __name__ == "__main__":
    # `python -m` puts the current folder first on the path: a file there may have the name of a library's module.
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():  # noqa: PTH109
        del sys.path[0]
    sys.exit(main())
