"""Tasks whose examples are rows of token ids in a store on disk (`data/store.py`): settings, splits, streams.

Dimensions: B rows, L positions, n examples asked for.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from pydantic import Field, model_validator
from torch import Tensor

from unmask import noise, paths
from unmask.config.registry import is_found
from unmask.config.settings import Section
from unmask.data.fingerprint import DataFingerprint, digest
from unmask.data.store import RowStore, read_meta
from unmask.data.stream import EpochStream, shuffled_index
from unmask.errors import UserError
from unmask.noise import Purpose
from unmask.tasks.task import may_change
from unmask.types import CleanBatch, TokenSpec


class TokensData(Section):
    """The settings of stored rows (default: those in the `meta.json` of `path`, if `unmask prepare` made it)."""

    path: str | None = Field(None, description="folder of labels.bin, prompt_mask.bin and meta.json")
    length: int = Field(512, ge=1, description="positions of a row")
    vocab_size: int = Field(ge=2, description="ids that the model knows, the mask among them")
    mask_id: int = Field(ge=0, description="an id that no row holds")
    eos_id: int | None = Field(None, ge=0, description="ends an answer, and pads it")
    fingerprint: str | None = Field(None, description="of the vocabulary; a store of another one is refused")
    validation_ratio: float = Field(0.02, gt=0, lt=1, description="share of the rows that is held out")
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
        if is_found() and not may_change():  # a run's settings are whole, and its path is not opened unasked
            return given
        try:
            meta = read_meta(paths.user_path(given["path"], "data.path="))
        except UserError:
            return given  # the error comes when the store is opened
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
        """The ids of the mask and the end token, ascending."""
        return sorted([self.mask_id] if self.eos_id is None else [self.mask_id, self.eos_id])


def _settings_in(meta: dict[str, Any]) -> dict[str, Any]:
    """Reads the settings of the section `data` that a store was made with from its `meta.json`."""
    tokenizer = meta.get("tokenizer")
    found = {key: meta.get(name) for key, name in _IN_META.items()}
    found["fingerprint"] = tokenizer.get("fingerprint") if isinstance(tokenizer, dict) else None
    return {key: value for key, value in found.items() if value is not None}


_IN_META = {
    "length": "max_len",
    "seed": "split_seed",
    "rows": "packing",
    **{key: key for key in ("vocab_size", "mask_id", "eos_id", "separator", "validation_ratio")},
}


class StoredRows:
    """A task of stored rows; subclasses add prompts, grading and display."""

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

    @classmethod
    def from_config(cls, config: TokensData) -> "StoredRows":
        return cls(config)

    @cached_property
    def _store(self) -> RowStore:
        return self._check_store(RowStore(self._folder()))

    def _folder(self) -> Path:
        if self.config.path is None:
            raise UserError(
                "data.path is missing; give the folder that holds labels.bin, prompt_mask.bin and meta.json"
            )
        return paths.user_path(self.config.path, "data.path=")

    def _check_store(self, store: RowStore) -> RowStore:
        if store.length != self.config.length:
            raise UserError(f"{store.folder}: its rows have {store.length} tokens; set data.length={store.length}")
        if self._num_held_out(store) in (0, len(store)):
            ratio = self.config.validation_ratio
            raise UserError(f"{store.folder}: data.validation_ratio={ratio} of {len(store)} rows leaves a part empty")
        self._check_vocabulary(store)
        store.verify()
        return store

    def data_fingerprint(self) -> DataFingerprint:
        """Returns what identifies the rows and those of them that are held out."""
        store, config = self._store, self.config
        return DataFingerprint(
            rows=len(store),
            bytes=store.num_bytes,
            held_out=self._num_held_out(store),
            split=f"data.validation_ratio={config.validation_ratio} and data.seed={config.seed}",
            sha256=digest(store.checksums),
        )

    def _check_vocabulary(self, store: RowStore) -> None:
        """Raises `UserError` if ids mean other tokens in the store than to the model, as far as both are known."""
        stored = _settings_in(store.meta).get("fingerprint")
        if self.config.fingerprint is not None and stored not in (None, self.config.fingerprint):
            raise UserError(
                f"{store.folder}: was made with another tokenizer or vocabulary than data.fingerprint, which is the "
                "run's; prepare these rows as the run's were (together, with --vocab used), or train another run"
            )

    def _num_held_out(self, store: RowStore) -> int:
        return round(self.config.validation_ratio * len(store))

    def _rows_at(self, place: Int[Tensor, "n"]) -> CleanBatch:
        """Reads the rows at `place` of an order in which those that are held out come first."""
        return self._read(self._store, self._row(place))

    def _row(self, place: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        return noise.permute(place, len(self._store), self.config.seed, Purpose.SPLIT)

    def _read(self, store: RowStore, row: Int[Tensor, "n"]) -> CleanBatch:
        """Reads rows of `store`. Raises `UserError` where one is no example."""
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

    def train_stream(self, seed: int) -> EpochStream:
        held_out = self._num_held_out(self._store)
        return RowsStream(self, held_out, len(self._store) - held_out, seed)

    def synthetic_stream(self, seed: int) -> "RandomTokens":
        config = self.config
        if config.prompt_length >= config.length:
            raise UserError(f"data.prompt_length={config.prompt_length}: leaves nothing of data.length={config.length}")
        return RandomTokens(config, seed)

    def validation(self, limit: int) -> CleanBatch:
        return self._rows_at(torch.arange(min(limit, self._num_held_out(self._store))))

    def examples_from_file(self, path: Path) -> CleanBatch:
        store = self._open_other(path)
        return self._read(store, torch.arange(len(store)))

    def _open_other(self, path: Path) -> RowStore:
        """Opens another store. Raises `UserError` if its rows do not fit the model."""
        store = RowStore(path)
        if store.length != self.config.length:
            raise UserError(f"{path}: its rows have {store.length} tokens, the model's {self.config.length}")
        self._check_vocabulary(store)
        store.verify()
        return store


class RowsStream:
    """The training rows, shuffled anew in every epoch; a share `data.prompt_dropout` has masked prompts."""

    def __init__(self, task: StoredRows, start: int, size: int, seed: int) -> None:
        self._task, self._start, self._size, self._seed = task, start, size, seed

    @property
    def epoch_size(self) -> int:
        return self._size

    def __getitem__(self, number: Int[Tensor, "n"]) -> CleanBatch:
        rows = self._task._rows_at(self._start + shuffled_index(number, self._size, self._seed))
        config = self._task.config
        is_hidden = noise.uniform(self._seed, Purpose.PROMPT, number) < config.prompt_dropout
        return hide_prompts(rows, is_hidden, config.mask_id)


def hide_prompts(clean: CleanBatch, is_hidden: Bool[Tensor, "B"], mask_id: int) -> CleanBatch:
    """Puts the mask into the prompts where `is_hidden`. They stay prompts, which are never predicted.

    A model that has seen both can be guided (2207.12598).
    """
    x0 = clean.x0.masked_fill(is_hidden.unsqueeze(1) & clean.prompt_mask, mask_id)
    return replace(clean, x0=x0)


class RandomTokens:
    """A stream of random ids other than the mask and the end token, `data.prompt_length` of them the prompt."""

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
