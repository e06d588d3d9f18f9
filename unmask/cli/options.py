"""Options that several verbs share, and how they are read; results and files that verbs write."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from unmask import files, formats
from unmask.config import recipes, registry
from unmask.config.settings import check_section, shown
from unmask.decoding.config import DecodeConfig
from unmask.errors import UserError
from unmask.tasks.task import Task, accept_changed_data

Run = Annotated[str, typer.Argument(help="A run folder, or an export.", show_default=False)]
Weights = Annotated[
    str | None, typer.Option(help="Weights to use: ema (averaged) or raw (default: ema if the run has it).")
]
Step = Annotated[str, typer.Option(help="Checkpoint to use: last, best, or a step.")]
Device = Annotated[str | None, typer.Option(help="Device: cpu, cuda or auto (default: the one of the training).")]


def _trust(is_trusted: bool) -> bool:
    if is_trusted:
        registry.trust_code()
    return is_trusted


TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        callback=_trust,
        help="Import code that a saved run names by import path (module:Class). Only for runs whose origin you trust.",
    ),
]


def _accept_changed(is_accepted: bool) -> bool:
    if is_accepted:
        accept_changed_data()
    return is_accepted


DataChanged = Annotated[
    bool,
    typer.Option(
        "--data-changed",
        callback=_accept_changed,
        help="Read the run's data even if they are no longer those that it began with.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DECODER_HELP = (
    "Settings of the decoder, such as `margin`, `margin,tokens_per_step=3` or `order=prob,steps=50`; the keys are "
    "those of the section `decode` (default: the run's)."
)


def parse_decoder(text: str | None, base: DecodeConfig, option: str = "--decoder") -> DecodeConfig:
    """Reads `key=value,..` over `base`; a first word without `=` is the order. None returns `base` itself.

    Errors name the `option` that `text` was given to.
    """
    if text is None:
        return base
    where = f"{option} {text if len(text) < 200 else shown(text)}"
    given: dict[str, Any] = {}
    for number, part in enumerate(_split(text)):
        key, equals, value = part.partition("=")
        if not equals and number == 0:
            key, value = "order", part
        elif not equals:
            raise UserError(f"{where}: {shown(part)} is not key=value")
        key = key.removeprefix("decode.")
        if key in given:
            raise UserError(f"{where}: {shown(key)} is given twice; give it once")
        given[key] = formats.parse_yaml(value, f"{where}: {shown(key)}")
    settings = base.model_dump()
    try:
        recipes.merge(settings, recipes.rename_keys(given), DecodeConfig, "decode")
        return check_section(DecodeConfig, settings, "decode")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _split(text: str) -> list[str]:
    """Splits at commas, but not at those within a list."""
    parts, depth = [""], 0
    for sign in text:
        depth = max(0, depth + (sign == "[") - (sign == "]"))
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def token(task: Task, text: str) -> int:
    """Returns the id of the token of `task` that is written `text`.

    Raises:
        UserError: there is no such token.
    """
    own = getattr(task, "token", None)
    try:
        return _token_of_symbol(task, text) if own is None else own(text)
    except UserError as error:
        raise UserError(f"--forbid {error}") from error


def _token_of_symbol(task: Task, text: str) -> int:
    known = [i for i in range(task.tokens.vocab_size) if i != task.tokens.mask_id]
    found = next((i for i in known if task.symbol(i) == text), None)
    if found is None:
        some = ", ".join(filter(None, map(task.symbol, known[:10])))
        raise UserError(f"{text!r}: is no token of this task; its tokens are {some}{', ..' * (len(known) > 10)}")
    return found


def check_weights(weights: str | None) -> str | None:
    if weights not in (None, "ema", "raw"):
        raise UserError(f"--weights {weights}: use ema or raw")
    return weights


def results() -> Console:
    """Returns the console for human-readable results, which go to stdout."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """Prints the one JSON object that a verb writes to stdout."""
    print(json.dumps(value))


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Opens a new file for writing. If the context fails while the file is still empty, the file is removed again.

    Raises:
        UserError: the file exists, or cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise UserError(f"--out {path}: exists already; name another file") from error
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error}") from error
    with file:
        try:
            yield file
        except BaseException:
            if path.stat().st_size == 0:
                path.unlink()
            raise


def make_folder(path: Path) -> None:
    """Makes the folder of --out if it does not exist.

    Raises:
        UserError: it cannot be made, or cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be made: {error}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"--out {path}: cannot be written to; name another folder")


def write(path: Path, content: str) -> None:
    """Writes a file of --out, over one that is there.

    Raises:
        UserError: it cannot be written.
    """
    try:
        files.write(path, content)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error}") from error


def read_lines(path: str) -> list[str]:
    """Reads the lines of a text file.

    Raises:
        UserError: it cannot be read.
    """
    try:  # not `str.splitlines`, which also splits at characters that JSON strings may hold
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
