"""Several processes: who they are, and how they talk. Nobody else knows of ranks and of `torch.distributed`'s groups.

A launcher (`torchrun`, `accelerate launch`, a line of shell under SLURM) starts the processes and tells each in its
environment which one it is. Without a launcher there is one process, and no group.

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

from unmask.errors import UserError
from unmask.masking.process import RowShard
from unmask.peers import ALONE, Peers, Votes
from unmask.progress import console

_WHO = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_WHERE = ("MASTER_ADDR", "MASTER_PORT")
_FIRST_PAUSE, _LONGEST_PAUSE, _LAST_PAUSE = 0.01, 0.5, 0.2
_WORDS_OF_A_GROUP = ("gloo", "NCCL", "pair closure")
_LEFT: list[Any] = []


class PeerLost(Exception):
    """Another process ended, or did not answer in time."""


@dataclass(frozen=True)
class Launch:
    """What a launcher says of this process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its number on this machine."""


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Which process this is. One alone, where the environment says nothing of it.

    Raises:
        UserError: it says some of it, or what cannot be.
    """
    if not any(environment.get(name) for name in _WHO):
        return Launch()
    missing = [name for name in (*_WHO, *_WHERE) if not environment.get(name)]
    if missing:
        given = ", ".join(f"{name}={environment[name]}" for name in _WHO if environment.get(name))
        raise UserError(
            f"{given} in the environment says that a launcher started this process, but {' and '.join(missing)} is not "
            "set; start with torchrun, which sets all five, or unset them to train in one process"
        )
    try:
        launch = Launch(*(int(environment[name]) for name in _WHO))
    except ValueError:
        launch = Launch(-1)
    if not (0 <= launch.rank < launch.size and launch.local_rank >= 0):
        given = ", ".join(f"{name}={environment[name]}" for name in _WHO)
        raise UserError(f"{given} in the environment: ranks are numbers from 0 to WORLD_SIZE - 1; start with torchrun")
    return launch


class Group(Peers):
    """The processes that a launcher started. Tensors on the CPU go over gloo, those on a GPU over NCCL."""

    def __init__(self, launch: Launch, store: Store, timeout: timedelta) -> None:
        self.rank, self.size, self.local_rank = launch.rank, launch.size, launch.local_rank
        self._timeout = timeout.total_seconds()
        self._has_given_up = Event()
        self._topics = 0
        self.has_agreed = False
        """Whether all have found that something is wrong with one of them."""
        self._store = store
        self._vote: list[distributed.Work] = []

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
        self._vote = [distributed.all_reduce(total, async_op=True)]

        def answers() -> list[float]:
            self.finish()
            return total.tolist()

        return answers

    def finish(self) -> None:
        """Waits for the vote that is on its way: a group that ends before hangs."""
        while self._vote:
            self._vote.pop().wait()

    @contextmanager
    def raise_together(self, kind: type[Exception] = UserError) -> Iterator[None]:
        problem = None
        try:
            yield
        except kind as error:
            problem = str(error)
        problems = self.exchange(problem)
        self.has_agreed = any(said is not None for said in problems)
        if self.has_agreed and all(said == problems[0] for said in problems):
            raise kind(problems[0])
        if self.has_agreed:
            told = [f"rank {rank}: {said}" for rank, said in enumerate(problems) if said is not None]
            raise kind("\n".join(told[:4]))

    def kv_set(self, key: str, words: str = "") -> None:
        self._store.set(f"unmask/{key}", words)

    def kv_has(self, key: str) -> bool:
        return self._store.check([f"unmask/{key}"])

    def kv_get(self, key: str) -> str:
        """Asks again and again: who waits in the store keeps other threads from it."""
        deadline, pause = time.monotonic() + self._timeout, _FIRST_PAUSE
        while not self.kv_has(key):
            pause = min(2 * pause, _LONGEST_PAUSE)
            if time.monotonic() > deadline or self._has_given_up.wait(pause):
                raise TimeoutError(f"rank {self.rank} of {self.size} was told nothing of {key} in {self._timeout:g} s")
        return self._store.get(f"unmask/{key}").decode()

    def unique_key(self) -> str:
        self._topics += 1
        return f"topic {self._topics}"

    def abort(self) -> None:
        self._has_given_up.set()


@contextmanager
def joined(launch: Launch, timeout: float) -> Iterator[Peers]:
    """The processes of this training, from when all are there. Those that are not the main one say nothing meanwhile.

    Args:
        launch: which process this is.
        timeout: seconds to wait for the others, at the start and whenever they are waited for.

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
        console.quiet = console.quiet and peers is not None and peers.has_agreed  # else nobody else would say it
        _leave(peers)
        raise
    except RuntimeError as error:
        if not _is_of_a_group(error):
            raise
        console.quiet = False
        reason = str(error).strip().partition("\n")[0].partition(" This is typically")[0]
        raise PeerLost(
            f"rank {launch.rank} of {launch.size} waited for another process, which ended or did not answer within "
            f"train.timeout={timeout:g} s: {reason}. Start all of them again with --resume; nothing after the last "
            "checkpoint is kept"
        ) from error
    except Exception:  # all end alike, or the launcher ends the others
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
    """The group's memory stays: freed with DDP's, it would wait for a thread that waits for Python (torch 2.13).

    Gloo's thread lets the last tensors go, for which it needs Python: a process that ends before that aborts.
    """
    if group is not None:
        with suppress(RuntimeError):  # the others have gone before the vote came back
            group.finish()
        _LEFT.append(distributed.group.WORLD)
        distributed.destroy_process_group()
        time.sleep(_LAST_PAUSE)


def _is_of_a_group(error: RuntimeError) -> bool:
    """Gloo's errors have no type of their own, and not all name it."""
    text = str(error)
    return isinstance(error, distributed.DistError) or any(words in text for words in _WORDS_OF_A_GROUP)


def device_of(peers: Peers, asked: str) -> str:
    """`train.device` for this process: of several on one machine, every one has a GPU of its own.

    Raises:
        UserError: a single GPU is asked for, or there are more processes than GPUs.
    """
    count = torch.cuda.device_count()
    if peers.size == 1 or asked == "cpu" or (asked == "auto" and not count):
        return asked
    if asked not in ("auto", "cuda"):
        raise UserError(f"train.device={asked}: each of {peers.size} processes has its own; use train.device=auto")
    if peers.local_rank >= count:
        raise UserError(
            f"LOCAL_RANK={peers.local_rank}: this machine has {count} GPUs, one for each process; start at most "
            f"{count} here (torchrun --nproc-per-node {count}), or set train.device=cpu"
        )
    return f"cuda:{peers.local_rank}"


def shard_of(peers: Peers, batch_size: int, accumulate: int) -> RowShard:
    """The rows of the global batch that this process trains.

    Raises:
        UserError: processes and micro-batches do not divide them.
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
    """Whether all processes have the same settings.

    Raises:
        UserError: names those that differ, with their values.
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
