"""`python -m unmask`."""

import os
import sys

from unmask.cli import run

if __name__ == "__main__":
    # `python -m` puts the current folder first on the path, where a file may have the name of a library's module. Few
    # imports have been made by now, of Python's own library; to keep the folder out of them too, use the command
    # `unmask`, or `python -P`.
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():  # noqa: PTH109
        del sys.path[0]
    run()
