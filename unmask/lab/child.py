"""Runs `unmask` as the child of a process that may be killed: it ends when its parent has gone.

A script, which imports nothing of unmask before it watches: the imports take seconds. Its stdin is a pipe whose other
end only the parent holds, so that there is nothing more to read once the parent has ended, however it did.
"""

import os
import runpy
import signal
import threading
import time

_SECONDS_TO_SAVE = 60


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # a training saves and stops
    time.sleep(_SECONDS_TO_SAVE)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("unmask", run_name="__main__", alter_sys=True)
