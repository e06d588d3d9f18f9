"""Training on several processes: reading the launcher's environment, and communication over `torch.distributed`.

A launcher (`torchrun`, `accelerate launch`, a line of shell under SLURM) starts the processes, and sets rank and size
in the environment of each. Without a launcher there is one process, and no group.

Dimensions: b rows of this process, B of all.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Event
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from unmask.errors import Interrupted, RunFailed, UserError, first_line
from unmask.masking.process import RowShard
from unmask.peers import ALONE, Peers, Votes
from unmask.progress import console

_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_FIRST_PAUSE, _LONGEST_PAUSE, _LAST_PAUSE = 0.01, 0.5, 0.2
_GROUP_ERRORS = ("gloo", "NCCL", "pair closure")
_KEPT_GROUPS: list[Any] = []  # see `_leave`


class PeerLost(RunFailed):
    """Another process ended, or did not answer in time."""


@dataclass(frozen=True)
class Launch:
    """This process's place among those that a launcher started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process on its machine."""


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Reads this process's place from the environment; without any of its variables it is the only process.

    Raises:
        UserError: some variables are missing, or their values are impossible.
    """
    if not any(environment.get(name) for name in _RANKS):
        return Launch()
    missing = [name for name in (*_RANKS, *_ADDRESS) if not environment.get(name)]
    if missing:
        given = ", ".join(f"{name}={environment[name]}" for name in _RANKS if environment.get(name))
        raise UserError(
            f"{given} in the environment says that a launcher started this process, but {' and '.join(missing)} is not "
            "set; start with torchrun, which sets all five, or unset them to train in one process"
        )
    try:
        launch = Launch(*(int(environment[name]) for name in _RANKS))
    except ValueError:
        launch = Launch(-1)
    if not (0 <= launch.rank < launch.size and launch.local_rank >= 0):
        given = ", ".join(f"{name}={environment[name]}" for name in _RANKS)
        raise UserError(f"{given} in the environment: ranks are numbers from 0 to WORLD_SIZE - 1; start with torchrun")
    return launch


class Group(Peers):
    """The processes that a launcher started, connected by gloo for tensors on the CPU and NCCL for those on a GPU."""

    def __init__(self, launch: Launch, store: Store, timeout: timedelta) -> None:
        self.rank, self.size, self.local_rank = launch.rank, launch.size, launch.local_rank
        self._timeout = timeout.total_seconds()
        self._is_aborted = Event()
        self._num_keys = 0
        self.has_agreed = False
        """True if the last `raise_together` has raised in all processes."""
        self._store = store
        self._pending: list[distributed.Work] = []

    def sum(self, value: Tensor) -> Tensor:
        total = value.detach().clone()
        distributed.all_reduce(total)
        return total

    def gather(self, rows: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "rows ..."]:
        own = rows.detach().cpu().contiguous()
        plain = own.view(torch.uint8) if own.dtype == torch.bool else own  # gloo knows no bool
        parts = [torch.empty_like(plain) for _ in range(self.size)] if self.is_main else None
        distributed.gather(plain, parts)
        return own if parts is None else torch.cat(parts).view(own.dtype)

    def exchange(self, value: Any) -> list[Any]:
        # all_gather takes tensors of one size: first the lengths of the JSON texts, then the texts, padded.
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self._everyones(torch.tensor([len(own)]))
        width = int(max(lengths))
        padded = self._everyones(torch.nn.functional.pad(own, (0, width - len(own))))
        return [json.loads(part[:n].numpy().tobytes()) for part, n in zip(padded, map(int, lengths), strict=True)]

    def _everyones(self, value: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(value) for _ in range(self.size)]
        distributed.all_gather(parts, value)
        return parts

    def async_all_reduce(self, votes: Votes) -> Votes:
        self.finish()
        total = torch.tensor(votes(), dtype=torch.float64)
        self._pending = [distributed.all_reduce(total, async_op=True)]

        def answers() -> list[float]:
            self.finish()
            return total.tolist()

        return answers

    def finish(self) -> None:
        """Waits for the reduction that is under way: a group that ends before it hangs."""
        while self._pending:
            self._pending.pop().wait()

    @contextmanager
    def raise_together(self, kind: type[Exception] = UserError) -> Iterator[None]:
        problem = None
        try:
            yield
        except kind as error:
            problem = str(error)
        problems = self.exchange(problem)
        self.has_agreed = any(each is not None for each in problems)
        if self.has_agreed and all(each == problems[0] for each in problems):
            raise kind(problems[0])
        if self.has_agreed:
            lines = [f"rank {rank}: {each}" for rank, each in enumerate(problems) if each is not None]
            raise kind("\n".join(lines[:4]))

    def kv_set(self, key: str, words: str = "") -> None:
        self._store.set(f"unmask/{key}", words)

    def kv_has(self, key: str) -> bool:
        return self._store.check([f"unmask/{key}"])

    def kv_get(self, key: str) -> str:
        # Polls: a thread that waits inside the store keeps other threads from it.
        deadline, pause = time.monotonic() + self._timeout, _FIRST_PAUSE
        while not self.kv_has(key):
            pause = min(2 * pause, _LONGEST_PAUSE)
            if time.monotonic() > deadline or self._is_aborted.wait(pause):
                raise TimeoutError(f"rank {self.rank} of {self.size}: no process set {key} within {self._timeout:g} s")
        return self._store.get(f"unmask/{key}").decode()

    def unique_key(self) -> str:
        self._num_keys += 1
        return f"key {self._num_keys}"

    def abort(self) -> None:
        self._is_aborted.set()


@contextmanager
def joined(launch: Launch, timeout: float) -> Iterator[Peers]:
    """Connects the processes of this training inside the context, in which only rank 0 prints.

    Args:
        launch: this process's place.
        timeout: seconds to wait for the other processes, at the start and in every exchange.

    Raises:
        PeerLost: one did not come, ended, or did not answer in time.
    """
    if launch.size == 1:
        yield ALONE
        return
    console.quiet = launch.rank != 0
    peers = None
    try:
        peers = _group(launch, timedelta(seconds=timeout))
        yield peers
        distributed.barrier()  # nobody leaves while another still needs it
    except UserError:
        # If the error is this process's alone, no other one prints it.
        console.quiet = console.quiet and peers is not None and peers.has_agreed
        _leave(peers)
        raise
    except RuntimeError as error:
        if not _is_group_error(error):
            raise
        console.quiet = False
        reason = first_line(error).partition(" This is typically")[0]
        raise PeerLost(
            f"rank {launch.rank} of {launch.size} waited for another process, which ended or did not answer within "
            f"train.timeout={timeout:g} s: {reason}. Start all of them again with --resume; nothing after the last "
            "checkpoint is kept"
        ) from error
    except (Exception, Interrupted):  # all end alike, or the launcher ends the others
        _leave(peers)
        raise
    _leave(peers)


def _group(launch: Launch, timeout: timedelta) -> Group:
    is_cuda = torch.cuda.is_available()
    if is_cuda and launch.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(launch.local_rank)
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        store=PrefixStore("unmask", store),
        rank=launch.rank,
        world_size=launch.size,
        timeout=timeout,
    )
    return Group(launch, store, timeout)


def _leave(group: Group | None) -> None:
    """Ends the group's communication."""
    # The group object is kept: freed with DDP's, it would wait for a thread that waits for Python (torch 2.13). Gloo's
    # thread frees the last tensors, for which it needs Python too: a process that ends before that aborts. So it waits.
    if group is not None:
        with suppress(RuntimeError):  # the others may have gone already
            group.finish()
        _KEPT_GROUPS.append(distributed.group.WORLD)
        distributed.destroy_process_group()
        time.sleep(_LAST_PAUSE)


def _is_group_error(error: RuntimeError) -> bool:
    """True if communication failed."""
    # Gloo's errors are plain RuntimeErrors, and not all name gloo.
    text = str(error)
    return isinstance(error, distributed.DistError) or any(words in text for words in _GROUP_ERRORS)


def device_of(peers: Peers, asked: str) -> str:
    """Returns the device of this process: each of several on one machine has its own GPU.

    Raises:
        UserError: `asked` names a single GPU for several processes, or there are more processes than GPUs.
    """
    count = torch.cuda.device_count()
    if peers.size > 1 and asked == "mps":
        raise UserError(
            f"train.device=mps: a Mac's GPU is one device, and {peers.size} processes cannot exchange what is on it; "
            "start one process, or set train.device=cpu"
        )
    if peers.size > 1 and asked == "auto" and not count:
        return "cpu"
    if peers.size == 1 or asked == "cpu":
        return asked
    if asked not in ("auto", "cuda"):
        raise UserError(f"train.device={asked}: each of {peers.size} processes has its own; use train.device=auto")
    if peers.local_rank >= count:
        raise UserError(
            f"LOCAL_RANK={peers.local_rank}: this machine has {count} GPUs, one for each process; start at most "
            f"{count} here (torchrun --nproc-per-node {count}), or set train.device=cpu"
        )
    return f"cuda:{peers.local_rank}"


def generator_of(device: torch.device) -> torch.Generator:
    """Returns the generator that dropout draws from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.mps._get_default_mps_generator() if device.type == "mps" else torch.default_generator


def shard_of(peers: Peers, batch_size: int, accumulate: int) -> RowShard:
    """Returns the rows of the global batch that this process trains.

    Raises:
        UserError: the batch does not divide into processes and micro-batches.
    """
    if batch_size % (peers.size * accumulate):
        near = max(1, round(batch_size / (peers.size * accumulate))) * peers.size * accumulate
        raise UserError(
            f"train.batch_size={batch_size} does not divide into {peers.size} processes x train.accumulate="
            f"{accumulate} micro-batches; use train.batch_size={near}, or other numbers of them"
        )
    size = batch_size // peers.size
    return RowShard(total=batch_size, start=peers.rank * size, stop=(peers.rank + 1) * size, peers=peers)


def check_alike(peers: Peers, settings: dict[str, Any]) -> None:
    """Checks that all processes have the same settings. Collective.

    Raises:
        UserError: some differ; names them, with their values.
    """
    own = {key: json.dumps(value) for key, value in settings.items()}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    if len(set(peers.exchange(digest))) == 1:
        return
    everyones = peers.exchange(own)
    first = everyones[0]
    different = [
        f"  {key}: {first.get(key)} on rank 0, {held.get(key)} on rank {rank}"
        for rank, held in enumerate(everyones)
        for key in sorted({*first, *held})
        if first.get(key) != held.get(key)
    ]
    with peers.raise_together():
        raise UserError(
            "the processes were not started alike; give all of them the same recipe, settings, data and versions\n"
            + "\n".join(different[:20])
        )
