"""Reading with a self-conditioned model: what it said in a step is told to it in the next (`models/conditioning.py`).

Dimensions: B rows, b rows that are still open, L positions, M positions asked for, n that are read, D width.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmask.decoding.reading import Blocks, InHiddenStates
from unmask.models.conditioning import placed
from unmask.types import Ask, Prediction


class SelfConditioned:
    """Tells the model of `states` what it last expected of every masked position that it reads.

    In the first step that is nothing. Of a block model the positions are those of the block that is being decoded; with
    a cache those of the window, and what was expected of the others stays. A pass serves the answer and the estimate,
    so there are as many passes as without.
    """

    def __init__(self, states: InHiddenStates, xt: Int[Tensor, "B L"]) -> None:
        self.states, self.model = states, states.model
        self.estimate = self.model.nothing_expected(xt)

    def __call__(self, xt: Int[Tensor, "b L"], at: Int[Tensor, "M"], ask: Ask, blocks: Blocks) -> Prediction:
        is_masked = xt == self.model.mask_id
        read = self.states.read(xt, blocks)
        position = torch.arange(xt.shape[1], device=xt.device)
        is_guessed = is_masked & (position >= read.start.unsqueeze(1)) & (position < read.stop.unsqueeze(1))
        where = is_guessed.flatten().index_fill(0, at, True).nonzero().squeeze(1)
        self._forget(~is_masked)  # has since been revealed
        hidden = self.states.hidden(xt, where, read, self.estimate)
        self._forget(is_guessed)
        self.estimate = self.estimate + placed(self.model.expected(hidden, ask.forbidden), where, is_guessed)
        return self.model.answer(hidden.index_select(0, torch.searchsorted(where, at)), ask)

    def _forget(self, where: Bool[Tensor, "b L"]) -> None:
        self.estimate = self.estimate.masked_fill(where.unsqueeze(-1), 0.0)

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        self.estimate = self.estimate[rows]
        self.states.keep(rows)
