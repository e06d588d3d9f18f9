"""Running text: a model is measured by the likelihood that it gives to held-out documents.

The text is a store, or files that are prepared as bytes when they are first used, and then kept in the cache. A row is
the end token, which is given, and text (`data/prepare/rows.py`): documents joined by end tokens and cut
(`data.rows=wrap`), or one document and its padding (`document`). Dimensions: B rows, L positions, n places.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from pydantic import Field, model_validator
from torch import Tensor

from unmask import files, noise, paths
from unmask.data.infill import encode_spans, is_infilling, pad_with_ends, record_spans
from unmask.data.prepare import PrepareSettings, prepare
from unmask.data.prepare.documents import find_source, find_sources, make_shard
from unmask.data.prepare.rows import PACKINGS, Documents, Labels
from unmask.data.prepare.settings import DATASETS
from unmask.data.prepare.writing import describe_counts
from unmask.data.store import RowStore
from unmask.data.vocabulary import BYTES, EOS_ID, MASK_ID, VOCAB_SIZE, Vocabulary
from unmask.errors import UserError
from unmask.noise import Purpose
from unmask.progress import console, warn
from unmask.tasks.task import Extent
from unmask.tasks.text_rows import TextRows, TextRowsData, number_lines, read_prompt
from unmask.types import CleanBatch

_VERSION = 1  # of the preparation: another one makes other rows of the same text


def is_store(path: Path) -> bool:
    """True if the folder `path` holds a store of rows."""
    return (path / "labels.bin").exists()


class TextData(TextRowsData):
    """The settings of `Text`. Without a store, tokens are bytes."""

    path: str | None = Field(
        None,
        description="text (.txt, .jsonl, .jsonl.gz, .parquet), a folder of such, or one that `unmask prepare` made; "
        "null = the sources of Python's standard library",
    )
    rows: Literal["wrap", "document"] = Field(
        "wrap", description="documents joined and cut into rows, or one document a row, with padding"
    )
    length: int = Field(256, ge=8, multiple_of=8, description="tokens of a row")
    vocab_size: int = Field(VOCAB_SIZE, ge=2, description="ids that the model knows, the mask among them")
    mask_id: int = Field(MASK_ID, ge=0, description="an id that no row holds")
    eos_id: int | None = Field(EOS_ID, ge=0, description="starts a row, ends a document, and pads it")
    field: str = Field("text", description="of JSON lines and Parquet, that holds the text")
    validation_ratio: float = Field(0.02, gt=0, lt=1, description="of the documents, by their hash")
    prompt_length: int = Field(1, ge=1, description="of the random rows that `unmask bench` takes")
    cache_dir: str | None = Field(None, description="null = $UNMASK_CACHE or ~/.cache/unmask")

    @model_validator(mode="before")
    @classmethod
    def _bytes_have_their_fingerprint(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.keys() & {"vocab_size", "mask_id", "eos_id"}:
            return given
        if given.get("path") is None or not is_store(paths.user_path(str(given["path"]), "data.path=")):
            return {"fingerprint": Vocabulary.of_bytes().fingerprint} | given
        return given


def check_ids(config: TextData) -> None:
    """Raises `UserError` unless the ids are those of bytes, as they must be without a store."""
    if config.fingerprint != Vocabulary.of_bytes().fingerprint:
        raise UserError(
            f"data.path={config.path}: is not a folder that `unmask prepare` made, but the ids are not those of bytes; "
            "give the store that they were made with, or prepare the text: unmask prepare text SOURCE --tokenizer NAME"
        )


def make_settings(sources: Sequence[str], config: TextData, out: Path) -> PrepareSettings:
    """Makes the settings of a preparation whose rows are like those of a run."""
    return PrepareSettings(
        dataset="text",
        tokenizer=BYTES,
        out=out,
        sources=tuple(sources),
        length=config.length,
        rows=config.rows,
        text_field=config.field,
        validation_ratio=config.validation_ratio,
        split_seed=config.seed,
        lossy=True,  # bytes give back everything; for the run's tokenizer it is too late to ask
    )


def find_store(config: TextData) -> Path:
    """Finds the store of the rows: `data.path` itself, or one of its text in the cache (the first process makes it).

    Raises:
        UserError: the text cannot be used.
    """
    path = None if config.path is None else paths.user_path(config.path, "data.path=")
    if path is not None and is_store(path):
        return path
    check_ids(config)
    sources = [] if config.path is None else [config.path]
    if path is not None and not path.exists():
        raise UserError(
            f"data.path={config.path}: no such file or folder; what is on the Hugging Face hub is prepared first: "
            "unmask prepare text OWNER/NAME --tokenizer bytes --out FOLDER"
        )
    name = "python" if path is None else path.name
    folder = files.cache_folder(config.cache_dir) / "text" / f"{name}_{config.length}_{_digest(sources, config)}"
    with files.exclusive(folder):
        if folder.exists() and (problem := _damage(folder)):
            warn(f"{problem}. It is of the cache, and is made again now")
            shutil.rmtree(folder)
        if not folder.exists():
            _prepare(make_settings(sources, config, folder))
            console.print(f"Rows of text kept in {folder}")
    return folder


def _damage(folder: Path) -> str | None:
    """Returns what is wrong with the store in `folder`, or None."""
    try:
        store = RowStore(folder)
        is_whole = store.verify() and store.vocabulary is not None
    except UserError as error:
        return str(error)
    return None if is_whole else f"{folder}: lacks its checksums or its vocabulary"


def _prepare(settings: PrepareSettings) -> None:
    try:
        prepare(settings)
    except UserError as error:
        shutil.rmtree(settings.partial, ignore_errors=True)  # another text will be given, or another file of it
        raise UserError(f"data.path={', '.join(settings.sources) or None}: {error}") from error


def _digest(sources: Sequence[str], config: TextData) -> str:
    """Hashes the text itself, wherever it lies, and the settings that cut it."""
    contents = [source.fingerprint()["sha256"] for source in find_sources(sources, DATASETS["text"])]
    cut = [config.length, config.rows, config.field, config.validation_ratio, config.seed]
    return hashlib.sha256(json.dumps([_VERSION, contents, cut]).encode()).hexdigest()[:12]


class Text(TextRows):
    """The task of running text."""

    config: TextData
    Config = TextData

    def __init__(self, config: TextData) -> None:
        super().__init__(config)
        if config.rows == "wrap":  # no row ends before its last position
            self.tokens = replace(self.tokens, eos_id=None, pad_id=None)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        path, bytes_alone = self.config.path, Vocabulary.of_bytes()
        if self.config.fingerprint == bytes_alone.fingerprint:
            return bytes_alone
        if self.config.tokenizer is None and not (path is not None and is_store(paths.user_path(path, "data.path="))):
            check_ids(self.config)
        return super().vocabulary

    @property
    def start_ids(self) -> Sequence[int]:
        return (self.vocabulary.eos_id,)

    def _folder(self) -> Path:
        return find_store(self.config)

    # --- examples ----------------------------------------------------------------------------------------------------

    def _check_store(self, store: RowStore) -> RowStore:
        for key, name in (("rows", "packing"), ("validation_ratio", "validation_ratio"), ("seed", "split_seed")):
            own, stored = getattr(self.config, key), store.meta.get(name)
            if own != stored:
                raise UserError(f"{store.folder}: data.{key}={own}, but it was made with {stored}; prepare it so")
        return super()._check_store(store)

    def _num_held_out(self, store: RowStore) -> int:
        number = store.meta.get("num_held_out")
        if type(number) is not int or not 0 < number < len(store):
            raise UserError(
                f"{store.folder / 'meta.json'}: num_held_out={number!r}: must be a number of its {len(store)} rows; "
                "prepare the text again"
            )
        return number

    def _row(self, place: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        """Returns the row at each place. Held-out rows lie last, and are shuffled: the first may be of one document."""
        held_out = self._num_held_out(self._store)
        is_held_out = place < held_out
        shuffled = noise.permute(torch.where(is_held_out, place, 0), held_out, self.config.seed, Purpose.SPLIT)
        return torch.where(is_held_out, len(self._store) - held_out + shuffled, place - held_out)

    def examples_from_file(self, path: Path) -> CleanBatch:
        """Reads all rows of a folder that `unmask prepare` made, of a file of text, or of a folder of such files."""
        return self.corpus(path)

    def corpus(self, path: Path, limit: int | None = None) -> CleanBatch:
        """Reads rows of any text, tokenised and cut as the run's are: all, or `limit` of them.

        Those are spread evenly over the corpus, whose first rows may be of one document.

        Raises:
            UserError: it cannot be read, has other tokens or another layout, or too little text.
        """
        path = paths.user_path(path)
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if is_store(path):
            store = self._open_other(path)
            return self._read(store, _spread(len(store), limit))
        rows = torch.from_numpy(self._cut(path).astype(np.int64))
        x0 = rows[_spread(len(rows), limit)]
        is_first = torch.arange(self.config.length) == 0
        return CleanBatch(x0=x0, prompt_mask=is_first.expand(x0.shape).clone())

    def _open_other(self, path: Path) -> RowStore:
        store = super()._open_other(path)
        if (packing := store.meta.get("packing")) not in (None, self.config.rows):
            raise UserError(
                f"{path}: its rows are made as {packing}, the model's as {self.config.rows}, and likelihoods of the "
                f"two cannot be compared; prepare it with --rows {self.config.rows}, or give the text itself"
            )
        return store

    def _cut(self, path: Path) -> Labels:
        """Tokenises and cuts the text at `path`."""
        settings = make_settings([str(path)], self.config, path)
        shard = make_shard(list(find_source(str(path)).rows(settings.fields)), self.vocabulary, settings)
        for bad in shard.report.bad[:1]:
            raise UserError(f"{bad['place']}: {bad['problem']}")
        documents = Documents(shard.ids, shard.num_tokens)
        rows = next(PACKINGS[self.config.rows]([documents], self.config.length, self.vocabulary.eos_id))
        if not len(rows):
            raise UserError(
                f"{path}: its text fills no row of data.length={self.config.length} tokens "
                f"({describe_counts(shard.report.counts)}); give more, of what the run's tokenizer knows"
            )
        return rows

    def extent(self, examples: CleanBatch) -> Extent:
        """Counts the tokens and bytes of the text in `examples`."""
        is_text = examples.answer_mask(self.tokens.eos_id)
        rows = [x0[own].tolist() for x0, own in zip(examples.x0, is_text, strict=True)]
        return Extent(tokens=int(is_text.sum()), bytes=sum(map(self.vocabulary.num_bytes, rows)), rows=self.config.rows)

    def documents(self, tokens: Int[Tensor, "L"], is_own: Bool[Tensor, "L"]) -> list[list[int]]:
        """Cuts the ids of a finished row, where `is_own`, at its end tokens; leaves out what is empty.

        With one document a row, everything after its end is padding.
        """
        runs = groupby(tokens[is_own].tolist(), key=lambda i: i == self.config.eos_id)
        ends_at_once = self.config.rows == "document"
        wanted = takewhile(lambda run: not (run[0] and ends_at_once), runs)
        return [list(ids) for is_end, ids in wanted if not is_end]

    # --- decoding ----------------------------------------------------------------------------------------------------

    def prompts(self, lines: Iterable[str], source: str) -> Int[Tensor, "B L"]:
        """Reads prompts: each line is a text to continue, or a JSON object with the string `text`, perhaps empty.

        With spans to fill in, `<mask:N>`, a document ends after its text; what is packed goes on.
        """
        prompts = [self._prompt(line, where) for line, where in number_lines(lines, source)]
        return self._make_canvases(prompts, f"{source}: ", "text")

    def _prompt(self, line: str, where: str) -> list[int]:
        text = read_prompt(line, where, (frozenset({"text"}),))["text"]
        ids = [self.vocabulary.eos_id, *encode_spans(self.vocabulary, text, where, room=self.config.length)]
        if self.config.mask_id in ids and self.config.rows == "document":
            return pad_with_ends(self.vocabulary, ids, where, length=self.config.length)
        return self._check_room(ids, where)

    def record(self, prompt: Int[Tensor, "L"], tokens: Int[Tensor, "L"]) -> dict[str, Any]:
        """Returns the prompt and its continuation to the end of the document; or the whole text and its spans."""
        if is_infilling(self.vocabulary, prompt.tolist()):
            start = self._num_start(prompt)
            return record_spans(self.vocabulary, prompt[start:].tolist(), tokens[start:].tolist())
        is_new = prompt == self.config.mask_id
        given = [i for i in prompt[~is_new].tolist() if i != self.config.eos_id]
        return {"prompt": self.vocabulary.decode(given), "text": self._answer(tokens.cpu(), is_new.cpu())}


def _spread(count: int, limit: int | None) -> Int[Tensor, "n"]:
    """Returns up to `limit` of `count` places, evenly spread."""
    number = count if limit is None else min(limit, count)
    return torch.arange(number) * count // number
