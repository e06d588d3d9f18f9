"""Text for a model that came from elsewhere, with a tokenizer of its own: prompts to continue, and no data to train on.

Dimensions: B rows, L positions.
"""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from unmask import paths
from unmask.data.infill import encode_spans, is_infilling, pad_with_ends
from unmask.data.vocabulary import VOCABULARY, Vocabulary
from unmask.errors import UserError
from unmask.tasks.text import Text, TextData
from unmask.tasks.text_rows import read_prompt


class PretrainedData(TextData):
    """The settings of `Pretrained`."""

    rows: Literal["wrap", "document"] = Field("document", description="as in the task text; what ends a text pads it")
    prefix: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="ids that stand before every prompt, as a beginning-of-text token"
    )


class Pretrained(Text):
    """The task of a model that was imported: it continues prompts, and is measured on text that is given."""

    config: PretrainedData
    Config = PretrainedData

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the tokenizer, all of its ids; a mask that it does not have comes after them."""
        source = self.config.tokenizer
        if source is None:
            raise UserError("data.tokenizer is missing; give the folder of the tokenizer that the model came with")
        folder = paths.user_path(source, "data.tokenizer=")
        if (folder / VOCABULARY).exists():
            vocabulary = Vocabulary.load(folder)
        else:
            vocabulary = Vocabulary.from_ids(folder, eos_id=self.config.eos_id, mask_id=self.config.mask_id)
        self._check_ids(vocabulary, source)
        return vocabulary

    def _folder(self) -> Path:
        raise UserError(
            "this model came without data; give text to evaluate it on (unmask eval MODEL --data FILE), or train with "
            "train.init=MODEL on rows that `unmask prepare` makes"
        )

    def _prompt(self, line: str, where: str) -> list[int]:
        text = read_prompt(line, where, (frozenset({"text"}),))["text"]
        prefix = self.config.prefix
        ids = [*prefix, *encode_spans(self.vocabulary, text, where, room=self.config.length)]
        if self.config.mask_id in ids:
            return pad_with_ends(self.vocabulary, ids, where, length=self.config.length)
        return self._check_room(ids, where)

    def record(self, prompt: Int[Tensor, "L"], tokens: Int[Tensor, "L"]) -> dict[str, Any]:
        """Returns the prompt and its continuation up to the end token; or the whole text and its spans."""
        start = len(self.config.prefix)
        if is_infilling(self.vocabulary, prompt.tolist()):
            return super().record(prompt[start:], tokens[start:])
        is_new = prompt == self.config.mask_id
        given = prompt[start:][~is_new[start:]].tolist()
        return {"prompt": self.vocabulary.decode(given), "text": self._answer(tokens.cpu(), is_new.cpu())}
