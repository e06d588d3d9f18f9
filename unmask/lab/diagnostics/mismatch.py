"""Measures how far the masks of training are from the masks that the decoder meets: PUMA's argument, as a number.

Masks are compared example by example: which cells of *this* board are masked. (Averaged over boards, PUMA's masks and
uniform ones can look the same.)

Dimensions: B rows, R examples, N blocks of a row, L positions, S positions of a block.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isnan, nan

import torch
from jaxtyping import Bool
from torch import Tensor

from unmask import noise
from unmask.blocks import count_blocks, in_blocks
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.decoding.decoder import Decoder
from unmask.decoding.trace import RecordingDecoder
from unmask.evaluation.nelbo import Estimate
from unmask.lab.diagnostics.measures import MaskSet, NotApplicable, bin_index, hamming, mmd2
from unmask.lab.diagnostics.simulation import simulate_masking
from unmask.masking.time import UNIFORM, stratified
from unmask.masking.uniform import mask_blocks
from unmask.noise import Purpose
from unmask.training.loading import LoadedRun
from unmask.training.trainer import Trainer
from unmask.types import CleanBatch

NUM_BINS = 5
COPIES = 8
"""Copies of each example in the simulated training."""
DECODINGS = 2
"""Decodings of each example: enough for MMD^2, and all equal if the decoder is not random."""
STEPS = 8
"""Smallest number of steps to simulate of the run's process, and the number of steps of uniform masks."""

Canvases = dict[int, MaskSet]
"""Masks by canvas: r N + n is the canvas of block n of row r (N = 1 in plain diffusion)."""


@dataclass(frozen=True)
class Distance:
    """MMD^2 between masks of training and of decoding, a mean over examples."""

    whole: Estimate
    """Between all masks, so that the number of masked positions counts too."""
    matched: Estimate
    """Between masks in the same bin of the masked share: the mean over the bins."""
    by_share: list[tuple[float, Estimate]]
    """The middle of each bin of the masked share, and MMD^2 between the masks in that bin."""
    differing: Estimate
    """The share of maskable positions at which a mask of training and a mask of decoding from the same bin differ, on
    average. (MMD^2 also compares the masks within each set.)"""


@dataclass(frozen=True)
class Mismatch:
    """The distances of two kinds of training masks to the masks that the decoder meets."""

    decoder: str
    examples: int
    trained: Distance
    """For the run's own masks."""
    uniform: Distance
    """For uniform masks."""


def measure_mismatch(
    run: LoadedRun, examples: CleanBatch, decoder: DecodeConfig, *, on_progress: Callable[[float], None]
) -> Mismatch:
    """Compares the masks of training and of decoding on held-out examples.

    Raises:
        NotApplicable: the model is causal, or the answers are not known as tokens.
    """
    trainer, model = run.trainer(), run.trainer().model
    if model.is_causal:
        raise NotApplicable("a causal model is trained and decodes left to right: there are no masks to differ")
    if not examples.is_known(run.tokens.mask_id):
        raise NotApplicable(
            "the held-out answers are not known as tokens, so no masks of training can be drawn for them"
        )
    size = model.block_size
    with trainer.weights(run.weights):
        decoded = find_decoding_masks(build_decoder(decoder, model, run.tokens), examples, trainer)
        on_progress(0.4)
        batches = simulate_masking(
            run, examples, copies=COPIES, least=STEPS, on_progress=lambda share: on_progress(0.4 + 0.5 * share)
        )
    mask_id = run.tokens.mask_id
    trained = group_by_canvas(
        ((torch.arange(len(batch.xt)), batch.xt == mask_id) for batch in batches), len(examples), size
    )
    uniform = group_by_canvas(_draw_uniform(examples, mask_id, size), len(examples), size)
    num_blocks = count_blocks(examples.x0.shape[1], size)
    maskable = in_blocks(~examples.prompt_mask, num_blocks).sum(dim=-1).tolist()  # L_b of every block (R, N)
    return Mismatch(
        decoder.label, len(examples), distance(trained, decoded, maskable), distance(uniform, decoded, maskable)
    )


def _draw_uniform(
    examples: CleanBatch, mask_id: int, block_size: int | None
) -> Iterator[tuple[Tensor, Bool[Tensor, "B L"]]]:
    """Draws the masks that `simulate_masking` would return for the process `uniform`."""
    rows = torch.arange(len(examples) * COPIES)
    every = CleanBatch(x0=examples.x0.repeat(COPIES, 1), prompt_mask=examples.prompt_mask.repeat(COPIES, 1))
    seed, num_blocks = noise.integer(0, Purpose.EVALUATE, 1), count_blocks(examples.x0.shape[1], block_size)
    for step in range(STEPS):
        t = stratified(UNIFORM, rows, len(rows), seed, step, num_blocks)
        yield rows, mask_blocks(every, t, rows, mask_id, seed, step).xt == mask_id


def find_decoding_masks(decoder: Decoder, examples: CleanBatch, trainer: Trainer) -> Canvases:
    """Records the masks of every decoding step; for a block model, those of the block that is being decoded."""
    recorder, device = RecordingDecoder(decoder), trainer.device
    recorder.decode(examples.masked(decoder.mask_id).repeat(DECODINGS, 1).to(device))
    steps = []
    for step in recorder.records:
        is_masked = step.xt == decoder.mask_id
        is_asked = torch.zeros(is_masked.numel(), dtype=torch.bool).index_fill(0, step.at, True).view(is_masked.shape)
        num_blocks = count_blocks(is_masked.shape[1], trainer.model.block_size)
        is_open = in_blocks(is_masked & is_asked, num_blocks).any(dim=-1, keepdim=True)
        steps.append((step.rows, (in_blocks(is_masked, num_blocks) & is_open).flatten(1)))
    return group_by_canvas(steps, len(examples), trainer.model.block_size)


def group_by_canvas(
    batches: Sequence[tuple[Tensor, Tensor]] | Iterator[tuple[Tensor, Tensor]],
    num_examples: int,
    block_size: int | None,
) -> Canvases:
    """Sorts the masks of batches (row, is_masked) by canvas. Row c R + r is copy c of example r.

    Blocks with nothing masked are left out.
    """
    found: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for rows, is_masked in batches:
        num_blocks = count_blocks(is_masked.shape[1], block_size)
        masked = in_blocks(is_masked, num_blocks)
        for i, n in masked.any(dim=-1).nonzero().tolist():
            copy, example = divmod(int(rows[i]), num_examples)
            found[example * num_blocks + n].append((copy, masked[i, n]))
    return {
        canvas: MaskSet(torch.stack([mask for _, mask in own]), torch.tensor([copy for copy, _ in own]))
        for canvas, own in found.items()
    }


def distance(trained: Canvases, decoded: Canvases, maskable: list[list[int]]) -> Distance:
    """Measures MMD^2 over the canvases, and bins of them, for which both sides have masks of two copies.

    `maskable` holds L_b of every block (R, N).
    """
    whole, matched, differing = [], [], []
    for r, lengths in enumerate(maskable):
        pairs = [
            _Pair(trained[canvas], decoded[canvas], length)
            for canvas, length in enumerate(lengths, start=r * len(lengths))
            if canvas in trained and canvas in decoded
        ]
        bins = [[pair.in_bin(k) for pair in pairs] for k in range(NUM_BINS)]
        whole.append(_mean([pair.mmd2() for pair in pairs]))
        matched.append([_mean([pair.mmd2() for pair in own]) for own in bins])
        differing.append(_mean([_mean([pair.differing() for pair in own]) for own in bins]))
    return Distance(
        whole=_over_examples(whole),
        matched=_over_examples([_mean(own) for own in matched]),
        by_share=[
            ((k + 0.5) / NUM_BINS, _over_examples(values))
            for k, values in enumerate(zip(*matched, strict=True))
            if not all(map(isnan, values))
        ],
        differing=_over_examples(differing),
    )


@dataclass(frozen=True)
class _Pair:
    """The masks of training and of decoding for one canvas."""

    x: MaskSet
    y: MaskSet
    num_maskable: int

    def in_bin(self, k: int) -> "_Pair":
        x, y = (
            side.where(bin_index(side.is_masked.sum(dim=1), torch.tensor(self.num_maskable), NUM_BINS) == k)
            for side in (self.x, self.y)
        )
        return _Pair(x, y, self.num_maskable)

    @property
    def is_enough(self) -> bool:
        return self.x.is_enough and self.y.is_enough

    def mmd2(self) -> float:
        return mmd2(self.x, self.y, self.num_maskable) if self.is_enough else nan

    def differing(self) -> float:
        if not self.is_enough:
            return nan
        return (hamming(self.x.is_masked, self.y.is_masked).mean() / self.num_maskable).item()


def _mean(values: Sequence[float]) -> float:
    """Returns the mean of the values that are not nan; nan if there are none."""
    known = [value for value in values if not isnan(value)]
    return sum(known) / len(known) if known else nan


def _over_examples(values: Sequence[float]) -> Estimate:
    """Returns the mean and its standard error; examples are independent."""
    known = torch.tensor([value for value in values if not isnan(value)], dtype=torch.float64)
    error = known.std().item() / len(known) ** 0.5 if len(known) > 1 else nan
    return Estimate(known.mean().item() if len(known) else nan, error)
