"""The verb `unmask settings`."""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich import box
from rich.table import Table

from unmask.cli import options
from unmask.config import recipes
from unmask.config.registry import COMPONENTS
from unmask.config.run import RunConfig
from unmask.config.settings import Section, unknown
from unmask.errors import UserError
from unmask.masking.time import DensityConfig
from unmask.models import hf
from unmask.paths import user_path
from unmask.progress import warn
from unmask.training.folder import RunFolder, read_config
from unmask.training.loading import is_ours


def settings(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe, a YAML file or a run folder.")] = "sudoku/puma",
    chosen: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SECTION|KEY].. [key=value]..",
            help="Sections or keys to list, such as process or train.init (default: all); and settings that override "
            "the recipe's.",
        ),
    ] = None,
    as_json: options.AsJson = False,
    trust_code: options.TrustCode = False,
    follow_links: options.FollowLinks = False,
) -> None:
    """List every setting: its key, its value in a recipe or run, and its meaning.

    The keys depend on the components chosen with `task.name`, `model.name`, `process.name` and `process.time.name`.

    Examples:

    * `unmask settings sudoku/puma process`

    * `unmask settings text/uniform process.time process.time.name=beta`

    * `unmask settings runs/sudoku-puma train optim`
    """
    words = chosen or []
    config = _load(recipe, [word for word in words if "=" in word])
    rows = _select(list(explain(config)), [_own_key(config, word) for word in words if "=" not in word])
    if as_json:
        options.print_json({key: {"value": value, "meaning": meaning} for key, value, meaning in rows})
    else:
        options.results().print(_table(rows))


def _load(recipe: str, overrides: list[str]) -> RunConfig:
    if recipe in recipes.names() or not RunFolder(user_path(recipe)).exists():
        config = recipes.load(recipe, overrides)
        _warn_of_start(config.train.init)
        return config
    if overrides:
        raise UserError(f"{' '.join(overrides)}: the settings of a run stand; give a recipe to change them")
    return read_config(user_path(recipe))


def _warn_of_start(init: str | None) -> None:
    """Says that a training would not find what it is to start from: a recipe may be for another machine."""
    if init is None:
        return
    folder = user_path(init, "train.init=")
    if not (hf.is_checkpoint(folder) or is_ours(folder)):
        warn(
            f"train.init={init}: is no run, export or Hugging Face checkpoint here, so that `unmask train` refuses it; "
            "the shape of a checkpoint takes the place of model.preset"
        )


def _own_key(config: RunConfig, key: str) -> str:
    """Returns `key`, or the key that it is another name of."""
    section, dot, name = key.partition(".")
    aliases = getattr(config, section).aliases if section in RunConfig.model_fields else {}
    return f"{section}{dot}{aliases.get(name, name)}"


def explain(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yields dotted key, value (as in YAML) and meaning of each setting."""
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        key, inner = f"{prefix}{name}", getattr(section, name)
        if isinstance(inner, Section):
            yield from explain(inner, f"{key}.")
        else:
            yield key, values[name], _describe(key, field, section)


def _describe(key: str, field: FieldInfo, section: Section) -> str:
    """Describes a setting of `section`; for the name of a component, lists those that exist."""
    where, _, last = key.rpartition(".")
    kind = "time" if isinstance(section, DensityConfig) else where
    if last == "name" and kind in COMPONENTS:
        return f"{', '.join(COMPONENTS[kind])}; or package.module:Class of your own"
    literals = [each for each in (field.annotation, *get_args(field.annotation)) if get_origin(each) is Literal]
    choices = [str(choice) for literal in literals for choice in get_args(literal)]
    return "; ".join(filter(None, [", ".join(choices), field.description]))


SettingRows = list[tuple[str, Any, str]]


def _select(rows: SettingRows, chosen: list[str]) -> SettingRows:
    """Selects the rows of the keys and sections `chosen`; all rows if none are chosen.

    Raises:
        UserError: one of them is neither a key nor a section.
    """
    keys = [key for key, _, _ in rows]
    within = {each: {key for key in keys if f"{key}.".startswith(f"{each}.")} for each in chosen}
    for each, found in within.items():
        if not found:
            raise UserError(unknown(each, [*dict.fromkeys(key.rpartition(".")[0] for key in keys), *keys]))
    return [row for row in rows if not chosen or any(row[0] in found for found in within.values())]


def _table(rows: SettingRows) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("key", no_wrap=True)
    table.add_column("value", overflow="fold", max_width=24)
    table.add_column("meaning", overflow="fold")
    section = None
    for key, value, what in rows:
        if section not in (None, key.split(".")[0]):
            table.add_section()
        section = key.split(".")[0]
        table.add_row(key, value if isinstance(value, str) else json.dumps(value), what)
    return table
