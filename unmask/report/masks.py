"""What a method trains on, and what its model meets when it decodes: how much is masked, and how sure the model is.

Dimensions: B rows, L positions, M scored positions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.decoding.decoder import Decoder
from unmask.errors import UserError
from unmask.models.precision import autocast
from unmask.report.chart import Points
from unmask.report.replay import Witness
from unmask.training.trainer import Trainer
from unmask.types import CleanBatch

_BINS = 10


@dataclass(frozen=True)
class Masks:
    """One entry for each canvas that a model was shown: the masked share of all its positions, and the largest
    probability, on average over the masked ones that it was asked about."""

    share: Float[Tensor, "B"]
    top1: Float[Tensor, "B"]

    def histogram(self) -> Points:
        """Middle of each bin of the masked share, and the share of canvases in it."""
        count = torch.bincount(self._bin(), minlength=_BINS).double()
        return [((i + 0.5) / _BINS, value) for i, value in enumerate((count / count.sum()).tolist())]

    def confidence(self) -> Points:
        """Middle of each bin of the masked share that holds any canvas, and their mean confidence."""
        own = self._bin()
        return [((i + 0.5) / _BINS, self.top1[own == i].mean().item()) for i in range(_BINS) if (own == i).any()]

    def _bin(self) -> Int[Tensor, "B"]:
        return (self.share * _BINS).ceil().long().clamp(1, _BINS) - 1


def trained_on(trainer: Trainer, num_batches: int = 8) -> Masks:
    """The batches that come next in a run, as its averaged weights see them. Moves the process on; trains nothing."""
    if trainer.model.is_causal:
        raise UserError("a causal model is trained on no masks")
    seen = []
    trainer.model.eval()
    for _ in range(num_batches):
        batch = trainer.process.next_batch(trainer.stream)
        with torch.no_grad(), trainer.weights("ema"), autocast(trainer.dtype, trainer.device):
            stats = trainer.model(batch)
        trainer.process.observe(batch, stats)
        seen.append(_masks(batch.xt == trainer.tokens.mask_id, batch.scatter(stats.top1, 0.0)))
    return _joined(seen)


def met_when_decoding(decoder: Decoder, examples: CleanBatch, *, dtype: str, device: torch.device) -> Masks:
    """The canvases of every decoding step of `examples`, as far as the model was asked about them."""
    witness = Witness(decoder)
    with autocast(dtype, device):
        witness.decode(examples.masked(decoder.mask_id).to(device))
    seen = []
    for said in witness.said:
        top1 = said.top1.new_zeros(said.xt.numel()).scatter(0, said.at, said.top1).view(said.xt.shape)
        seen.append(_masks(said.xt == decoder.mask_id, top1))
    return _joined(seen)


def _masks(is_masked: Bool[Tensor, "B L"], top1: Float[Tensor, "B L"]) -> Masks:
    """`top1` at the masked positions, 0 at those that the model was not asked about."""
    is_asked = is_masked & (top1 > 0)
    return Masks(
        share=is_masked.float().mean(dim=-1).cpu(),
        top1=((top1 * is_asked).sum(dim=-1) / is_asked.sum(dim=-1).clamp(min=1)).cpu(),
    )


def _joined(parts: list[Masks]) -> Masks:
    return Masks(torch.cat([part.share for part in parts]), torch.cat([part.top1 for part in parts]))
