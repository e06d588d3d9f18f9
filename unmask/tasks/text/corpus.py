"""Which text a task has: a store, or files that are prepared as bytes when they are first asked for, and then kept."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from unmask import cache
from unmask.data.byte_level import BYTES, EOS_ID, MASK_ID, VOCAB_SIZE
from unmask.data.prepare import Settings, prepare
from unmask.data.prepare.corpora import find_sources
from unmask.data.prepare.datasets import DATASETS
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError
from unmask.progress import console
from unmask.tasks.worded import WordedData

_VERSION = 1  # of the preparation: another one makes other rows of the same text


def is_store(path: Path) -> bool:
    return (path / "labels.bin").exists()


class TextData(WordedData):
    """Without a store, text is bytes."""

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
        if given.get("path") is None or not is_store(Path(str(given["path"])).expanduser()):
            return {"fingerprint": Vocabulary.of_bytes().fingerprint} | given
        return given


def check_ids(config: TextData) -> None:
    """Whether the ids are those of bytes, as text has them that is not in a store."""
    if config.fingerprint != Vocabulary.of_bytes().fingerprint:
        raise UserError(
            f"data.path={config.path}: is not a folder that `unmask prepare` made, but the ids are not those of bytes; "
            "give the store that they were made with, or prepare the text: unmask prepare text SOURCE --tokenizer NAME"
        )


def settings_of(sources: Sequence[str], config: TextData, out: Path) -> Settings:
    """How text becomes rows that are like those of a run."""
    return Settings(
        dataset="text",
        tokenizer=BYTES,
        out=out,
        sources=tuple(sources),
        length=config.length,
        rows=config.rows,
        text_field=config.field,
        validation_ratio=config.validation_ratio,
        split_seed=config.seed,
    )


def store_of(config: TextData) -> Path:
    """The folder of the rows: `data.path` itself, or a store of its text in the cache (the first process makes it).

    Raises:
        UserError: the text cannot be used.
    """
    if config.path is not None and is_store(Path(config.path).expanduser()):
        return Path(config.path).expanduser()
    check_ids(config)
    sources = [] if config.path is None else [config.path]
    if config.path is not None and not Path(config.path).expanduser().exists():
        raise UserError(
            f"data.path={config.path}: no such file or folder; what is on the Hugging Face hub is prepared first: "
            "unmask prepare text OWNER/NAME --tokenizer bytes --out FOLDER"
        )
    name = "python" if config.path is None else Path(config.path).expanduser().name
    folder = cache.folder(config.cache_dir) / "text" / f"{name}_{config.length}_{_digest(sources, config)}"
    with cache.held(folder):
        if not folder.exists():
            _make(settings_of(sources, config, folder))
            console.print(f"Rows of text kept in {folder}")
    return folder


def _make(settings: Settings) -> None:
    try:
        prepare(settings)
    except UserError as error:
        shutil.rmtree(settings.partial, ignore_errors=True)  # another text will be given, or another file of it
        raise UserError(f"data.path={', '.join(settings.sources) or None}: {error}") from error


def _digest(sources: Sequence[str], config: TextData) -> str:
    """Of the text itself, wherever it lies, and of how it is cut."""
    contents = [source.fingerprint()["sha256"] for source in find_sources(sources, DATASETS["text"])]
    cut = [config.length, config.rows, config.field, config.validation_ratio, config.seed]
    return hashlib.sha256(json.dumps([_VERSION, contents, cut]).encode()).hexdigest()[:12]
