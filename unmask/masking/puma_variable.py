"""Progressive unmasking for answers of any length: so many tokens a step, no padding in the loss (PUMBA, appendix B).

PUMA's stages are fractions of the canvas. Where most of a canvas is padding, they say little about how much of the
answer is visible. Here a row starts fully masked and reveals a number of tokens in every step, until its answer is
visible.

In blocks, all of it holds for a block, which is predicted from the clean blocks before it: one that begins after the
end of the answer, as they show, has nothing to learn and starts done.

Dimensions: B rows of the global batch, b rows of this process, N blocks of a row (1 in plain diffusion), S positions of
a block, L of a row.
"""

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from unmask.blocks import count_blocks, in_blocks, over_positions
from unmask.errors import require
from unmask.masking import weights
from unmask.masking.ar import is_answer
from unmask.masking.pool import Pool, PoolConfig, PoolRows, new_rows, parallel_rule
from unmask.masking.process import ProcessContext, RowShard, score
from unmask.types import CleanBatch, MaskedBatch


class VariablePumaPool(Pool):
    """The masking process: after a step, the `tokens_per_step` surest and all above the threshold are revealed.

    Padding, which is what follows the first end token, is no part of the loss, but may be revealed as anything else:
    which positions are padding is hidden. A row is done when all of its answer is visible. The weight of a masked token
    is `min(1/t, weight_cap) / L_eff` with t the masked share of its block's whole canvas: it does not tell the answer's
    length.

    Args:
        tokens_per_step: u, which every block reveals after every step.
        threshold: also reveal what the model gives more than this probability; `factor` and `entropy_bound` in place of
            it are as in `PumaPool`.
        weight_cap: keeps the weights of rows that are almost visible in bounds. It biases: the loss is not the NELBO.
        eos_id: the end token; None: all of a canvas is the answer.
    """

    class Config(PoolConfig):
        name: str = "puma_variable"
        tokens_per_step: int = Field(32, ge=1, description="u: tokens that a block reveals after every step")
        threshold: float | None = Field(
            0.9, gt=0, le=1, description="also reveal at once what the model gives more than this probability"
        )
        weight_cap: float = Field(5.0, gt=0, description="largest 1/t in the loss")

    def __init__(
        self,
        *,
        mask_id: int,
        shard: RowShard,
        tokens_per_step: int = 32,
        threshold: float | None = 0.9,
        factor: float | None = None,
        entropy_bound: float | None = None,
        confidence: str = "prob",
        weight_cap: float = 5.0,
        eos_id: int | None = None,
        block_size: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            mask_id=mask_id,
            shard=shard,
            also=parallel_rule(confidence, threshold=threshold, factor=factor, entropy_bound=entropy_bound),
            confidence=confidence,
            block_size=block_size,
            seed=seed,
            device=device,
        )
        require(tokens_per_step >= 1, "tokens_per_step", tokens_per_step, "1 or more")
        self.tokens_per_step = tokens_per_step
        self.weight_cap = weight_cap
        self.eos_id = eos_id

    @classmethod
    def from_config(cls, config: Config, context: ProcessContext) -> "VariablePumaPool":
        count_blocks(context.tokens.length, config.block_size)  # refuses what does not divide
        return cls(
            mask_id=context.tokens.mask_id,
            shard=context.shard,
            tokens_per_step=config.tokens_per_step,
            threshold=config.threshold,
            factor=config.factor,
            entropy_bound=config.entropy_bound,
            confidence=config.confidence,
            weight_cap=config.weight_cap,
            eos_id=context.tokens.eos_id,
            block_size=config.block_size,
            seed=context.seed,
            device=context.device,
        )

    def _count(self, pool: PoolRows) -> Int[Tensor, "b N"]:
        return torch.full_like(pool.stage, self.tokens_per_step)

    def _advance(self, pool: PoolRows) -> Bool[Tensor, "b N"]:
        pool.stage = pool.stage + 1
        return ~self._has_left(pool)

    def _is_left(self, pool: PoolRows) -> Bool[Tensor, "b L"]:
        """What of the answer is still masked."""
        return pool.is_masked & is_answer(CleanBatch(x0=pool.x0, prompt_mask=pool.prompt_mask), self.eos_id)

    def _has_left(self, pool: PoolRows) -> Bool[Tensor, "b N"]:
        return pool.in_blocks(self._is_left(pool)).any(dim=-1)

    def _first_rows(self, clean: CleanBatch, example: Int[Tensor, "b"], order: Int[Tensor, "b N"]) -> PoolRows:
        """Spread evenly from all masked to almost nothing; what leaves no answer to learn starts all masked."""
        num_maskable = in_blocks(~clean.prompt_mask, order.shape[1]).sum(dim=-1)
        num_revealed = order * num_maskable // (self.shard.total * order.shape[1])
        rows = new_rows(clean, example, torch.zeros_like(order), num_revealed, self.seed)
        has_left = over_positions(self._has_left(rows), clean.x0.shape[1])
        rows.is_masked = torch.where(has_left, rows.is_masked, self._fresh_rows(clean, example).is_masked)
        return rows

    def _fresh_rows(self, clean: CleanBatch, example: Int[Tensor, "b"]) -> PoolRows:
        none = example.new_zeros(len(example), self._num_blocks(clean))
        rows = new_rows(clean, example, none, none, self.seed)
        rows.finish(~self._has_left(rows))  # beyond the end of the answer
        return rows

    def _as_batch(self, pool: PoolRows) -> MaskedBatch:
        weight = over_positions(weights.capped(pool.masked, pool.eligible, self.weight_cap), pool.x0.shape[1])
        return score(pool.x0, pool.xt(self.mask_id), pool.is_masked, weight * self._is_left(pool))
