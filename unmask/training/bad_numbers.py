"""Steps whose loss or gradient is not finite: noticed without waiting for the device, and kept for a look at them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unmask import durable
from unmask.training.trainer import StepReport


@dataclass(frozen=True)
class BadStep:
    """A step that left weights and moments as they were."""

    step: int
    report: StepReport
    rank: int | None
    """Of this process, where there are several."""

    @property
    def where(self) -> str:
        return f"step {self.step}" + ("" if self.rank is None else f", rank {self.rank}")

    def keep(self, run: Path) -> Path:
        """Writes the batch and what the model said of it to `RUN/bad_batches/`; returns the file."""
        rank = "" if self.rank is None else f"_rank_{self.rank}"
        path = run / "bad_batches" / f"step_{self.step:08d}{rank}.safetensors"
        durable.make_folder(path.parent)
        batch, stats = self.report.batch, self.report.stats
        tensors = {"x0": batch.x0, "xt": batch.xt, "scored": batch.scored, "weight": batch.weight}
        tensors |= {"nll": stats.nll.detach(), "top1": stats.top1}
        durable.put_tensors(path, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        return path

    def __str__(self) -> str:
        return (
            f"{self.where}: the loss is {self.report.loss.item()}, the gradient's norm {self.report.grad_norm.item()}"
        )


class Watch:
    """Tells which steps were bad: at once on a CPU, else once the next step is under way: none is waited for."""

    def __init__(self, rank: int | None = None) -> None:
        self._rank = rank
        self._open: tuple[BadStep, Tensor, torch.cuda.Event | None] | None = None

    def add(self, step: int, report: StepReport) -> list[BadStep]:
        """Takes in a step; returns those that are now known to be bad."""
        known = self.settle()
        event = None
        flag = report.is_bad.to("cpu", non_blocking=True)
        if report.is_bad.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._open = BadStep(step, report, self._rank), flag, event
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
