"""Measures the masks that a method trains on and those that its model meets in decoding: masked share and confidence.

Dimensions: B rows, N blocks of a row (1 in plain diffusion), S positions of a block, L of a row, C canvases.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.blocks import count_blocks, in_blocks
from unmask.decoding.decoder import Decoder
from unmask.decoding.trace import RecordingDecoder
from unmask.errors import UserError
from unmask.lab.report.chart import Points
from unmask.models.precision import autocast
from unmask.training.trainer import Trainer
from unmask.types import CleanBatch

_BINS = 10


@dataclass(frozen=True)
class MaskStatistics:
    """The masked share and the confidence of each canvas (a row, or a block of one) that a model has predicted."""

    share: Float[Tensor, "C"]
    """The masked share of all its positions."""
    top1: Float[Tensor, "C"]
    """The largest probability, a mean over the masked positions with a prediction."""

    def histogram(self) -> Points:
        """Returns the middle of each bin of the masked share, and the share of canvases in it."""
        count = torch.bincount(self._bin(), minlength=_BINS).double()
        return [((i + 0.5) / _BINS, value) for i, value in enumerate((count / count.sum()).tolist())]

    def confidence(self) -> Points:
        """Returns the middle of each bin of the masked share that holds any canvas, and their mean confidence."""
        own = self._bin()
        return [((i + 0.5) / _BINS, self.top1[own == i].mean().item()) for i in range(_BINS) if (own == i).any()]

    def _bin(self) -> Int[Tensor, "C"]:
        return (self.share * _BINS).ceil().long().clamp(1, _BINS) - 1


def measure_training_masks(trainer: Trainer, num_batches: int = 8) -> MaskStatistics:
    """Measures the next batches of a run, as its averaged weights see them. Advances the process; trains nothing."""
    if trainer.model.is_causal:
        raise UserError("a causal model is trained on no masks")
    seen = []
    trainer.model.eval()
    for _ in range(num_batches):
        batch = trainer.process.next_batch(trainer.stream)
        with torch.no_grad(), trainer.weights("ema"), autocast(trainer.dtype, trainer.device):
            stats = trainer.model(batch)
        trainer.process.observe(batch, stats)
        is_masked = batch.xt == trainer.tokens.mask_id
        seen.append(
            _canvas_statistics(is_masked, batch.scatter(stats.top1, 0.0), trainer.process.requirements.block_size)
        )
    return _concatenate(seen)


def measure_decoding_masks(
    decoder: Decoder, examples: CleanBatch, *, block_size: int | None, dtype: str, device: torch.device
) -> MaskStatistics:
    """Measures the canvases of every decoding step of `examples`; for a block model, the block being decoded."""
    recorder = RecordingDecoder(decoder)
    with autocast(dtype, device):
        recorder.decode(examples.masked(decoder.mask_id).to(device))
    seen = []
    for step in recorder.said:
        top1 = step.top1.new_zeros(step.xt.numel()).scatter(0, step.at, step.top1).view(step.xt.shape)
        seen.append(_canvas_statistics(step.xt == decoder.mask_id, top1, block_size))
    return _concatenate(seen)


def _canvas_statistics(
    is_masked: Bool[Tensor, "B L"], top1: Float[Tensor, "B L"], block_size: int | None
) -> MaskStatistics:
    """Measures the canvases with any prediction. `top1` is 0 at masked positions without one."""
    num_blocks = count_blocks(is_masked.shape[1], block_size)
    masked, asked = (in_blocks(x, num_blocks) for x in (is_masked, is_masked & (top1 > 0)))
    total, count = (in_blocks(top1, num_blocks) * asked).sum(dim=-1), asked.sum(dim=-1)
    is_met = count > 0
    return MaskStatistics(share=masked.float().mean(dim=-1)[is_met].cpu(), top1=(total / count)[is_met].cpu())


def _concatenate(parts: list[MaskStatistics]) -> MaskStatistics:
    return MaskStatistics(torch.cat([part.share for part in parts]), torch.cat([part.top1 for part in parts]))
