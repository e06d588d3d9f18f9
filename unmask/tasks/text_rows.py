"""Tasks whose rows of tokens are text: vocabulary, prompts, display; and files of word problems.

Dimensions: B rows, L positions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from pydantic import Field, PrivateAttr
from rich.text import Text
from torch import Tensor

from unmask import paths
from unmask.data.infill import whole_text
from unmask.data.prepare.sources import FileSource, Row
from unmask.data.vocabulary import VOCABULARY, Vocabulary, load_tokenizer
from unmask.errors import UserError
from unmask.files import read_object
from unmask.progress import warn
from unmask.tasks.programs.answers import read_answer
from unmask.tasks.rows import StoredRows, TokensData
from unmask.tasks.task import DisplayLayout, may_change
from unmask.types import CleanBatch

VOCABULARY_FOLDER = "vocabulary"
"""Folder of a run or an export that holds what its prompts are encoded with."""


class TextRowsData(TokensData):
    """The settings of rows that are text."""

    tokenizer: str | None = Field(
        None, description="its folder, or its name on the hub; null = what data.path holds, or the run's own copy"
    )
    _is_found: bool = PrivateAttr(False)
    """True for settings that a run was found with, which nobody typed, if it keeps no vocabulary of its own."""

    def of_run(self, folder: Path) -> "TextRowsData":
        """Returns the settings with the vocabulary that the run in `folder` keeps, if it does.

        What a run names is not asked of the hub, and nothing is written where it says.
        """
        own, fields = folder / VOCABULARY_FOLDER, type(self).model_fields
        is_kept = (own / VOCABULARY).exists()
        changes = {"tokenizer": str(own)} if is_kept else {}
        found = self.model_copy(update=changes | ({"cache_dir": None} if "cache_dir" in fields else {}))
        found._is_found = not is_kept
        return found


class TextRows(StoredRows):
    """A task whose rows are text. A run keeps a copy of the vocabulary, to encode prompts and to decode answers."""

    config: TextRowsData
    prompt_key = "text"
    """The field of a prompt, where that is a JSON object, for a text as it is."""

    def __init__(self, config: TextRowsData) -> None:
        super().__init__(config)
        self.canvas = DisplayLayout(columns=8, is_text=True)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the ids.

        Raises:
            UserError: there is none, or the data were made with another one.
        """
        source = self.config.tokenizer or self.config.path
        if source is None:
            raise UserError("data.tokenizer is missing; give the folder of a tokenizer, or its name on the hub")
        key = "data.tokenizer=" if self.config.tokenizer else "data.path="
        folder = paths.user_path(source, key)
        is_unknown = self.config._is_found and self.config.fingerprint is None
        if is_unknown and folder.exists() and not may_change():
            raise UserError(
                f"{key}{source}: the run keeps neither its vocabulary nor a fingerprint of it, so what it names is not "
                "opened; if the run is yours: add --data-changed"
            )
        if (folder / VOCABULARY).exists():
            vocabulary = Vocabulary.load(folder)
        elif self.config.tokenizer is not None:
            vocabulary = self._load_vocabulary(source)
        else:
            raise UserError(
                f"{source}: does not say what its ids mean; give the tokenizer that made them as data.tokenizer (a "
                "folder, or a name such as Qwen/Qwen2-0.5B), or train on ids alone with task.name=tokens"
            )
        self._check_ids(vocabulary, source)
        return vocabulary

    def _load_vocabulary(self, source: str) -> Vocabulary:
        """Loads the vocabulary of all ids of a tokenizer, the mask among them or after them."""
        if self.config._is_found and not paths.user_path(source, "data.tokenizer=").exists():
            raise UserError(
                f"data.tokenizer={source}: the run keeps no copy of it, there is no such folder, and the Hugging Face "
                "hub is not asked for what a run names; download it there (hf download), or copy the run whole"
            )
        known = load_tokenizer(source).id_to_token
        eos = None if self.config.eos_id is None else known(self.config.eos_id)
        return Vocabulary.from_source(source, eos_token=eos, mask_token=known(self.config.mask_id))

    def _check_ids(self, vocabulary: Vocabulary, source: str) -> None:
        for key, own, needed in (
            ("fingerprint", vocabulary.fingerprint, self.config.fingerprint or vocabulary.fingerprint),
            ("mask_id", vocabulary.mask_id, self.config.mask_id),
            ("eos_id", vocabulary.eos_id, self.config.eos_id),
        ):
            if own != needed:
                raise UserError(f"{source}: is not the data's tokenizer: its {key} is {own}, where data.{key}={needed}")
        if vocabulary.vocab_size < self.config.vocab_size:
            raise UserError(
                f"{source}: is not the data's tokenizer: it has {vocabulary.vocab_size} ids, where "
                f"data.vocab_size={self.config.vocab_size}"
            )

    @property
    def start_ids(self) -> Sequence[int]:
        """The ids that stand before every text."""
        return ()

    @property
    def original_ids(self) -> Sequence[int | None]:
        """The tokenizer's id of each of the model's; None for a new one."""
        return self.vocabulary.original_ids[: self.config.vocab_size]

    def _num_start(self, tokens: Int[Tensor, "L"]) -> int:
        """Counts the ids at the start of a canvas that stand before every text: all of `start_ids`, or none."""
        start = [*self.start_ids]
        return len(start) if tokens[: len(start)].tolist() == start else 0

    def keep_files(self, folder: Path) -> dict[str, Any]:
        target = folder / VOCABULARY_FOLDER
        if not (target / VOCABULARY).exists():
            target.mkdir(exist_ok=True)
            self.vocabulary.save(target)
        return {"tokenizer": None}  # an export is read from there, wherever it was when the model was trained

    def validation(self, limit: int) -> CleanBatch:
        _ = self.vocabulary  # fails now rather than after a run, which could not be read
        return super().validation(limit)

    def _make_canvases(self, prompts: Sequence[Sequence[int]], where: str, what: str) -> Int[Tensor, "B L"]:
        """Makes canvases to finish. Too long a prompt keeps its end, in half of the canvas; the answer gets the rest.

        Args:
            prompts: given ids, with masks where something before their end is to be filled in.
            where: the start of a warning.
            what: the name of a prompt in a warning.
        """
        length, mask_id = self.config.length, self.config.mask_id
        room = length // 2
        is_long = [len(ids) >= length and mask_id not in ids for ids in prompts]
        if any(is_long):
            warn(
                f"{where}{sum(is_long)} of {len(prompts)} {what}s (the first is number {is_long.index(True) + 1}) are "
                f"longer than data.length={length} tokens; only their last {room} tokens are asked"
            )
        canvases = torch.full((len(prompts), length), mask_id)
        for canvas, ids, too_long in zip(canvases, prompts, is_long, strict=True):
            kept = ids[-room:] if too_long else ids
            canvas[: len(kept)] = torch.tensor(kept)
        return canvases

    def _check_room(self, ids: list[int], where: str) -> list[int]:
        """Returns `ids`, which leave room for an answer or are cut later.

        Raises:
            UserError: there are masks among them, and no room.
        """
        if self.config.mask_id in ids and len(ids) >= self.config.length:
            raise UserError(f"{where}: {len(ids)} tokens leave no room for an answer in {self.config.length}")
        return ids

    def token(self, text: str) -> int:
        """Encodes `text` as one token.

        Raises:
            UserError: it is several tokens, or none.
        """
        ids = self.vocabulary.encode(text)
        if len(ids) != 1:
            parts = ", ".join(f"{self.vocabulary.decode([i])!r}" for i in ids)
            raise UserError(
                f"{text!r} is not one token, but {len(ids)}: {parts}; a word's token often begins with a space"
            )
        return ids[0]

    def text(self, tokens: Int[Tensor, "L"]) -> str:
        return whole_text(self.vocabulary, tokens.tolist())

    def _answer(self, tokens: Int[Tensor, "L"], is_answer: Bool[Tensor, "L"]) -> str:
        """Decodes the answer up to its first end token; masks that are left are padding."""
        ids = tokens[is_answer].tolist()
        end = ids.index(self.config.eos_id) if self.config.eos_id in ids else len(ids)
        return self.vocabulary.decode(ids[:end])

    def symbol(self, token: int) -> str:
        """Formats a token, with line ends and the end of an answer made visible."""
        if token == self.config.mask_id:
            return ""
        return "∎" if token == self.config.eos_id else self.vocabulary.decode([token]).replace("\n", "⏎")

    def render(self, tokens: Int[Tensor, "L"], is_given: Bool[Tensor, "L"], is_new: Bool[Tensor, "L"]) -> Text:
        """Renders the text with `_` where it is masked, up to the end of the answer; not what starts or pads a row."""
        text, end = Text(), self.config.eos_id
        shown = [*zip(tokens.tolist(), is_given.tolist(), is_new.tolist(), strict=True)]
        while shown and shown[-1][:2] == (end, True):
            shown.pop()
        shown = shown[self._num_start(tokens) :]
        num_given = max((place for place, (_, given, _) in enumerate(shown, 1) if given), default=0)
        for place, (token, given, new) in enumerate(shown):
            if token == end and place >= num_given:  # those before it are the prompt's own, or in a gap
                break
            style = "bold" if given else "black on green" if new else "green"
            text.append("_" if token == self.config.mask_id else self.vocabulary.decode([token]), style=style)
        return text


Fields = Sequence[frozenset[str]]


def read_prompt(line: str, where: str, forms: Fields) -> dict[str, str]:
    """Reads a text, under the one field of the first form; or a JSON object with the strings of a form.

    Raises:
        UserError: it is another object.
    """
    if not line.lstrip().startswith("{"):
        return dict.fromkeys(forms[0], line.rstrip("\n"))
    row = read_object(line, where)
    known = frozenset().union(*forms)
    given: dict[str, Any] = {key: row[key] for key in row if key in known}
    if frozenset(given) not in forms:
        needed = (" and ".join(f"`{key}`" for key in sorted(form, reverse=True)) for form in forms)
        raise UserError(f"{where}: needs {', or '.join(needed)}")
    for key, value in given.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: needs the string `{key}`")
    return given


def number_lines(lines: Iterable[str], source: str) -> list[tuple[str, str]]:
    """Lists the lines that are not empty, each with its place, such as `FILE, line 3`.

    Raises:
        UserError: there is none.
    """
    found = [(line, f"{source}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{source}: holds no prompt; write one on each line")
    return found


@dataclass(frozen=True)
class WordProblem:
    """A question, and the number that answers it."""

    question: str
    answer: float | int


def read_problems(path: Path) -> list[WordProblem]:
    """Reads a .jsonl, .jsonl.gz or .parquet file: the string `question`, and `answer`, a number or a text.

    The number of a text is the one after its last `####`, as GSM8K writes it.

    Raises:
        UserError: the file cannot be read, or a row (named) is not a problem.
    """
    problems = [_read_problem(row) for row in FileSource(str(path)).rows(("question", "answer"))]
    if not problems:
        raise UserError(f"{path}: holds no problem; each line is an object with `question` and `answer`")
    return problems


def _read_problem(row: Row) -> WordProblem:
    try:
        content = row.fields
    except ValueError as error:
        raise UserError(f"{row.place}: {error}") from error
    if not isinstance(content.get("question"), str):
        raise UserError(f"{row.place}: needs the string `question`")
    return WordProblem(content["question"], read_answer(content.get("answer"), row.place))
