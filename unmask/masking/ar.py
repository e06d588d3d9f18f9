"""The autoregressive baseline: nothing is masked, and every token is predicted from those before it.

Dimensions: b rows of this process, B of the global batch, L positions.
"""

from dataclasses import replace

import torch

from unmask.config.settings import Section
from unmask.data.stream import ExampleStream, examples_of
from unmask.masking.process import IndependentBatches, ProcessContext, Requirements, RowShard, make_batch
from unmask.types import MaskedBatch


class NextToken(IndependentBatches):
    """Takes new examples every step and scores their answers, up to and including the first end token.

    The loss, which is divided by B, is the mean NLL over the tokens of the global batch: each weighs `B / tokens`,
    never 1 / length. Needs a causal model.

    Args:
        eos_id: the end token; default: all of a canvas is the answer.
    """

    requirements = Requirements(is_causal=True)

    class Config(Section):
        """The settings of a section `process` named `ar`: none."""

        name: str = "ar"

    def __init__(
        self, *, shard: RowShard, eos_id: int | None = None, seed: int = 0, device: torch.device | str | None = None
    ) -> None:
        super().__init__(shard=shard, seed=seed, device=device)
        self.eos_id = eos_id

    @classmethod
    def from_config(cls, config: Config, context: ProcessContext) -> "NextToken":
        """Builds the process that `config` describes."""
        return cls(shard=context.shard, eos_id=context.tokens.eos_id, seed=context.seed, device=context.device)

    def draw_batch(self, stream: ExampleStream, step: int) -> MaskedBatch:
        """Returns this rank's rows of `step`, in which every token weighs 1."""
        clean = examples_of(stream, step * self.shard.total + self.shard.index(torch.device("cpu")))
        weight = torch.ones(clean.x0.shape, dtype=torch.float64)
        return make_batch(clean.x0, clean.x0, clean.answer_mask(self.eos_id), weight)

    def synchronise(self, batch: MaskedBatch) -> MaskedBatch:
        """Returns `batch` with the weight `B / tokens`, tokens counted over the global batch."""
        tokens = self.shard.peers.sum(batch.weight.sum())
        return replace(batch, weight=batch.weight * (self.shard.known / max(1, tokens.item())))
