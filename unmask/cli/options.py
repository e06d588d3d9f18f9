"""Options that several verbs share, and how they are read; results and files that verbs write."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.table import Table

from unmask import files, formats, paths
from unmask.config import recipes, registry
from unmask.config.settings import quoted
from unmask.decoding.config import DecodeConfig
from unmask.errors import UserError
from unmask.evaluation.evaluate import Cells
from unmask.progress import TextConsole
from unmask.tasks.task import Task, accept_changed_data

Run = Annotated[str, typer.Argument(help="A run folder, an export, or a Hugging Face checkpoint.", show_default=False)]


def _check_weights(weights: str | None) -> str | None:
    if weights not in (None, "ema", "raw"):
        raise UserError(f"--weights {weights}: use ema or raw")
    return weights


Weights = Annotated[
    str | None,
    typer.Option(
        callback=_check_weights, help="Weights to use: ema (averaged) or raw (default: ema if the run has it)."
    ),
]
Step = Annotated[str, typer.Option(help="Checkpoint to use: last, best, or a step.")]
Device = Annotated[str | None, typer.Option(help="Device: cpu, cuda, mps or auto (default: the one of the training).")]
DECODER_HELP = (
    "Settings of the decoder, such as `margin`, `margin,tokens_per_step=3` or `order=prob,steps=50`; the keys are "
    "those of the section `decode`, and those left out are the run's."
)
Decoder = Annotated[str | None, typer.Option(help=f"{DECODER_HELP} Default: the run's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def _permission(name: str, permit: Callable[[], None], meaning: str) -> Any:
    """Makes the option `name`. Where it is given, `permit` is called before the verb, which need not look at it."""

    def read(is_given: bool) -> bool:
        if is_given:
            permit()
        return is_given

    return typer.Option(name, callback=read, help=meaning)


TrustCode = Annotated[
    bool,
    _permission(
        "--trust-code",
        registry.trust_code,
        "Import code that a saved run names by import path (module:Class). Only for runs whose origin you trust.",
    ),
]
FollowLinks = Annotated[
    bool,
    _permission(
        "--follow-links",
        files.follow_links,
        "Read and write a run's parts also where they are links out of its folder, such as checkpoints on a bigger "
        "disk.",
    ),
]
DataChanged = Annotated[
    bool,
    _permission(
        "--data-changed",
        accept_changed_data,
        "Read the run's data even if they are no longer those that it began with, or if it does not say which these "
        "were (an older run).",
    ),
]
OUT = "--out "


def read_decoder(text: str, option: str = "--decoder") -> dict[str, Any]:
    """Reads `key=value,..` as the settings that it names, which are not checked yet; see `parse_decoder`."""
    where = f"{option} {text if len(text) < 200 else quoted(text)}"
    given: dict[str, Any] = {}
    for number, part in enumerate(_split(text)):
        key, equals, value = part.partition("=")
        if not part.strip():
            raise UserError(f"{where}: a setting is empty; write an order or key=value, as in margin,tokens_per_step=3")
        if not equals and number == 0:
            key, value = "order", part
        elif not equals:
            raise UserError(f"{where}: {quoted(part)} is not key=value")
        if equals and not value.strip():
            raise UserError(f"{where}: {quoted(part)} has no value; write {key}=null to unset it")
        key = key.removeprefix("decode.")
        if key in given:
            raise UserError(f"{where}: {quoted(key)} is given twice; give it once")
        given[key] = formats.parse_yaml(value, f"{where}: {quoted(key)}")
    try:
        given = DecodeConfig.rename_aliases(given)
    except UserError as error:
        raise UserError(f"{where}: decode: {error}") from None
    amounts = [key for key in DecodeConfig.alternatives if given.get(key) is not None]
    if len(amounts) > 1:
        raise UserError(f"{where}: {' and '.join(amounts)} both say how much a step reveals; give one of them")
    return given


def parse_decoder(text: str | None, base: DecodeConfig, option: str = "--decoder") -> DecodeConfig:
    """Reads `key=value,..` over `base`; a first word without `=` is the order. None returns `base` itself.

    Errors name the `option` that `text` was given to.
    """
    if text is None:
        return base
    where = f"{option} {text if len(text) < 200 else quoted(text)}"
    given = read_decoder(text, option)
    try:
        return recipes.updated(base, given, "decode")
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


def results() -> TextConsole:
    """Returns the console for human-readable results, which go to stdout."""
    return TextConsole()


def print_lines(lines: Iterable[str | Cells]) -> None:
    """Prints the lines and tables of a result."""
    out = results()
    for line in lines:
        out.print(line if isinstance(line, str) else table(line))


def table(cells: Cells) -> Table:
    """Makes a table for the terminal."""
    shown = Table(title=cells.title or None, title_justify="left")
    first, *others = cells.header
    shown.add_column(first, overflow="fold")
    for name in others:
        shown.add_column(name, justify="right", overflow="fold")
    for row in cells.rows:
        shown.add_row(*row)
    return shown


def print_json(value: dict[str, Any]) -> None:
    """Prints the one JSON object that a verb writes to stdout."""
    print(formats.to_json(value))


@contextmanager
def new_file(out: str | Path) -> Iterator[TextIO]:
    """Opens the new file of --out for writing. It has its name once the context ends well, until then another.

    Raises:
        UserError: the file exists, or cannot be made.
    """
    path = new_path(out)
    aside = path.with_name(files.aside_name(path))
    with files.naming(path, OUT):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = aside.open("x", encoding="utf-8")
    try:
        with files.naming_only(path), file:  # a full disk is named as the file that the user asked for
            yield file
        with files.naming(path, OUT):
            files.place_new(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def new_path(out: str | Path) -> Path:
    """Returns the path of --out, in full.

    Raises:
        UserError: something is there.
    """
    path = paths.user_path(out, OUT)
    if os.path.lexists(path):
        raise UserError(f"{OUT}{path}: exists already; name another file")
    return path


def make_out_folder(path: Path) -> Path:
    """Makes the folder of --out if it does not exist; returns it.

    Raises:
        UserError: it cannot be made, or cannot be written to.
    """
    path = paths.user_path(path, OUT)
    with files.naming(path, OUT):
        path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise UserError(f"{OUT}{path}: cannot be written to; name another folder")
    return path


def write(path: Path, content: str) -> None:
    """Writes a file of --out, over one that is there.

    Raises:
        UserError: it cannot be written.
    """
    with files.naming(path, OUT):
        files.write(path, content)
