"""Conversations, of which the assistant's turns are learned: fine-tuning on instructions.

A row is a conversation as a chat template writes it (`data/conversations.py`), and padding. All but the assistant's
turns is given, as prompts are. A run keeps the template, and asks with it: a user's message is put into it before it is
answered, and an answer ends with the token that the template puts at the end of a turn.
Dimensions: B rows, L positions.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from unmask import paths
from unmask.data.chat_template import CHAT, ChatTemplate, Message
from unmask.data.conversations import ConversationEncoder, read_conversation
from unmask.data.prepare.sources import FileSource, Row
from unmask.data.store import RowStore
from unmask.errors import UserError
from unmask.files import parse_object
from unmask.progress import warn
from unmask.tasks.text_rows import VOCABULARY_FOLDER, TextRows, TextRowsData, number_lines
from unmask.types import CleanBatch


class ChatData(TextRowsData):
    """The settings of `Chat`."""

    path: str | None = Field(None, description="a folder that `unmask prepare chat` made")
    vocab_size: int = Field(151_645, ge=2, description="ids that the model knows, the mask among them")
    mask_id: int = Field(151_644, ge=0, description="an id that no row holds")
    eos_id: int | None = Field(151_643, ge=0, description="ends a conversation, and pads it")
    padding: Literal["supervised", "ignored"] = Field(
        "supervised",
        description="what follows a conversation in its row: learned as end tokens to data.length, or masked at every "
        "time and out of the loss",
    )


class Chat(TextRows):
    """The task of conversations."""

    config: ChatData
    Config = ChatData
    has_turns = True
    prompt_key = "prompt"

    # --- examples ----------------------------------------------------------------------------------------------------

    @cached_property
    def encoder(self) -> ConversationEncoder:
        """The encoder of the run's, or the store's, vocabulary and chat template.

        Raises:
            UserError: there is no template.
        """
        vocabulary = self.vocabulary  # which checks that what a run names may be opened
        source = str(self.config.tokenizer or self.config.path)
        folder = paths.user_path(source)
        if not (folder / CHAT).exists():
            raise UserError(
                f"{source}: has no {CHAT}, the chat template that the rows were made with; give what `unmask prepare "
                "chat` made as data.path, and no data.tokenizer"
            )
        return ConversationEncoder(vocabulary, ChatTemplate.load(folder))

    def validation(self, limit: int) -> CleanBatch:
        _ = self.encoder  # fails now, as for the vocabulary
        return super().validation(limit)

    def keep_files(self, folder: Path) -> dict[str, Any]:
        replaced = super().keep_files(folder)
        if not (folder / VOCABULARY_FOLDER / CHAT).exists():
            self.encoder.template.save(folder / VOCABULARY_FOLDER)
        return replaced

    def _read(self, store: RowStore, row: Int[Tensor, "n"]) -> CleanBatch:
        return self._pad(super()._read(store, row))

    def _pad(self, clean: CleanBatch) -> CleanBatch:
        """Returns rows with their padding as the settings say.

        Padding that is ignored is as a hidden prompt: masked whatever the time, so that it tells no answer's length,
        and never scored. So it is in a decoder's canvas, until the end of the answer is known.
        """
        if self.config.padding == "supervised":
            return clean
        is_padding = ~clean.prompt_mask & ~clean.answer_mask(self.config.eos_id)
        x0 = clean.x0.masked_fill(is_padding, self.config.mask_id)
        return replace(clean, x0=x0, prompt_mask=clean.prompt_mask | is_padding)

    def examples_from_file(self, path: Path) -> CleanBatch:
        """Reads a folder that `unmask prepare` made, or a file of conversations; too long ones are left out.

        Raises:
            UserError: a row cannot be used (file and line are named), or none is left.
        """
        if path.is_dir():
            return super().examples_from_file(path)
        found = [self._example(row) for row in FileSource(str(path)).rows(())]
        fitting = [each for each in found if each is not None]
        if not fitting:
            raise UserError(f"{path}: holds no conversation that fits data.length={self.config.length}")
        if len(fitting) < len(found):
            left_out = f"{len(found) - len(fitting)} of {len(found)} conversations"
            warn(f"{path}: {left_out} do not fit data.length={self.config.length}, and are left out")
        x0, prompt_mask = map(torch.stack, zip(*fitting, strict=True))
        return self._pad(CleanBatch(x0=x0, prompt_mask=prompt_mask))

    def _example(self, row: Row) -> tuple[Int[Tensor, "L"], Bool[Tensor, "L"]] | None:
        """Encodes a conversation; returns its ids, and which are given; None if it is too long."""
        try:
            encoded = self.encoder.encode(read_conversation(row.fields))
        except ValueError as error:
            raise UserError(f"{row.place}: {error}") from error
        ids, eos_id = encoded.ids, self.vocabulary.eos_id
        if self.config.mask_id in ids:
            raise UserError(f"{row.place}: holds the mask token; leave it out")
        if len(ids) + (ids[-1] != eos_id) > self.config.length:
            return None
        x0 = torch.full((self.config.length,), eos_id)
        x0[: len(ids)] = torch.tensor(ids)
        is_given = torch.arange(self.config.length) < len(ids)
        for start, end in encoded.turns:
            is_given[start:end] = False
        return x0, is_given

    # --- decoding ----------------------------------------------------------------------------------------------------

    def prompts(self, lines: Iterable[str], source: str) -> Int[Tensor, "B L"]:
        """Reads prompts: each line is a user's message, or a JSON object: `prompt`, or `messages` up to the user's.

        Beside a `prompt` there may be a `system` message.
        """
        prompts = [self._prompt(line, where) for line, where in number_lines(lines, source)]
        return self._make_canvases(prompts, f"{source}: ", "prompt")

    def _prompt(self, line: str, where: str) -> list[int]:
        ids = encode_messages(self.encoder, line, where, self.config.mask_id)
        if len(ids) >= self.config.length:
            raise UserError(
                f"{where}: {len(ids)} tokens leave no room for an answer in data.length={self.config.length}; shorten "
                "the conversation (in `unmask chat`, /new begins another)"
            )
        return ids

    def record(self, prompt: Int[Tensor, "L"], tokens: Int[Tensor, "L"]) -> dict[str, Any]:
        """Returns the `prompt` as the template wrote it, and the `text` of the answer up to the end of its turn."""
        is_new = prompt == self.config.mask_id
        answer = tokens[is_new].tolist()
        end = next((place for place, i in enumerate(answer) if i in self.encoder.end_ids), len(answer))
        return {
            "prompt": self.vocabulary.decode(prompt[~is_new].tolist()),
            "text": self.vocabulary.decode(answer[:end]),
        }


def encode_messages(encoder: ConversationEncoder, line: str, where: str, mask_id: int) -> list[int]:
    """Encodes the messages of a prompt, and the header of the answer to them.

    Raises:
        UserError: they are not to be read, or hold the mask; the message begins with `where`.
    """
    try:
        ids = encoder.encode_prompt(read_messages(line))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if mask_id in ids:
        raise UserError(f"{where}: holds the mask token; leave it out")
    return ids


def read_messages(line: str) -> list[Message]:
    """Reads the messages of a prompt; the last one is not the assistant's.

    Raises:
        ValueError: they are not to be read, or there is nothing to answer.
    """
    if not line.lstrip().startswith("{"):
        return read_conversation({"messages": [{"role": "user", "content": line.strip()}]}, to_answer=True)
    row = parse_object(line)
    prompt = row.get("prompt")
    if row.get("messages") is None and prompt is not None:
        row["messages"] = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if row.get("messages") is None:
        raise ValueError("needs `prompt`, a text, or `messages`, a list of `role` and `content`")
    messages = read_conversation(row, to_answer=True)
    if messages[-1]["role"] == "assistant":
        raise ValueError("ends with the assistant's message; a prompt ends with the user's")
    return messages
