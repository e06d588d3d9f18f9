"""Settings of a preparation, and the data sets that `unmask prepare` knows by name."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unmask.data.chat_template import ChatTemplate
from unmask.errors import UserError
from unmask.machine import require_memory


@dataclass(frozen=True)
class Dataset:
    """A data set on the Hugging Face hub, and the names of its fields.

    Attributes:
        repository: its name on the hub; None for text of one's own (default: Python's standard library).
        fields: those of prompt and answer; or one alone, that of running text; none for conversations, which have
            several forms.
        recipe: the recipe that trains on it.
        small_recipe: the recipe for a small vocabulary.
        config: the hub's name for a variant of it, if there are several.
        test_split: the split for evaluation, copied as text, if there is one.
    """

    repository: str | None
    fields: tuple[str, ...]
    recipe: str
    small_recipe: str
    config: str | None = None
    split: str = "train"
    test_split: str | None = None

    @property
    def kind(self) -> str:
        """A key of `workers.KINDS`."""
        return ("chat", "text", "answers")[len(self.fields)]


DATASETS = {
    "tinygsm": Dataset("TinyGSM/TinyGSM", ("question", "code"), "tinygsm/puma", "tinygsm/puma_small"),
    "gsm8k": Dataset(
        "openai/gsm8k", ("question", "answer"), "tinygsm/puma", "tinygsm/puma_small", config="main", test_split="test"
    ),
    "text": Dataset(None, ("text",), "text/uniform", "text/uniform_small"),
    "chat": Dataset(None, (), "chat/uniform", "chat/uniform"),
    "lm1b": Dataset("dvruette/lm1b", ("text",), "text/lm1b_uniform", "text/uniform_small"),
    "openwebtext": Dataset("Skylion007/openwebtext", ("text",), "text/owt_uniform", "text/uniform_small"),
}

_CHOICES = {
    "dataset": tuple(DATASETS),
    "too_long": ("truncate", "drop", "turns"),
    "vocab": ("full", "used"),
    "rows": ("wrap", "document"),
    "turns": ("all", "last"),
}
_ONLY_FOR = {
    "rows": ("text",),
    "text_field": ("text",),
    "separator": ("answers",),
    "prompt_field": ("answers", "chat"),
    "answer_field": ("answers", "chat"),
    **dict.fromkeys(("messages_field", "template", "template_options", "turns"), ("chat",)),
}
"""The kinds of data that options are for; others are for all."""
_LONGEST = 2**24
_MOST_WORKERS = 1024
_WORKER_BYTES = 2**24  # of a process, beside what it shares with the others
_FREE = ("out", "workers", "skip_bad", "lossy")


@dataclass(frozen=True)
class PrepareSettings:
    """A preparation.

    Attributes:
        dataset: a name in `DATASETS`.
        tokenizer: a folder, a `tokenizer.json`, or a name on the Hugging Face hub; `bytes`: none.
        out: the folder to make; work is kept in `OUT.partial` until it is whole.
        sources: files, folders and names on the hub, read one after the other (`documents.find_source`; default: the
            data set as it is published).
        length: tokens of a row, a multiple of 8.
        too_long: `truncate` or `drop`: the treatment of rows of more tokens; of conversations also `turns`: they
            lose as many of their last turns as they must.
        vocab: `full` for all ids of the tokenizer, `used` for those that occur.
        rows: of text: `wrap` for documents joined and cut into rows, `document` for one document a row.
        separator: text between prompt and answer, part of the prompt.
        limit: rows to read; None for all.
        mask_token: a token of the tokenizer that no text holds; None for a new one.
        eos_token: the token that ends an answer (default: the one in the tokenizer's settings).
        prompt_field, answer_field, text_field, messages_field: names of fields (default: as in `DATASETS`).
        template: of conversations: a file of Jinja, `plain`, or itself (default: the tokenizer's own, else `plain`).
        template_options: variables that the template reads, such as `enable_thinking`.
        turns: of conversations: the assistant's turns that are learned, `all` or the `last` alone.
        validation_ratio, split_seed: share and seed of the split: documents of text are split here; for prompts
            with answers they are noted in `meta.json`, and training splits the rows.
        skip_bad: leave out rows that cannot be used, and list them, instead of stopping at the first.
        lossy: take a tokenizer that does not give texts back as they were (`round_trip.py`).
        workers: processes; 1 for this one.
        batch_rows: rows of a shard.
    """

    dataset: str
    tokenizer: str
    out: Path
    sources: tuple[str, ...] = ()
    length: int = 512
    too_long: str = "truncate"
    vocab: str = "full"
    rows: str = "wrap"
    separator: str = "\n"
    limit: int | None = None
    mask_token: str | None = None
    eos_token: str | None = None
    prompt_field: str | None = None
    answer_field: str | None = None
    text_field: str | None = None
    messages_field: str | None = None
    template: str | ChatTemplate | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    turns: str = "all"
    validation_ratio: float = 0.02
    split_seed: int = 0
    skip_bad: bool = False
    lossy: bool = False
    workers: int = 1
    batch_rows: int = 1000

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise UserError(f"{_option(key)}{getattr(self, key)}: use {' or '.join(choices)}")
        self._check_kind()
        if self.length < 8 or self.length % 8:
            near = max(8, round(self.length / 8) * 8)
            raise UserError(f"--length {self.length}: must be a multiple of 8, eight positions a byte; use {near}")
        for key in ("limit", "workers", "batch_rows"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{_option(key)}{value}: must be at least 1")
        if self.length > _LONGEST or self.workers > _MOST_WORKERS:
            key, most = ("length", _LONGEST) if self.length > _LONGEST else ("workers", _MOST_WORKERS)
            raise UserError(f"--{key} {getattr(self, key)}: must be at most {most}")
        require_memory(self.workers * _WORKER_BYTES, f"--workers {self.workers}", "take fewer")
        if not 0 < self.validation_ratio < 1:
            raise UserError(f"--validation-ratio {self.validation_ratio}: must be between 0 and 1, such as 0.02")
        if not 0 <= self.split_seed < 2**63:
            raise UserError(f"--split-seed {self.split_seed}: must be from 0 to 2^63 - 1")

    def _check_kind(self) -> None:
        """Raises `UserError` for options that this kind of data does not have."""
        for key, kinds in _ONLY_FOR.items():
            if self.row.kind not in kinds and getattr(self, key) not in (
                type(self).__dataclass_fields__[key].default,
                {},
            ):
                raise UserError(f"{_option(key)}{getattr(self, key)}: {self.dataset} has none; leave it out")
        if self.too_long == "turns" and self.row.kind != "chat":
            raise UserError(f"--too-long turns: {self.dataset} has no turns; use truncate or drop")
        if self.messages_field is not None and (self.prompt_field is not None or self.answer_field is not None):
            raise UserError("--messages-field: is the whole conversation; leave out --prompt-field and --answer-field")
        if self.row.kind == "text" and self.rows == "wrap" and self.too_long == "drop":
            raise UserError(
                "--too-long drop: nothing is too long for --rows wrap; use --rows document, or leave it out"
            )

    @property
    def row(self) -> Dataset:
        return DATASETS[self.dataset]

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields of prompt and answer, or of text; none for conversations."""
        given = {"text": (self.text_field,), "answers": (self.prompt_field, self.answer_field), "chat": ()}[
            self.row.kind
        ]
        return tuple(own or usual for own, usual in zip(given, self.row.fields, strict=True))

    @property
    def layout(self) -> dict[str, str]:
        """The entries of `meta.json` about the layout of a row."""
        if self.row.kind == "chat":
            return {"turns": self.turns}
        return {"packing": self.rows} if self.row.kind == "text" else {"separator": self.separator}

    @property
    def partial(self) -> Path:
        """The folder of unfinished work."""
        return self.out.parent / f"{self.out.name}.partial"  # `with_name` fails at `.` and `/`, which exist

    def identity(self) -> dict[str, Any]:
        """Returns the settings that must be the same for a stopped preparation to go on."""
        return {key: value for key, value in asdict(self).items() if key not in _FREE} | {"fields": list(self.fields)}


def _option(key: str) -> str:
    return "" if key == "dataset" else f"--{key.replace('_', '-')} "
