"""Measures the noise of the gradient at each masked share: the simple noise scale (McCandlish et al. 2018, 1812.06162).

Dimensions: P parameters, A groups of gradients, L positions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import nan

import torch
from jaxtyping import Float
from torch import Tensor

from unmask import noise
from unmask.blocks import count_blocks, in_blocks
from unmask.errors import NOT_FINITE_FIX, NotFinite
from unmask.evaluation.nelbo import Estimate
from unmask.lab.diagnostics.measures import bin_index
from unmask.lab.diagnostics.simulation import simulate_masking
from unmask.masking.process import make_batch
from unmask.models.denoiser import Denoiser
from unmask.training.loading import LoadedRun
from unmask.types import CleanBatch, MaskedBatch

NUM_BINS = 5
_GROUPS = 8


@dataclass(frozen=True)
class BinNoise:
    """The gradient noise of canvases (rows, or blocks of them) whose masked share is in (low, high].

    Canvases with nothing masked, such as a causal model's, have both bounds 0.
    """

    low: float
    high: float
    canvases: int
    signal: Estimate
    """|G|^2, the squared norm of the mean gradient. Unbiased, so it may be negative."""
    variance: Estimate
    """tr(Sigma), the sum of the variances of one canvas's gradient. Unbiased."""
    scale: Estimate
    """tr(Sigma) / |G|^2: the number of canvases in a batch for which noise and signal are equal."""

    @property
    def is_measured(self) -> bool:
        """True if |G|^2 is two standard errors above 0; if not, only the lower bound `least` of the scale is known."""
        return self.signal.value > 2 * _known(self.signal.stderr)

    @property
    def least(self) -> float:
        """The lower bound of the scale that takes |G|^2 two standard errors above its estimate."""
        return self.variance.value / (max(0.0, self.signal.value) + 2 * _known(self.signal.stderr))


@dataclass(frozen=True)
class NoiseScale:
    weights: str
    bins: list[BinNoise]


def measure_noise_scale(
    run: LoadedRun, *, weights: str = "raw", per_bin: int, on_progress: Callable[[float], None]
) -> NoiseScale:
    """Measures the gradient noise of the run's loss, on its own masks of the training examples that come next."""
    trainer, model = run.trainer(), run.trainer().model
    upcoming = trainer.process.examples_seen + 2 * trainer.shard.total + torch.arange(NUM_BINS * per_bin)
    examples = trainer.stream[upcoming]
    with trainer.weights(weights):
        batches = simulate_masking(run, examples, copies=1, least=1, on_progress=lambda share: on_progress(0.4 * share))
        units = _units(batches, examples, model, per_bin)
        moments: dict[int, Moments] = {}
        for done, (number, unit) in enumerate(units, start=1):
            moments.setdefault(number, Moments()).add(gradient(model, unit.to(trainer.device)))
            on_progress(0.4 + 0.6 * done / len(units))
    bins = [
        BinNoise(max(0, k) / NUM_BINS, (k + 1) / NUM_BINS, own.count, *own.estimates())
        for k, own in sorted(moments.items())
    ]
    return NoiseScale(weights, bins)


def _units(
    batches: Sequence[MaskedBatch], examples: CleanBatch, model: Denoiser, per_bin: int
) -> list[tuple[int, MaskedBatch]]:
    """Collects canvases with the number of their bin (-1: nothing is masked), each example at most once in each bin."""
    found: dict[int, dict[int, MaskedBatch]] = {}
    for batch in batches:
        for row, number, unit in _canvases(batch, examples, model):
            own = found.setdefault(number, {})
            if len(own) < per_bin:
                own.setdefault(row, unit)
    return [(number, unit) for number, own in found.items() for unit in own.values()]


def _canvases(batch: MaskedBatch, examples: CleanBatch, model: Denoiser) -> Iterator[tuple[int, int, MaskedBatch]]:
    """Yields row, number of the bin, and a batch of that canvas alone, for each canvas that has a loss."""
    is_scored = batch.scatter(torch.ones(len(batch.scored)), 0.0) > 0
    weights, num_blocks = batch.scatter(batch.weight, 0.0), count_blocks(batch.x0.shape[1], model.block_size)
    is_masked = (batch.xt == model.mask_id) & ~examples.prompt_mask
    count, maskable = (in_blocks(x, num_blocks).sum(dim=-1) for x in (is_masked, ~examples.prompt_mask))
    bins = bin_index(count, maskable, NUM_BINS)
    for row, n in in_blocks(is_scored, num_blocks).any(dim=-1).nonzero().tolist():
        own = torch.zeros_like(in_blocks(is_scored[row : row + 1], num_blocks))
        own[:, n] = True
        one = slice(row, row + 1)
        unit = make_batch(batch.x0[one], batch.xt[one], is_scored[one] & own.flatten(1), weights[one])
        yield row, int(bins[row, n]), unit


def gradient(model: Denoiser, batch: MaskedBatch) -> Float[Tensor, "P"]:
    """Computes the gradient of the batch's loss, summed over its rows."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    stats = model(batch)
    (stats.nll * batch.weight.to(stats.nll.dtype)).sum().backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([part.flatten() for part in parts])
    model.zero_grad()
    if not flat.isfinite().all():
        raise NotFinite(f"the model gives a gradient that is not finite: {NOT_FINITE_FIX}")
    return flat


class Moments:
    """Running sums over independent gradients g, from which |G|^2 and tr(Sigma) follow without keeping each gradient.

    With S the sum of n gradients and q the sum of their squared norms, `(|S|^2 - q) / (n (n - 1))` estimates |G|^2
    without bias, and `q / n` minus that estimates tr(Sigma). (This is appendix A.1 of McCandlish et al., with a small
    batch of 1 and a large one of n.) Standard errors are jackknifed: one group of gradients is left out at a time.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[Tensor] = []
        self._squares = torch.zeros(_GROUPS, dtype=torch.float64)
        self._counts = torch.zeros(_GROUPS, dtype=torch.float64)

    def add(self, g: Float[Tensor, "P"]) -> None:
        group = self.count % _GROUPS
        if group == len(self._sums):
            self._sums.append(torch.zeros_like(g))
        self._sums[group] += g
        self._squares[group] += noise.wide(g).square().sum().item()
        self._counts[group] += 1
        self.count += 1

    def estimates(self) -> tuple[Estimate, Estimate, Estimate]:
        """Returns |G|^2, tr(Sigma) and their ratio; nan for fewer than two gradients, the ratio also without signal."""
        used = len(self._sums)
        products = torch.tensor(  # in float64, as their sum nearly cancels `q`
            [[(noise.wide(a) @ noise.wide(b)).item() for b in self._sums] for a in self._sums], dtype=torch.float64
        )
        q, n = self._squares[:used], self._counts[:used]
        whole = _moments(products.sum().item(), q.sum().item(), n.sum().item())
        left_out = [
            _moments(
                (products.sum() - 2 * products[a].sum() + products[a, a]).item(),
                (q.sum() - q[a]).item(),
                (n.sum() - n[a]).item(),
            )
            for a in range(used)
        ]
        signal, variance, scale = (
            Estimate(value, _jackknife(others))
            for value, others in zip(whole, zip(*left_out, strict=True), strict=True)
        )
        return signal, variance, scale


def _known(error: float | None) -> float:
    return nan if error is None else error


def _moments(square_of_sum: float, sum_of_squares: float, n: float) -> tuple[float, float, float]:
    if n < 2:
        return nan, nan, nan
    signal = (square_of_sum - sum_of_squares) / (n * (n - 1))
    variance = sum_of_squares / n - signal
    return signal, variance, variance / signal if signal > 0 else nan


def _jackknife(values: Sequence[float]) -> float:
    """Computes the standard error from estimates that each leave out one group; nan from one estimate."""
    if len(values) < 2:
        return nan
    each = torch.tensor(values, dtype=torch.float64)
    return ((len(each) - 1) / len(each) * ((each - each.mean()) ** 2).sum()).sqrt().item()
