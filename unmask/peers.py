"""The processes that train one model together, as each part that must agree with the others sees them.

Dimensions: b rows of this process, B of all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from unmask.errors import UserError

Votes = Callable[[], list[float]]


class Peers:
    """One process, which has no peers. `training.distributed.Group` is the one that has.

    All processes call these methods together, in the same order, but for `tell`, `is_told`, `kv_get` and `abort`.
    """

    rank = 0
    size = 1
    local_rank = 0
    """The number on this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes: files, the log, the terminal."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """Which of things that are dealt out, evaluated examples for instance, are this process's: every `size`-th."""
        return slice(self.rank, None, self.size)

    def sum(self, value: Tensor) -> Tensor:
        """Over the processes."""
        return value

    def gather(self, rows: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "rows ..."]:
        """All (B, ...) rows in the order of the ranks, in the main process; in the others their own."""
        return rows

    def exchange(self, value: Any) -> list[Any]:
        """What every process says, by rank. JSON can hold it."""
        return [value]

    def async_all_reduce(self, votes: Votes) -> Votes:
        """Asks all for their `votes` as they are now; what it returns waits for the answers, and gives their sums.

        The work between the two hides the exchange. One process alone may change its mind until it is asked.
        """
        return votes

    @contextmanager
    def raise_together(self, kind: type[Exception] = UserError) -> Iterator[None]:
        """What is wrong in one process (an error of `kind` in this context) ends the context with it in all of them.

        Inside, processes must not wait for each other.
        """
        yield

    def kv_set(self, key: str, words: str = "") -> None:
        """Leaves `words` for whoever asks for `key`, without waiting for anyone; from any thread, as the next two."""

    def kv_has(self, key: str) -> bool:
        """Whether a process has told something of `key`."""
        return False

    def kv_get(self, key: str) -> str:
        """Waits for what is told of `key`.

        Raises:
            TimeoutError: it has not come.
        """
        raise TimeoutError(f"there is no other process to hear of {key} from")

    def unique_key(self) -> str:
        """What to begin keys with: new at every call, and the same in all processes that have called as often."""
        return ""

    def abort(self) -> None:
        """Lets no thread wait for anything any more: a process is gone."""


ALONE = Peers()
