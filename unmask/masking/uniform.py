"""Masks drawn independently of the model: the standard masked diffusion baseline, other densities of times, and blocks.

A step draws a time t for every block and masks that share of it, chosen uniformly.
Dimensions: b rows of this process, N blocks of a row (1 in plain diffusion), S positions of a block, L of a row.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from unmask import noise
from unmask.blocks import count_blocks, in_blocks
from unmask.config.settings import Section, as_section, known
from unmask.data.stream import ExampleStream, examples_of
from unmask.masking import weights
from unmask.masking.process import IndependentBatches, ProcessContext, Requirements, RowShard, masked_batch
from unmask.masking.time import Density, TimeConfig, Uniform, masked_count, stratified
from unmask.masking.weights import WEIGHTS, MaskSample
from unmask.noise import Purpose
from unmask.reveal import most_confident
from unmask.types import CleanBatch, MaskedBatch

BLOCK_SIZE = "S: blocks of S positions, each predicted from the clean blocks before it; null = the row is one block"
TIME = "density of the masked fraction t: a name, or settings with a name"


def draw_exactly(
    q: Density, t: Float[Tensor, "b N"], eligible: Bool[Tensor, "b N S"], example: Int[Tensor, "b"], seed: int
) -> MaskSample:
    """Masks n = ceil(t L_b) positions of each block; P(n) is the mass of q on ((n - 1) / L_b, n / L_b]."""
    num_maskable = eligible.sum(dim=-1)
    count = masked_count(t, num_maskable)
    length = noise.wide(num_maskable.clamp(min=1))
    mass = q.cdf(count / length) - q.cdf((count - 1).clamp(min=0) / length)
    return MaskSample(
        is_masked=mask_exactly(eligible, count, example, seed),
        eligible=eligible,
        t=count.clamp(min=1) / length,
        ratio=length * mass,
        mean_t=q.mean,
    )


def draw_independently(
    q: Density, t: Float[Tensor, "b N"], eligible: Bool[Tensor, "b N S"], example: Int[Tensor, "b"], seed: int
) -> MaskSample:
    """Masks each position with probability t. A block may have nothing masked."""
    score = in_blocks(_noise(eligible, example, seed), eligible.shape[1])
    is_masked = eligible & (score < t.unsqueeze(-1))
    return MaskSample(is_masked=is_masked, eligible=eligible, t=t, ratio=q.density(t), mean_t=q.mean)


DRAWS: dict[str, Callable[..., MaskSample]] = {"exact": draw_exactly, "independent": draw_independently}


class RandomMasking(IndependentBatches):
    """Takes new examples every step, draws a time t for each block, and masks that share of it, chosen uniformly.

    With uniform t and the weight `per_masked` the loss is the NELBO per maskable token. Other densities of t train on
    other masks, to the same minimiser: a training loss under them is no NELBO, unless weighted by `importance` without
    a cap.

    Args:
        config: the settings; they may be given as keywords instead, as in `RandomMasking(weight="flat", ...)`.
        mask_id: the mask token.
        shard: the rows of the global batch that are trained here.
        seed: keys all noise.
        device: where batches are sent.

    Raises:
        UserError: wrong settings.
    """

    class Config(Section):
        """The settings of a section `process` named `uniform`."""

        aliases: ClassVar[dict[str, str]] = {"block_length": "block_size"}

        name: str = "uniform"
        time: TimeConfig = Field(Uniform(), description=TIME)
        weight: Annotated[str, known("weight", WEIGHTS)] = Field("per_masked", description=f"{', '.join(WEIGHTS)}")
        weight_cap: float | None = Field(
            None, ge=1, description="of importance: the largest factor by which rare times weigh more; it biases"
        )
        masking: Annotated[str, known("masking", DRAWS)] = Field(
            "exact", description="exact: n = ceil(t L) positions; independent: each with probability t"
        )
        block_size: int | None = Field(None, ge=1, description=BLOCK_SIZE)

        @model_validator(mode="after")
        def _check_cap(self) -> "RandomMasking.Config":
            if self.weight_cap is not None and self.weight != "importance":
                raise ValueError(
                    f"process.weight_cap={self.weight_cap:g} is for process.weight=importance, not {self.weight}; "
                    "set process.weight_cap=null"
                )
            return self

    def __init__(
        self,
        config: Config | None = None,
        *,
        mask_id: int,
        shard: RowShard,
        seed: int = 0,
        device: torch.device | str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(shard=shard, seed=seed, device=device)
        config = as_section(self.Config, config, settings, "process")
        self.mask_id = mask_id
        self.block_size = config.block_size
        self.time = config.time.build()
        self.draw = DRAWS[config.masking]
        capped = {} if config.weight_cap is None else {"cap": config.weight_cap}
        self.weight = partial(WEIGHTS[config.weight], **capped)
        self.requirements = Requirements(block_size=config.block_size)

    @classmethod
    def from_config(cls, config: Config, context: ProcessContext) -> "RandomMasking":
        """Builds the process that `config` describes.

        Raises:
            UserError: blocks that do not fill a row.
        """
        count_blocks(context.tokens.length, config.block_size)
        return cls(
            config, mask_id=context.tokens.mask_id, shard=context.shard, seed=context.seed, device=context.device
        )

    def draw_batch(self, stream: ExampleStream, step: int) -> MaskedBatch:
        """Returns this rank's rows of `step`: a function of the step alone."""
        rows = self.shard.index(torch.device("cpu"))
        example = step * self.shard.total + rows
        clean = examples_of(stream, example)
        eligible = in_blocks(~clean.prompt_mask, count_blocks(clean.x0.shape[1], self.block_size))
        t = stratified(self.time, rows, self.shard.total, self.seed, step, eligible.shape[1])
        sample = self.draw(self.time, t, eligible, example, self.seed)
        xt = torch.where(sample.is_masked.flatten(1), self.mask_id, clean.x0)
        return masked_batch(clean.x0, xt, self.mask_id, self.weight(sample))

    def metrics(self) -> dict[str, float]:
        """Returns the mean of the density of times: the masked share to expect, the same in every step."""
        return {"train/mean_t": self.time.mean}


def mask_blocks(
    clean: CleanBatch, t: Float[Tensor, "b N"], example: Int[Tensor, "b"], mask_id: int, seed: int, *keys: int
) -> MaskedBatch:
    """Masks n = ceil(t L_b) of the L_b maskable positions of each block; weight `weights.per_masked`."""
    eligible = in_blocks(~clean.prompt_mask, t.shape[1])
    is_masked = mask_exactly(eligible, masked_count(t, eligible.sum(dim=-1)), example, seed, *keys)
    xt = torch.where(is_masked.flatten(1), mask_id, clean.x0)
    return masked_batch(clean.x0, xt, mask_id, weights.per_masked(is_masked, eligible))


def mask_exactly(
    eligible: Bool[Tensor, "b N S"], count: Int[Tensor, "b N"], example: Int[Tensor, "b"], seed: int, *keys: int
) -> Bool[Tensor, "b N S"]:
    """Masks `count` eligible positions of each block, every set of that size equally likely; keyed by the example."""
    score = _noise(eligible, example, seed, *keys)
    return most_confident(in_blocks(score, eligible.shape[1]), eligible, count)


def _noise(eligible: Bool[Tensor, "b N S"], example: Int[Tensor, "b"], seed: int, *keys: int) -> Float[Tensor, "b L"]:
    position = torch.arange(eligible[0].numel(), device=eligible.device)
    return noise.uniform(seed, Purpose.MASK, *keys, example.unsqueeze(1), position)
