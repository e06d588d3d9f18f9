"""Progressive unmasking for answers of any length: so many tokens a step, no padding in the loss (PUMBA, appendix B).

PUMA's stages are fractions of the canvas. Where most of a canvas is padding, they say little about how much of the
answer is visible. Here a row starts fully masked and reveals a number of tokens in every step, until its answer is
visible.

Dimensions: B rows of the global batch, b rows of this process, L positions.
"""

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from unmask.config import OrderName, Section
from unmask.masking import weights
from unmask.masking.causal import is_answer
from unmask.masking.pool import Pool, PoolRows, new_rows
from unmask.masking.process import ProcessContext, RowShard, score
from unmask.types import CleanBatch, MaskedBatch


class VariablePumaPool(Pool):
    """The masking process: after a step, the `tokens_per_step` surest and all above the threshold are revealed.

    Padding, which is what follows the first end token, is no part of the loss, but may be revealed as anything else:
    which positions are padding is hidden. A row is done when all of its answer is visible. The weight of a masked token
    is `min(1/t, weight_cap) / L_eff` with t the masked share of the whole canvas: it does not tell the answer's length.

    Args:
        tokens_per_step: u, revealed after every step.
        weight_cap: keeps the weights of rows that are almost visible in bounds. It biases: the loss is not the NELBO.
        eos_id: the end token; None: all of a canvas is the answer.
    """

    class Config(Section):
        name: str = "puma_variable"
        tokens_per_step: int = Field(32, ge=1, description="u: tokens revealed after every step")
        threshold: float | None = Field(
            0.9, gt=0, le=1, description="also reveal at once what the model gives more than this probability"
        )
        confidence: OrderName = Field("prob", description="what orders the reveals")
        weight_cap: float = Field(5.0, gt=0, description="largest 1/t in the loss")

    def __init__(
        self,
        *,
        mask_id: int,
        shard: RowShard,
        tokens_per_step: int = 32,
        threshold: float | None = 0.9,
        confidence: str = "prob",
        weight_cap: float = 5.0,
        eos_id: int | None = None,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            mask_id=mask_id, shard=shard, threshold=threshold, confidence=confidence, seed=seed, device=device
        )
        self.tokens_per_step = tokens_per_step
        self.weight_cap = weight_cap
        self.eos_id = eos_id

    @classmethod
    def from_config(cls, config: Config, context: ProcessContext) -> "VariablePumaPool":
        return cls(
            mask_id=context.tokens.mask_id,
            shard=context.shard,
            tokens_per_step=config.tokens_per_step,
            threshold=config.threshold,
            confidence=config.confidence,
            weight_cap=config.weight_cap,
            eos_id=context.tokens.eos_id,
            seed=context.seed,
            device=context.device,
        )

    def _count(self, pool: PoolRows) -> Int[Tensor, "b"]:
        return torch.full_like(pool.stage, self.tokens_per_step)

    def _advance(self, pool: PoolRows) -> Bool[Tensor, "b"]:
        pool.stage = pool.stage + 1
        return ~self._is_left(pool).any(dim=-1)

    def _is_left(self, pool: PoolRows) -> Bool[Tensor, "b L"]:
        """What of the answer is still masked."""
        return pool.is_masked & is_answer(CleanBatch(x0=pool.x0, prompt_mask=pool.prompt_mask), self.eos_id)

    def _first_rows(self, clean: CleanBatch, example: Int[Tensor, "b"], order: Int[Tensor, "b"]) -> PoolRows:
        """Spread evenly from all masked to almost nothing; what leaves no answer to learn starts all masked."""
        num_maskable = (~clean.prompt_mask).sum(dim=-1)
        spread = new_rows(
            clean, example, torch.zeros_like(example), order * num_maskable // self.shard.total, self.seed
        )
        spread.is_done = ~self._is_left(spread).any(dim=-1)
        return spread.replaced_where_done(self._fresh_rows(clean, example))

    def _fresh_rows(self, clean: CleanBatch, example: Int[Tensor, "b"]) -> PoolRows:
        return new_rows(clean, example, torch.zeros_like(example), torch.zeros_like(example), self.seed)

    def _as_batch(self, pool: PoolRows) -> MaskedBatch:
        weight = weights.capped(pool.is_masked, pool.num_maskable, self.weight_cap).unsqueeze(1) * self._is_left(pool)
        return score(pool.x0, pool.xt(self.mask_id), pool.is_masked, weight)
