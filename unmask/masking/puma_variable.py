"""Progressive unmasking for answers of any length: so many tokens a step, no padding in the loss (PUMBA, appendix B).

PUMA's stages are fractions of the canvas. Where most of a canvas is padding, they say little about how much of the
answer is visible. Here a row starts fully masked and reveals a number of tokens in every step, until its answer is
visible.

In blocks, all of it holds for a block, which is predicted from the clean blocks before it: one that begins after the
end of the answer, as they show, has nothing to learn and starts done.

Dimensions: B rows of the global batch, b rows of this process, N blocks of a row (1 in plain diffusion), S positions of
a block, L of a row.
"""

from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from unmask.blocks import in_blocks, over_positions
from unmask.data.stream import ExampleStream
from unmask.masking import weights
from unmask.masking.pool import Pool, PoolConfig
from unmask.masking.pool_rows import PoolRows, new_rows
from unmask.reveal import most_confident
from unmask.types import CleanBatch, MaskedBatch, TokenStats


class VariablePumaPool(Pool):
    """The masking process: after a step, the `tokens_per_step` most confident and all above the threshold are revealed.

    Padding, which is what follows the first end token, is no part of the loss, but may be revealed as anything else:
    which positions are padding is hidden. A row is done when all of its answer is visible. The weight of a masked token
    is `min(1/t, weight_cap) / L_eff` with t the masked share of its block's whole canvas: it does not tell the answer's
    length. The cap biases: the loss is not the NELBO. Settings and arguments are those of `VariablePumaPool.Config` and
    `Pool`; without `eos_id` all of a canvas is the answer.
    """

    class Config(PoolConfig):
        """The settings of a section `process` named `puma_variable`."""

        aliases: ClassVar[dict[str, str]] = {"unmasking_num": "tokens_per_step"}

        name: str = "puma_variable"
        tokens_per_step: int = Field(32, ge=1, description="u: tokens that a block reveals after every step")
        threshold: float | None = Field(
            0.9, gt=0, le=1, description="also reveal at once what the model gives more than this probability"
        )
        weight_cap: float = Field(5.0, gt=0, description="largest 1/t in the loss")

    config: Config

    def comes_back(self, rows: PoolRows) -> bool:
        """True unless a step reveals as many tokens as a block has."""
        return self.config.tokens_per_step < rows.masked.shape[-1]

    def next_batch(self, stream: ExampleStream) -> MaskedBatch:
        """Returns the pool as it stands, with examples of `stream` in place of rows that are done.

        The loss is `sum(weight * nll) / B`. Called again before `observe`, it gives the same batch.
        """
        rows = self.renewed_rows(stream)
        weight = over_positions(weights.capped(rows.masked, rows.eligible, self.config.weight_cap), rows.x0.shape[1])
        is_left = rows.is_masked & self._is_answer(rows)
        return self.batch_of(weight * is_left)

    @torch.no_grad()
    def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
        """Reveals more of every block; `stats` are the model's on `batch`, before its update."""
        rows = self.rows
        assert rows is not None, "observe follows next_batch"
        score = self.scores(rows, batch, stats)
        # 1. The most confident positions of every block are revealed, with their true tokens.
        count = torch.full_like(rows.stage, self.config.tokens_per_step)
        reveal = most_confident(score, rows.masked, count)
        # 2. So is whatever the model is sure of.
        if self.rule is not None:
            reveal = reveal | self.rule(self.reveal_state(rows, batch, stats, score))
        # 3. A block is done when nothing of the answer is masked: the padding that still is tells nothing new.
        is_left = rows.masked & ~reveal & rows.in_blocks(self._is_answer(rows))
        self.advance(rows, stats, reveal=reveal, stage=rows.stage + 1, is_done=~is_left.any(dim=-1))
        self.renew_ahead()

    def _is_answer(self, rows: PoolRows) -> Bool[Tensor, "b L"]:
        return CleanBatch(x0=rows.x0, prompt_mask=rows.prompt_mask).answer_mask(self.eos_id)

    def _has_left(self, rows: PoolRows) -> Bool[Tensor, "b N"]:
        """True where something of the answer is masked."""
        return rows.in_blocks(rows.is_masked & self._is_answer(rows)).any(dim=-1)

    def first_rows(self, clean: CleanBatch, example: Int[Tensor, "b"], place: Int[Tensor, "b N"]) -> PoolRows:
        """Spreads rows evenly from all masked to almost nothing; where no answer is left to learn, all is masked."""
        num_maskable = in_blocks(~clean.prompt_mask, place.shape[1]).sum(dim=-1)
        num_revealed = place * num_maskable // (self.shard.total * place.shape[1])
        rows = new_rows(clean, example, torch.zeros_like(place), num_revealed, self.seed)
        has_left = over_positions(self._has_left(rows), clean.x0.shape[1])
        fresh = self.fresh_rows(clean, example, place.shape[1])
        rows.is_masked = torch.where(has_left, rows.is_masked, fresh.is_masked)
        return rows

    def fresh_rows(self, clean: CleanBatch, example: Int[Tensor, "b"], num_blocks: int) -> PoolRows:
        """Makes rows that are all masked, but for blocks beyond the end of the answer, which start done."""
        none = torch.zeros(len(example), num_blocks, dtype=torch.long, device=self.device)
        rows = new_rows(clean, example, none, none, self.seed)
        rows.is_masked = rows.is_masked & over_positions(self._has_left(rows), clean.x0.shape[1])
        return rows
