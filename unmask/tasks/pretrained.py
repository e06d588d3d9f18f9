"""Text for a model that came from elsewhere, with a tokenizer of its own: prompts to continue, and no data to train on.

Dimensions: B rows, L positions.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from unmask import paths
from unmask.data.chat_template import CHAT, ChatTemplate
from unmask.data.conversations import ConversationEncoder
from unmask.data.infill import encode_spans, is_infilling, pad_with_ends
from unmask.data.tokenizer_files import find_chat_template, find_named_tokens
from unmask.data.vocabulary import VOCABULARY, Vocabulary
from unmask.errors import UserError
from unmask.tasks.chat import encode_messages
from unmask.tasks.text import Text, TextData
from unmask.tasks.text_rows import VOCABULARY_FOLDER, read_prompt


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

    @cached_property
    def encoder(self) -> ConversationEncoder | None:
        """The encoder of conversations; None if no chat template came with the tokenizer.

        Raises:
            UserError: it is no template.
        """
        vocabulary, folder = self.vocabulary, paths.user_path(str(self.config.tokenizer), "data.tokenizer=")
        if (folder / CHAT).exists():
            return ConversationEncoder(vocabulary, ChatTemplate.load(folder))
        source = find_chat_template(folder)
        if source is None:
            return None
        try:
            # Prompts are encoded whole, as transformers does.
            return ConversationEncoder(vocabulary, ChatTemplate(source, find_named_tokens(folder), turns="last"))
        except UserError as error:
            raise UserError(f"{folder}: chat_template: {error}") from error

    @property
    def start_ids(self) -> Sequence[int]:
        return self.config.prefix

    @property
    def has_turns(self) -> bool:
        """True if a prompt may hold `messages`."""
        return self.encoder is not None

    def keep_files(self, folder: Path) -> dict[str, Any]:
        replaced = super().keep_files(folder)
        if self.encoder is not None and not (folder / VOCABULARY_FOLDER / CHAT).exists():
            self.encoder.template.save(folder / VOCABULARY_FOLDER)
        return replaced

    def _folder(self) -> Path:
        raise UserError(
            "this model came without data; give text to evaluate it on (unmask eval MODEL --data FILE), or train with "
            "train.init=MODEL on rows that `unmask prepare` makes"
        )

    def _prompt(self, line: str, where: str) -> list[int]:
        if line.lstrip().startswith("{") and '"messages"' in line:
            if self.encoder is None:
                raise UserError(f"{where}: `messages`: the model came without a chat template; give the text itself")
            return self._check_room(encode_messages(self.encoder, line, where, self.config.mask_id), where)
        text = read_prompt(line, where, (frozenset({"text"}),))["text"]
        prefix = self.config.prefix
        ids = [*prefix, *encode_spans(self.vocabulary, text, where, room=self.config.length)]
        if self.config.mask_id in ids:
            return pad_with_ends(self.vocabulary, ids, where, length=self.config.length)
        return self._check_room(ids, where)

    def _answer(self, tokens: Int[Tensor, "L"], is_answer: Bool[Tensor, "L"]) -> str:
        """Decodes the answer up to its first end token, or that of a turn."""
        ids = tokens[is_answer].tolist()
        ends = {self.config.eos_id} if self.encoder is None else self.encoder.end_ids
        return self.vocabulary.decode(list(takewhile(lambda token: token not in ends, ids)))

    def record(self, prompt: Int[Tensor, "L"], tokens: Int[Tensor, "L"]) -> dict[str, Any]:
        """Returns the prompt and its continuation up to the end token; or the whole text and its spans."""
        if is_infilling(self.vocabulary, prompt.tolist()):
            return super().record(prompt, tokens)
        start, is_new = self._num_start(prompt), prompt == self.config.mask_id
        given = prompt[start:][~is_new[start:]].tolist()
        return {"prompt": self.vocabulary.decode(given), "text": self._answer(tokens.cpu(), is_new.cpu())}
