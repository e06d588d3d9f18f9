"""Rows of token ids, each a prompt and its answer, from a store on disk (`data/store.py`).

It knows no text: prompts and answers are ids. An answer is right if it is the stored one, up to the first end token.
Dimensions: B rows, L positions, n examples asked for.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from pydantic import Field, model_validator
from rich.text import Text
from torch import Tensor

from unmask import noise
from unmask.config import Section
from unmask.data.store import RowStore, read_meta
from unmask.data.stream import shuffled_index
from unmask.errors import UserError
from unmask.masking.causal import is_answer
from unmask.noise import Purpose
from unmask.tasks.task import Canvas, Grades
from unmask.types import CleanBatch, TokenSpec


class TokensData(Section):
    """What is not given is as the store at `path` says, if that was made by `unmask prepare`."""

    path: str | None = Field(None, description="folder of labels.bin, prompt_mask.bin and meta.json")
    length: int = Field(512, ge=1, description="positions of a row")
    vocab_size: int = Field(ge=2, description="ids that the model knows, the mask among them")
    mask_id: int = Field(ge=0, description="an id that no row holds")
    eos_id: int | None = Field(None, ge=0, description="ends an answer, and pads it")
    fingerprint: str | None = Field(None, description="of the vocabulary; a store of another one is refused")
    validation_ratio: float = Field(0.02, gt=0, lt=1)
    seed: int = Field(0, ge=0, description="of the split")
    prompt_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of training examples whose prompt is masked, which decode.guidance needs"
    )
    prompt_length: int = Field(100, ge=0, description="of the random rows that `unmask bench` takes")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_store(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("path"), str):
            return given
        try:
            meta = read_meta(Path(given["path"]).expanduser())
        except UserError:
            return given  # who opens the store says what is wrong
        return {key: value for key, value in _settings_in(meta).items() if key in cls.model_fields} | given

    @model_validator(mode="after")
    def _check(self) -> "TokensData":
        for key, value in (("mask_id", self.mask_id), ("eos_id", self.eos_id)):
            if value is not None and value >= self.vocab_size:
                raise ValueError(f"data.{key}={value}: must be below data.vocab_size={self.vocab_size}")
        if self.mask_id == self.eos_id:
            raise ValueError(f"data.mask_id={self.mask_id} is data.eos_id too; the mask is an id that no row holds")
        if self.vocab_size <= len(self.special_ids):
            raise ValueError(f"data.vocab_size={self.vocab_size} leaves no id beside data.mask_id and data.eos_id")
        return self

    @property
    def special_ids(self) -> list[int]:
        """The mask and the end token, ascending."""
        return sorted([self.mask_id] if self.eos_id is None else [self.mask_id, self.eos_id])


def _settings_in(meta: dict[str, Any]) -> dict[str, Any]:
    """The settings of the section `data` that a store was made with, as far as its `meta.json` says."""
    tokenizer = meta.get("tokenizer")
    said = {key: meta.get(name) for key, name in _IN_META.items()}
    said["fingerprint"] = tokenizer.get("fingerprint") if isinstance(tokenizer, dict) else None
    return {key: value for key, value in said.items() if value is not None}


_IN_META = {
    "length": "max_len",
    "seed": "split_seed",
    **{key: key for key in ("vocab_size", "mask_id", "eos_id", "separator", "validation_ratio")},
}


class Tokens:
    Config = TokensData

    def __init__(self, config: TokensData) -> None:
        self.config = config
        self.tokens = TokenSpec(
            vocab_size=config.vocab_size,
            length=config.length,
            mask_id=config.mask_id,
            eos_id=config.eos_id,
            pad_id=config.eos_id,
            fingerprint=config.fingerprint,
        )
        self.canvas = Canvas(columns=16)

    @classmethod
    def from_config(cls, config: TokensData) -> "Tokens":
        return cls(config)

    @cached_property
    def _store(self) -> RowStore:
        if self.config.path is None:
            raise UserError(
                "data.path is missing; give the folder that holds labels.bin, prompt_mask.bin and meta.json"
            )
        return self._check_store(RowStore(Path(self.config.path).expanduser()))

    def _check_store(self, store: RowStore) -> RowStore:
        if store.length != self.config.length:
            raise UserError(f"{store.folder}: its rows have {store.length} tokens; set data.length={store.length}")
        if self._num_held_out(store) in (0, len(store)):
            ratio = self.config.validation_ratio
            raise UserError(f"{store.folder}: data.validation_ratio={ratio} of {len(store)} rows leaves a part empty")
        self._check_vocabulary(store)
        return store

    def _check_vocabulary(self, store: RowStore) -> None:
        """Whether ids mean the same in the store and to the model, as far as both say."""
        said = _settings_in(store.meta).get("fingerprint")
        if self.config.fingerprint is not None and said not in (None, self.config.fingerprint):
            raise UserError(
                f"{store.folder}: was made with another tokenizer or vocabulary than data.fingerprint, which is the "
                "run's; prepare these rows as the run's were (together, with --vocab used), or train another run"
            )

    def _num_held_out(self, store: RowStore) -> int:
        return round(self.config.validation_ratio * len(store))

    def _rows(self, place: Int[Tensor, "n"]) -> CleanBatch:
        """The rows at `place` of a permutation, of which the first are held out."""
        store = self._store
        row = noise.permute(place, len(store), self.config.seed, Purpose.SPLIT)
        return self._checked(store, row)

    def _checked(self, store: RowStore, row: Int[Tensor, "n"]) -> CleanBatch:
        batch = store[row]
        is_wrong = ((batch.x0 >= self.config.vocab_size) | (batch.x0 == self.config.mask_id)).any(dim=-1)
        is_empty = batch.prompt_mask.all(dim=-1)
        for problem, rows in (
            ("holds the mask or an id out of data.vocab_size", is_wrong),
            ("is all prompt", is_empty),
        ):
            if rows.any():
                raise UserError(f"{store.folder}: row {int(row[rows][0])} {problem}")
        return batch

    def train_stream(self, seed: int) -> "TokensStream":
        held_out = self._num_held_out(self._store)
        return TokensStream(self, held_out, len(self._store) - held_out, seed)

    def synthetic_stream(self, seed: int) -> "RandomTokens":
        config = self.config
        if config.prompt_length >= config.length:
            raise UserError(f"data.prompt_length={config.prompt_length}: leaves nothing of data.length={config.length}")
        return RandomTokens(config, seed)

    def validation(self, limit: int) -> CleanBatch:
        return self._rows(torch.arange(min(limit, self._num_held_out(self._store))))

    def examples_from_file(self, path: Path) -> CleanBatch:
        store = RowStore(path)
        if store.length != self.config.length:
            raise UserError(f"{path}: its rows have {store.length} tokens, the model's {self.config.length}")
        self._check_vocabulary(store)
        return self._checked(store, torch.arange(len(store)))

    def prompts(self, lines: Iterable[str], source: str) -> Int[Tensor, "B L"]:
        """Each line a JSON list of ids, null where one is to be filled in, or an object with such a list as `prompt`.

        The answer follows, if the list does not fill the canvas.
        """
        canvases = [self._canvas(line, f"{source}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
        if not canvases:
            raise UserError(f"{source}: holds no prompt; give a JSON list of token ids on each line")
        return torch.stack(canvases)

    def _canvas(self, line: str, where: str) -> Int[Tensor, "L"]:
        ids, length = self._ids(line, where), self.config.length
        if len(ids) > length or (len(ids) == length and None not in ids):
            raise UserError(f"{where}: {len(ids)} ids leave no room for an answer in {length} positions")
        canvas = torch.full((length,), self.config.mask_id)
        canvas[: len(ids)] = torch.tensor([self.config.mask_id if i is None else i for i in ids], dtype=torch.long)
        return canvas

    def _ids(self, line: str, where: str) -> list[int | None]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not a JSON list of token ids: {error}") from error
        ids = row.get("prompt", row) if isinstance(row, dict) else row
        wrong = [i for i in ids if not self._may_be_given(i)] if isinstance(ids, list) else ids
        if wrong or not isinstance(ids, list):
            known = f"token ids below {self.config.vocab_size} other than the mask, or null to fill in"
            raise UserError(f"{where}: not a list of {known}: {str(wrong)[:60]}")
        return ids

    def _may_be_given(self, value: Any) -> bool:
        is_id = type(value) is int and 0 <= value < self.config.vocab_size and value != self.config.mask_id
        return is_id or value is None

    def grade(self, examples: CleanBatch, tokens: Int[Tensor, "B L"]) -> Grades:
        """`accuracy`: the stored answer, up to its first end token; `exact_match`: to the last position."""
        is_same = (tokens.cpu() == examples.x0) | examples.prompt_mask
        is_ignored = ~is_answer(examples, self.config.eos_id)
        return Grades({"accuracy": (is_same | is_ignored).all(dim=-1), "exact_match": is_same.all(dim=-1)})

    def record(self, prompt: Int[Tensor, "L"], tokens: Int[Tensor, "L"]) -> dict[str, Any]:
        """`prompt` as it is given, up to the last position that is, and the `answer`: what was filled in."""
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


class TokensStream:
    """The training rows, shuffled anew in every epoch; `data.prompt_dropout` of them have the mask for a prompt."""

    def __init__(self, task: Tokens, start: int, size: int, seed: int) -> None:
        self._task, self._start, self._size, self._seed = task, start, size, seed

    @property
    def epoch_size(self) -> int:
        return self._size

    def __getitem__(self, number: Int[Tensor, "n"]) -> CleanBatch:
        rows = self._task._rows(self._start + shuffled_index(number, self._size, self._seed))
        config = self._task.config
        is_hidden = noise.uniform(self._seed, Purpose.PROMPT, number) < config.prompt_dropout
        return hide_prompts(rows, is_hidden, config.mask_id)


def hide_prompts(clean: CleanBatch, is_hidden: Bool[Tensor, "B"], mask_id: int) -> CleanBatch:
    """Examples whose prompts hold the mask where `is_hidden`. They stay prompts: nothing of them is asked for.

    A model that has seen both can be guided (2207.12598).
    """
    x0 = clean.x0.masked_fill(is_hidden.unsqueeze(1) & clean.prompt_mask, mask_id)
    return replace(clean, x0=x0)


class RandomTokens:
    """Rows of random ids, neither the mask nor the end token, `data.prompt_length` of them the prompt."""

    epoch_size = 1024

    def __init__(self, config: TokensData, seed: int) -> None:
        self._config, self._seed = config, seed

    def __getitem__(self, number: Int[Tensor, "n"]) -> CleanBatch:
        position = torch.arange(self._config.length)
        u = noise.uniform(self._seed, Purpose.BENCHMARK, number.unsqueeze(1), position)
        x0 = (u * (self._config.vocab_size - len(self._config.special_ids))).long()
        for special in self._config.special_ids:
            x0 += x0 >= special
        return CleanBatch(x0=x0, prompt_mask=(position < self._config.prompt_length).expand(x0.shape).clone())
