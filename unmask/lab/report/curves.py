"""Reads a run's metrics as curves, and measures the masks that it trains on and that its model meets in decoding.

Dimensions: B rows, N blocks of a row (1 in plain diffusion), S positions of a block, L of a row, C canvases.
"""

from bisect import bisect_left
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean as mean
from typing import Any, TypeGuard

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask import files
from unmask.blocks import count_blocks, in_blocks
from unmask.decoding.decoder import Decoder
from unmask.decoding.trace import RecordingDecoder
from unmask.errors import UserError
from unmask.formats import printable, read_bytes
from unmask.lab.report.chart import Points, is_drawable
from unmask.lab.report.measures import Measure
from unmask.training.folder import RunFolder
from unmask.training.logging import RESUMED, lines_that_count
from unmask.training.trainer import Trainer
from unmask.types import CleanBatch

AXES = ("step", "seconds", "passes", "examples_seen")
"""The keys of a row that say what a run has cost so far. `passes` may be unknown: older runs did not count them."""

MetricsRow = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """The amount spent until a level was reached."""

    spent: float
    is_most: bool = False
    """True if `spent` is an upper bound: the first evaluation had reached the level already."""
    is_least: bool = False
    """True if `spent` is a lower bound, all that was spent: the level was not reached."""


@dataclass(frozen=True)
class Curve:
    """The values of one measure at each evaluation, and the amounts spent by then, by axis as far as they are known."""

    values: tuple[float, ...]
    spent: dict[str, tuple[float, ...]]
    is_share: bool = True
    """True for a share of examples, where more is better; False for a likelihood cost, where less is."""
    examples: int | None = None
    """The number of examples of a share, at the last evaluation; None if it is unknown."""

    @staticmethod
    def of(rows: Iterable[MetricsRow], measure: str) -> "Curve":
        """Collects the lines of metrics that have a finite `measure`."""
        rows = [row for row in rows if is_finite(row.get(measure))]
        known = Measure.named(measure)
        counted = rows[-1].get(known.count) if rows else None
        return Curve(
            values=tuple(float(row[measure]) for row in rows),
            spent={axis: tuple(float(row[axis]) for row in rows) for axis in known_axes(rows)},
            is_share=known.is_share,
            examples=counted if type(counted) is int and 0 < counted <= _MOST_SPENT else None,
        )

    @cached_property
    def _pools(self) -> list[tuple[int, int, float]]:
        """The curve without its noise: the monotone one that is nearest in squares (isotonic regression).

        Neighbouring evaluations that go the wrong way are pooled: (first, end, mean value) of each pool.
        """
        sign = 1.0 if self.is_share else -1.0
        pools: list[tuple[int, int, float]] = []
        for number, value in enumerate(self.values):
            first, end, pooled = number, number + 1, value
            while pools and sign * pools[-1][2] > sign * pooled:
                before, middle, other = pools.pop()
                pooled = other + (pooled - other) * ((end - middle) / (end - before))
                first = before
            pools.append((first, end, pooled))
        return pools

    @property
    def final(self) -> float:
        """The value at the end, without its noise: a mean of the last evaluations, unless they still improve."""
        return self._pools[-1][2]

    def cost(self, level: float, axis: str) -> Cost:
        """Returns the amount spent on `axis` when the measure reached `level`; a bound if it was never or always there.

        The first evaluation above a level would often be there by luck. So the curve without its noise is taken, on
        straight lines between the middles of its pools.
        """
        sign = 1.0 if self.is_share else -1.0
        number = bisect_left(self._pools, sign * level, key=lambda pool: sign * pool[2])
        if number == len(self._pools):
            return Cost(self.spent[axis][-1], is_least=True)
        at = mean(self.spent[axis][slice(*self._pools[number][:2])])
        if number == 0:
            return Cost(at, is_most=True)
        first, end, before = self._pools[number - 1]
        at_before, after = mean(self.spent[axis][first:end]), self._pools[number][2]
        return Cost(at_before + (level - before) / (after - before) * (at - at_before))

    def at(self, steps: Sequence[float], axis: str) -> list[tuple[float, float]]:
        """Returns the amount spent on `axis` and the value at `steps` within the run, linearly interpolated."""
        own = self.spent["step"]
        spent, values = np.interp(steps, own, self.spent[axis]), np.interp(steps, own, self.values)
        return list(zip(spent.tolist(), values.tolist(), strict=True))


def fewest_examples(curves: Sequence[Curve]) -> int | None:
    """Returns the number of examples of an evaluation, the fewest of these seeds; None if one does not know it."""
    return min((curve.examples or 0 for curve in curves), default=0) or None


def known_axes(spent: Iterable[Container[str]]) -> list[str]:
    """Lists the axes that all of these curves, or rows of metrics, have."""
    spent = list(spent)
    return [axis for axis in AXES if all(axis in own for own in spent)]


def is_finite(value: Any) -> TypeGuard[float]:
    """True if `value` can be drawn: a run that diverged has written null, and a broken line may hold anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and is_drawable(value)


def read_metrics(run: Path, warn: Callable[[str], None], *, is_running: bool = False) -> list[MetricsRow]:
    """Reads the valid lines of `metrics.jsonl`, and calls `warn` for every line that is not a JSON object of metrics.

    If the run `is_running`, a last line without a newline is still being written, and is left out.

    Raises:
        UserError: the file cannot be read.
    """
    path = RunFolder(run).metrics
    content = read_bytes(path, max_bytes=2**30)
    if is_running:
        content = content[: content.rfind(b"\n") + 1]
    rows, complaints = [], []
    for number, line in lines_that_count(content):
        row = _row(line)
        if row is not None:
            rows.append(row)
            bad = [key for key, value in row.items() if isinstance(value, int | float) and not is_drawable(value)]
            complaints += [f"line {number}: {printable(key)[:60]} is not drawn: {str(row[key])[:20]}" for key in bad]
        elif line:
            complaints.append(f"line {number}: not a line of metrics; skipped")
    for complaint in complaints[:_MOST_COMPLAINTS]:
        warn(f"{path}, {complaint}")
    if len(complaints) > _MOST_COMPLAINTS:
        warn(f"{path}: and {len(complaints) - _MOST_COMPLAINTS:,} more like these")
    return rows


def _row(line: str) -> MetricsRow | None:
    try:
        row = files.parse_object(line)
    except ValueError:
        return None
    # `lines_that_count` has taken out the lines that say where a run was resumed: one that is left is damaged.
    spent = [row.get(axis) for axis in AXES if axis != "passes" or axis in row]
    is_sound = RESUMED not in row and all(is_finite(at) and 0 <= at <= _MOST_SPENT for at in spent)
    return row if is_sound else None


_MOST_COMPLAINTS = 5
_MOST_SPENT = 1e18  # steps, seconds, passes or examples

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
    """Measures the next batches of a run, as its averaged weights see them, if there are any.

    Advances the process; trains nothing.
    """
    if trainer.model.is_causal:
        raise UserError("a causal model is trained on no masks")
    seen, weights = [], "raw" if trainer.ema is None else "ema"
    trainer.model.eval()
    with torch.no_grad(), trainer.weights(weights):
        for _ in range(num_batches):
            batch = trainer.process.next_batch(trainer.stream)
            stats = trainer.model(batch)
            trainer.process.observe(batch, stats)
            is_masked = batch.xt == trainer.tokens.mask_id
            seen.append(
                _canvas_statistics(is_masked, batch.scatter(stats.top1, 0.0), trainer.process.requirements.block_size)
            )
    return _concatenate(seen)


def measure_decoding_masks(
    decoder: Decoder, examples: CleanBatch, *, block_size: int | None, device: torch.device
) -> MaskStatistics:
    """Measures the canvases of every decoding step of `examples`; for a block model, the block being decoded."""
    recorder = RecordingDecoder(decoder)
    recorder.decode(examples.masked(decoder.mask_id).to(device))
    seen = []
    for step in recorder.records:
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
