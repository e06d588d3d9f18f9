"""Work that is done while training goes on."""

import threading
from collections.abc import Callable


class Background:
    """Does one piece of work at a time in a thread. Its error is raised by the next call of a method but `join`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begins `work` as soon as what came before is done."""
        self.wait()
        self._thread = threading.Thread(target=self._do, args=(work,), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Costs nothing: for every step."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until all is done."""
        self.join()
        self.check()

    def join(self) -> None:
        """As `wait`, and raises nothing: for when something else has gone wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _do(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
