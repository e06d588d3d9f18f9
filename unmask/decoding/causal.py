"""Left-to-right decoding of a causal model: each step reads one token, and remembers the keys and values of the rest.

Dimensions: B rows, L positions, b rows that are still open, n tokens read at once.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from unmask.decoding.sampling import Sampling
from unmask.errors import UserError
from unmask.models.attention import KeyValueCache
from unmask.models.denoiser import Denoiser
from unmask.types import Decoded, Prediction, Query


@dataclass(frozen=True)
class CausalDecoder:
    """Fills in what follows each prompt, token by token. The same tokens as `Decoder` with the order `left_to_right`.

    A row is finished when it says `eos_id`: what is left is filled with it, without further passes, and the row leaves
    the batch.

    Args:
        model: a causal denoiser.
        eos_id: ends an answer, and pads it; None: answers are as long as the canvas.
        sampling: how tokens are chosen.
    """

    model: Denoiser
    mask_id: int
    eos_id: int | None = None
    sampling: Sampling = field(default_factory=Sampling)

    def decode(self, xt: Int[Tensor, "B L"], prompt: Int[Tensor, "B"] | None = None) -> Decoded:
        """Finishes the canvases `xt`. `prompt` numbers the rows for the noise; 0, 1, .. unless given."""
        return deque(self.steps(xt, prompt), maxlen=1).pop()

    @torch.no_grad()
    def steps(self, xt: Int[Tensor, "B L"], prompt: Int[Tensor, "B"] | None = None) -> Iterator[Decoded]:
        """The canvases before the first step and after each one, as `Decoder.steps`.

        Raises:
            UserError: a canvas without a prompt, or with something given after what is masked.
        """
        prompt = torch.arange(len(xt), device=xt.device) if prompt is None else prompt
        xt = xt.clone()
        length = self._prompt_lengths(xt)
        nfe = torch.zeros(len(xt), dtype=torch.long, device=xt.device)
        reveal_step = torch.full_like(xt, -1)
        state = Decoded(tokens=xt, nfe=nfe, reveal_step=reveal_step)
        yield state
        row = (length < xt.shape[1]).nonzero().squeeze(1)
        cache = KeyValueCache(xt.shape[1])
        for step in range(xt.shape[1]):
            if not len(row):
                return
            place = length[row] + step
            value = self._read(xt[row], place, step, cache, self._ask(prompt[row], step, place)).values
            xt[row, place] = value
            reveal_step[row, place] = step
            nfe[row] += 1
            is_over = place + 1 == xt.shape[1]
            if self.eos_id is not None:
                is_ended = value == self.eos_id
                self._pad(state, row[is_ended], step, self.eos_id)
                is_over |= is_ended
            open_rows = (~is_over).nonzero().squeeze(1)
            if len(open_rows) < len(row):
                row = row[open_rows]
                cache.keep(open_rows)
            yield state

    def _prompt_lengths(self, xt: Int[Tensor, "B L"]) -> Int[Tensor, "B"]:
        is_given = xt != self.mask_id
        length = is_given.sum(dim=-1)
        is_first = torch.arange(xt.shape[1], device=xt.device) < length.unsqueeze(1)
        if (is_given != is_first).any() or (length == 0).any():
            raise UserError(
                "a causal model fills in what follows a prompt: at least one token must be given, and none after the "
                "first that is masked; use a model without model.causal for other canvases"
            )
        return length

    def _read(
        self, xt: Int[Tensor, "b L"], place: Int[Tensor, "b"], step: int, cache: KeyValueCache, ask: Query
    ) -> Prediction:
        """What stands at `place` of each row: first the prompts are read, then a token a step."""
        start = place if step > 0 else torch.ones_like(place)
        width = 1 if step > 0 else int(place.max())
        at = torch.arange(len(xt), device=xt.device) * xt.shape[1] + place
        return self.model.answer(self.model.hidden_within(xt, at, start=start, width=width, cache=cache), ask)

    def _ask(self, prompt: Int[Tensor, "b"], step: int, place: Int[Tensor, "b"]) -> Query:
        steps = torch.full_like(prompt, step)
        return self.sampling.ask(prompt, steps, place)

    def _pad(self, state: Decoded, row: Int[Tensor, "b"], step: int, eos_id: int) -> None:
        """Fills what these rows have left with the end token."""
        is_left = state.tokens[row] == self.mask_id
        state.tokens[row] = torch.where(is_left, eos_id, state.tokens[row])
        state.reveal_step[row] = torch.where(is_left, step, state.reveal_step[row])
