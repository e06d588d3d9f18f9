"""Rows of token ids, each a prompt and its answer, from a store on disk.

Prompts and answers are ids, not text. An answer is right if it is the stored one, up to the first end token.
Dimensions: B rows, L positions.
"""

import json
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Int
from rich.text import Text
from torch import Tensor

from unmask.errors import UserError
from unmask.tasks.rows import StoredRows, TokensData
from unmask.tasks.task import DisplayLayout, Grades
from unmask.types import CleanBatch


class Tokens(StoredRows):
    """The task of rows of token ids."""

    Config = TokensData

    def __init__(self, config: TokensData) -> None:
        super().__init__(config)
        self.canvas = DisplayLayout(columns=16)

    def prompts(self, lines: Iterable[str], source: str) -> Int[Tensor, "B L"]:
        """Reads prompts: each line is a JSON list of ids, null to fill in, or an object with such a list as `prompt`.

        The answer follows, if the list does not fill the canvas.
        """
        canvases = [self._make_canvas(line, f"{source}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
        if not canvases:
            raise UserError(f"{source}: holds no prompt; give a JSON list of token ids on each line")
        return torch.stack(canvases)

    def _make_canvas(self, line: str, where: str) -> Int[Tensor, "L"]:
        ids, length = self._read_ids(line, where), self.config.length
        if len(ids) > length or (len(ids) == length and None not in ids):
            raise UserError(f"{where}: {len(ids)} ids leave no room for an answer in {length} positions")
        canvas = torch.full((length,), self.config.mask_id)
        canvas[: len(ids)] = torch.tensor([self.config.mask_id if i is None else i for i in ids], dtype=torch.long)
        return canvas

    def _read_ids(self, line: str, where: str) -> list[int | None]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not a JSON list of token ids: {error}") from error
        ids = row.get("prompt", row) if isinstance(row, dict) else row
        wrong = [i for i in ids if not (i is None or self._is_token(i))] if isinstance(ids, list) else ids
        if wrong or not isinstance(ids, list):
            known = f"token ids below {self.config.vocab_size} other than the mask, or null to fill in"
            raise UserError(f"{where}: not a list of {known}: {str(wrong)[:60]}")
        return ids

    def _is_token(self, value: Any) -> bool:
        return type(value) is int and 0 <= value < self.config.vocab_size and value != self.config.mask_id

    def grade(self, examples: CleanBatch, tokens: Int[Tensor, "B L"]) -> Grades:
        """Grades `accuracy`: the stored answer, up to its first end token; `exact_match`: to the last position."""
        is_same = (tokens.cpu() == examples.x0) | examples.prompt_mask
        is_ignored = ~examples.answer_mask(self.config.eos_id)
        return Grades({"accuracy": (is_same | is_ignored).all(dim=-1), "exact_match": is_same.all(dim=-1)})

    def record(self, prompt: Int[Tensor, "L"], tokens: Int[Tensor, "L"]) -> dict[str, Any]:
        """Returns the `prompt` up to its last given position, and the `answer`: the ids that were filled in."""
        is_answer = prompt == self.config.mask_id
        end = int((~is_answer).nonzero().max()) + 1 if (~is_answer).any() else 0
        given = [None if masked else i for i, masked in zip(prompt[:end].tolist(), is_answer[:end], strict=True)]
        return {"prompt": given, "answer": tokens[is_answer].tolist()}

    def symbol(self, token: int) -> str:
        return str(token)

    def render(self, tokens: Int[Tensor, "L"], is_given: Bool[Tensor, "L"], is_new: Bool[Tensor, "L"]) -> Text:
        text = Text()
        for token, given, new in zip(tokens.tolist(), is_given.tolist(), is_new.tolist(), strict=True):
            style = "bold" if given else "black on green" if new else "green"
            text.append("· " if token == self.config.mask_id else f"{token} ", style=style)
        return text
