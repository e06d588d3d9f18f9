"""Steps whose loss or gradient is not finite: noticed without waiting for the device, and kept for a look at them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unmask import durable
from unmask.peers import Peers
from unmask.training.trainer import StepReport


@dataclass(frozen=True)
class BadStep:
    """A step that left weights and moments as they were."""

    step: int
    report: StepReport

    def ranks(self, peers: Peers) -> list[int]:
        """The processes whose own numbers are bad; all, if only the gradient is. All ask together."""
        weighted = self.report.stats.nll.detach() * self.report.batch.weight
        is_own = not bool(weighted.isfinite().all())
        found = [rank for rank, is_bad in enumerate(peers.exchange(is_own)) if is_bad]
        return found or list(range(peers.size))

    def path(self, run: Path, rank: int, peers: Peers) -> Path:
        suffix = f"_rank_{rank}" if peers.size > 1 else ""
        return run / "bad_batches" / f"step_{self.step:08d}{suffix}.safetensors"

    def keep(self, run: Path, peers: Peers) -> None:
        """Writes this process's batch, and what the model said of it, to `RUN/bad_batches/`."""
        path = self.path(run, peers.rank, peers)
        durable.make_folder(path.parent)
        batch, stats = self.report.batch, self.report.stats
        tensors = {"x0": batch.x0, "xt": batch.xt, "scored": batch.scored, "weight": batch.weight}
        tensors |= {"nll": stats.nll.detach(), "top1": stats.top1}
        durable.put_tensors(path, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

    def in_words(self, run: Path, ranks: list[int], peers: Peers) -> str:
        where = f"step {self.step}" + (f", rank {', '.join(map(str, ranks))}" if peers.size > 1 else "")
        loss, norm = self.report.loss.item(), self.report.grad_norm.item()
        path = self.path(run, ranks[0], peers)
        return f"{where}: the loss is {loss}, the gradient's norm {norm}; its batch is in {path}"


class Watch:
    """Tells which steps were bad: at once on a CPU, else once the next step is under way: none is waited for."""

    def __init__(self) -> None:
        self._open: tuple[BadStep, Tensor, torch.cuda.Event | None] | None = None

    def add(self, step: int, report: StepReport) -> list[BadStep]:
        """Takes in a step; returns those that are now known to be bad."""
        known = self.settle()
        event = None
        flag = report.is_bad.to("cpu", non_blocking=True)
        if report.is_bad.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._open = BadStep(step, report), flag, event
        return known if event is not None else [*known, *self.settle()]

    def settle(self) -> list[BadStep]:
        """The step that was not known of yet, if it was bad. Waits for it."""
        if self._open is None:
            return []
        step, flag, event = self._open
        self._open = None
        if event is not None:
            event.synchronize()
        return [step] if flag.item() else []
