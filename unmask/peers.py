"""Communication between the processes that train one model; `ALONE` stands for a single process.

Dimensions: b rows of this process, B of all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from unmask.errors import UserError

Votes = Callable[[], list[float]]
"""Function without arguments that returns one process's numbers, or their sums over all processes."""


class Peers:
    """A single process without others; `training.distributed.Group` is the implementation for several.

    Methods are collective: all processes call them, in the same order. The exceptions are `kv_set`, `kv_has`, `kv_get`
    and `abort`.
    """

    rank = 0
    size = 1
    local_rank = 0
    """Number of this process on its machine."""

    @property
    def is_main(self) -> bool:
        """True if this process writes the files, the log and to the terminal: rank 0."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """Returns the slice of a list of work (examples to evaluate, say) that is this process's: every `size`-th."""
        return slice(self.rank, None, self.size)

    def sum(self, value: Tensor) -> Tensor:
        """Sums `value` over the processes."""
        return value

    def gather(self, rows: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "rows ..."]:
        """Returns all (B, ...) rows, in the order of the ranks, on rank 0; on every other rank its own rows."""
        return rows

    def exchange(self, value: Any) -> list[Any]:
        """Returns every process's `value`, by rank. Values must be JSON."""
        return [value]

    def async_all_reduce(self, votes: Votes) -> Votes:
        """Starts to sum the current `votes()` over the processes; the returned function waits and gives the sums.

        Work between the two calls hides the exchange. Votes that change later count in the next exchange.
        """
        return votes

    @contextmanager
    def raise_together(self, kind: type[Exception] = UserError) -> Iterator[None]:
        """Raises an error of `kind`, raised by any process in this context, in all of them at its end.

        Inside the context processes must not wait for each other.
        """
        yield

    def kv_set(self, key: str, words: str = "") -> None:
        """Stores `words` under `key` for the other processes, without waiting. All `kv_*` methods are thread-safe."""

    def kv_has(self, key: str) -> bool:
        """True if a process has set `key`."""
        return False

    def kv_get(self, key: str) -> str:
        """Waits until a process sets `key`; returns its words.

        Raises:
            TimeoutError: none did in time.
        """
        raise TimeoutError(f"there is no other process to set {key}")

    def unique_key(self) -> str:
        """Returns a new prefix for keys at every call; the n-th call returns the same one in every process."""
        return ""

    def abort(self) -> None:
        """Ends all waits of `kv_get`, in any thread: another process is gone."""


ALONE = Peers()
