"""Measures the NLL of masked tokens by the masked share and by the distance to the nearest visible token.

Dimensions: B rows of a batch, L positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import nan

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask import noise
from unmask.blocks import count_blocks, in_blocks, over_positions
from unmask.errors import check_finite
from unmask.evaluation.nelbo import uniform_masks
from unmask.lab.diagnostics.measures import NOWHERE, Bin, Bins, NotApplicable, distance_to_visible
from unmask.models.denoiser import Denoiser
from unmask.training.loading import LoadedRun
from unmask.types import CleanBatch

RATES = [k / 10 for k in range(11)]
_LARGEST = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, NOWHERE - 1, NOWHERE]
DISTANCES = [0.0, *map(float, _LARGEST)]
"""Edges of the bins of distance: 1, 2, 3, 4, 5 to 6, .., and a last bin for nothing visible."""
MIDDLE = (0.4, 0.6)
"""The masked shares, (low, high], of `MaskedNll.distance_middle`."""


@dataclass(frozen=True)
class MaskedNll:
    """The mean NLL of masked tokens (nats), in bins.

    A token weighs `L_b / n_b`, as in the NELBO. So for each list of bins `sum(share x value)` is the NELBO per maskable
    token, under the masks of `evaluation.nelbo`.
    """

    rate: list[Bin]
    """Bins of the masked share n_b / L_b of the row's (or block's) maskable positions."""
    distance: list[Bin]
    """Bins of the number of positions to the nearest visible token, on either side."""
    left: list[Bin]
    """Bins of the number of positions to the nearest visible token on the left. At 1, and with all that follows masked,
    this is an autoregressive model's task."""
    distance_middle: list[Bin]
    """The bins of `distance`, for masked shares in `MIDDLE` only. This separates the effect of distance from the effect
    of the masked share: where more is masked, visible tokens are further away."""


def measure_nll(run: LoadedRun, examples: CleanBatch, *, draws: int, on_progress: Callable[[float], None]) -> MaskedNll:
    """Measures the NLL of held-out examples in bins.

    Raises:
        NotApplicable: the model is causal, so nothing is ever masked, or the answers are not known as tokens.
    """
    trainer = run.trainer()
    if trainer.model.is_causal:
        raise NotApplicable("a causal model is asked with nothing masked: each token has its left neighbour")
    if not examples.is_known(run.tokens.mask_id):
        raise NotApplicable("the held-out answers are not known as tokens, so they have no likelihood")
    with trainer.weights(run.weights):
        return masked_nll(trainer.model, examples, draws=draws, on_progress=on_progress)


@torch.no_grad()
def masked_nll(
    model: Denoiser,
    examples: CleanBatch,
    *,
    draws: int,
    batch_size: int = 64,
    on_progress: Callable[[float], None] = lambda share: None,
) -> MaskedNll:
    """Measures the NLL under uniform masks: the masks that `nelbo` draws for these examples."""
    tally = _Tally(len(examples), count_blocks(examples.x0.shape[1], model.block_size))
    done = 0
    for rows, batch in uniform_masks(model, examples, draws=draws, seed=0, batch_size=batch_size):
        found = noise.wide(model(batch).nll)
        check_finite(batch.scatter(found, 0.0).sum(dim=-1).tolist(), "the model", "example", rows.tolist())
        nll = batch.scatter(found, nan).cpu().double()
        tally.add(rows, examples.prompt_mask[rows], batch.xt.cpu() == model.mask_id, nll)
        done += len(rows)
        on_progress(done / (draws * len(examples)))
    return tally.result()


class _Tally:
    """Sums over tokens, in the bins of all four lists of `MaskedNll`."""

    def __init__(self, num_examples: int, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.rate = Bins(RATES, num_examples)
        self.distance, self.left, self.middle = (Bins(DISTANCES, num_examples) for _ in range(3))

    def add(
        self,
        example: Int[Tensor, "B"],
        prompt_mask: Bool[Tensor, "B L"],
        is_masked: Bool[Tensor, "B L"],
        nll: Float[Tensor, "B L"],
    ) -> None:
        """Adds the tokens of a batch. `nll` is nan where nothing was predicted."""
        length = is_masked.shape[1]
        is_scored = ~nll.isnan()
        num_masked, num_maskable = (  # in the position's block
            over_positions(in_blocks(which, self.num_blocks).sum(dim=-1), length)
            for which in (is_masked & ~prompt_mask, ~prompt_mask)
        )
        left, right = distance_to_visible(is_masked, length // self.num_blocks)
        rate = num_masked[is_scored].double() / num_maskable[is_scored]  # in fp32, 3 / 10 would be above 0.3
        nearest = left.minimum(right)[is_scored]
        is_middle = (rate > MIDDLE[0]) & (rate <= MIDDLE[1])
        row = example.unsqueeze(1).expand_as(nll)[is_scored]
        weight, value = 1 / rate, nll[is_scored]
        self.rate.add(row, rate, weight, value)
        self.distance.add(row, nearest, weight, value)
        self.left.add(row, left[is_scored], weight, value)
        self.middle.add(row[is_middle], nearest[is_middle], weight[is_middle], value[is_middle])

    def result(self) -> MaskedNll:
        return MaskedNll(*(bins.means() for bins in (self.rate, self.distance, self.left, self.middle)))
