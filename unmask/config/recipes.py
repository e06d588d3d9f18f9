"""Recipes: YAML files that hold the settings of a run.

A recipe may `extends: other.yaml`, a file beside it, or a shipped recipe, as in `extends: sudoku/puma`.
"""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import SerializeAsAny

from unmask import formats
from unmask.config.registry import resolve
from unmask.config.run import NAMED_BY, RunConfig, section_class
from unmask.config.settings import Section, check_section, quoted
from unmask.errors import UserError
from unmask.paths import existing_file, user_path

S = TypeVar("S", bound=Section)
FOLDER = Path(__file__).parents[1] / "recipes"
_MOST_PARTS = 32


def names() -> list[str]:
    """Lists the shipped recipes, such as `sudoku/puma`."""
    return sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.yaml"))


def short_name(recipe: str) -> str:
    """Names a recipe: `sudoku/puma` for a shipped one, `mine` for path/to/mine.yaml."""
    return recipe if recipe in names() else Path(recipe).stem


def load(recipe: str, overrides: Sequence[str] = (), *, resumed: dict[str, Any] | None = None) -> RunConfig:
    """Loads the configuration of `recipe` (a shipped name or a YAML path) with `overrides`, each `key=value`.

    Their order matters only where one setting is given twice: the later one wins.

    A run that goes on, with the settings `resumed`, needs no `train.init` any more: where that checkpoint is gone, its
    shape is the run's.

    Raises:
        UserError: an unknown recipe, an unreadable file, a malformed override, or a wrong setting.
    """
    tree = _read(_find(recipe), seen=())
    parsed = [_parse_override(override) for override in overrides]
    parsed = [_in_own_names(each, (tree, *parsed)) for each in parsed]
    _apply(tree, _joined(overrides, parsed))
    _check_alternatives(parsed, tree)
    _take_shape(tree, resumed)
    return RunConfig.from_tree(tree)


def _in_own_names(given: dict[str, Any], trees: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the settings `given` by the names that their sections have for them; see `_section` for `trees`."""
    return {
        key: _renamed(_section(key, *trees), value, key) if isinstance(value, dict) else value
        for key, value in given.items()
    }


def _renamed(section: type[Section], given: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Returns `section.rename_aliases(given)`; errors call the section `prefix`."""
    try:
        return section.rename_aliases(given)
    except UserError as error:
        raise UserError(f"{prefix}: {error}") from None


def _joined(overrides: Sequence[str], parsed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins overrides before they are applied: a name drops what the recipe had, but not what stands before it here."""
    joined: dict[str, Any] = {}
    for override, tree in zip(overrides, parsed, strict=True):
        _write_over(joined, tree, depth=override.partition("=")[0].count(".") + 1)
    return joined


def _write_over(base: dict[str, Any], update: dict[str, Any], depth: int) -> None:
    """Merges `update`, whose value lies `depth` keys deep. A mapping with a name there stands for a whole component."""
    for key, value in update.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and _is_added(old, value, depth):
            _write_over(old, value, depth - 1)
        else:
            base[key] = value


def _is_added(old: dict[str, Any], new: dict[str, Any], depth: int) -> bool:
    if "name" not in new:
        return True
    return depth > 1 and old.get("name", new["name"]) == new["name"]


def _check_alternatives(overrides: Sequence[dict[str, Any]], tree: dict[str, Any]) -> None:
    """Raises `UserError` if two overrides give alternatives of one section: the later one would win unseen."""
    for key in RunConfig.model_fields:
        sections = [own for override in overrides if isinstance(own := override.get(key), dict)]
        section = _section(key, tree) if len(sections) > 1 else Section
        given = {name: value for own in sections for name, value in own.items()}
        if len(both := [f"{key}.{name}" for name in section.alternatives if given.get(name) is not None]) > 1:
            raise UserError(f"{' and '.join(both)} exclude each other; give one of them")


def _take_shape(tree: dict[str, Any], resumed: dict[str, Any] | None) -> None:
    """Puts the shape of the Hugging Face checkpoint `train.init` in place of the model's preset."""
    model, train = tree.get("model"), tree.get("train")
    source = train.get("init") if isinstance(train, dict) else None
    if not (isinstance(model, dict) and isinstance(source, str) and model.get("preset") is not None):
        return
    network: Any = resolve("model", str(model.get("name", "transformer")))
    shape = network.shape_of(source) if hasattr(network, "shape_of") else None
    if shape is None and resumed is not None and not user_path(source, "train.init=").exists():
        shape = _saved_shape(resumed, source)
    if shape is not None:
        tree["model"] = {**shape, **model, "preset": None}


def _saved_shape(resumed: dict[str, Any], source: str) -> dict[str, Any] | None:
    """Finds the model that a run has from the checkpoint `source`; None where it has none of it."""
    model, train = resumed.get("model"), resumed.get("train")
    if not (isinstance(model, dict) and isinstance(train, dict)) or train.get("init") != source:
        return None
    return model if model.get("preset") is None else None  # a preset stands unless a checkpoint's shape took its place


def _find(recipe: str) -> Path:
    if recipe in names():
        return FOLDER / f"{recipe}.yaml"
    if Path(recipe).suffix in (".yaml", ".yml") and (path := user_path(recipe, "recipe ")).exists():
        return existing_file(path, "recipe ")
    if os.path.isfile(recipe):  # noqa: PTH113 - false where a name is too long
        raise UserError(
            f"recipe {quoted(recipe)}: is no recipe, whose name ends in .yaml; rename the file if it is one"
        )
    close = difflib.get_close_matches(recipe, names(), n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        f"recipe {quoted(recipe)}: not found; {hint}Shipped: {', '.join(names())}; or give the path of a .yaml file"
    )


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Reads the file's settings, merged over those that it extends."""
    if path.resolve() in seen:
        raise UserError(f"{path}: `extends` goes in a circle: {' -> '.join(p.name for p in (*seen, path))}")
    tree = formats.read_yaml(path)
    if tree is None or tree == {}:
        raise UserError(f"{path}: is empty; a recipe holds settings, or `extends` another recipe")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, not {type(tree).__name__}")
    parent = tree.pop("extends", None)
    base = {} if parent is None else _read(_find_parent(path, parent), (*seen, path.resolve()))
    try:
        _apply(base, tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return base


def _find_parent(path: Path, parent: Any) -> Path:
    """Finds the file that `path` extends: beside it, or shipped."""
    if isinstance(parent, str) and parent in names():
        return FOLDER / f"{parent}.yaml"
    if not isinstance(parent, str) or not (path.parent / parent).is_file():
        raise UserError(
            f"{path}: extends {quoted(parent)}, but there is no such file beside it, and no such shipped recipe; "
            f"shipped: {', '.join(names())}"
        )
    return path.parent / parent


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    where = f"override {quoted(override)}"
    if not equals or not key:
        raise UserError(f"{where}: write key=value, such as train.steps=500")
    if not text.strip():  # perhaps a variable of the shell, which is not set
        raise UserError(f"{where}: has no value; write {key}=null to unset it")
    if " #" in text and text.lstrip()[0] not in "'\"[{":
        raise UserError(
            f"{where}: YAML reads no further than ' #'; put the value into quotes of its own: {key}='\".. #..\"'"
        )
    parts = key.split(".")
    if len(parts) > _MOST_PARTS:
        raise UserError(f"{where}: no setting lies {len(parts):,} sections deep")
    value = formats.parse_yaml(text, where)
    for part in reversed(parts):
        value = {part: value}
    return value


def gives(override: str, key: str) -> bool:
    """True if the override gives the setting `key`, such as train.seed: by itself, or in a mapping of its section."""
    tree: Any = _parse_override(override)
    for part in key.split("."):
        if not (isinstance(tree, dict) and part in tree):
            return False
        tree = tree[part]
    return True


def _apply(base: dict[str, Any], update: dict[str, Any]) -> None:
    """Writes `update` over the settings `base`. If `update` names another task, the `data` of `base` are dropped."""
    old, new = (tree.get("task") for tree in (base, update))
    if isinstance(old, dict) and isinstance(new, dict) and new.get("name", old.get("name")) != old.get("name"):
        base.pop("data", None)
    for key, value in update.items():
        if value is None and base.get(key) and key in RunConfig.model_fields:
            raise UserError(f"{key}: is empty, which would drop all that it holds; leave it out, or give its settings")
        kind, default = NAMED_BY.get(key, ("", ""))
        section = _section(key, base, update)
        _write(base, key, value, section, key, is_named=kind == key, default=default)


def _section(key: str, *trees: dict[str, Any]) -> type[Section]:
    """Returns the class that checks section `key`, for the component named in the trees (the last one wins)."""
    field = RunConfig.model_fields.get(key)
    if field is None:
        return Section
    named = {
        kind: {name: value for tree in trees if isinstance(tree.get(kind), dict) for name, value in tree[kind].items()}
        for kind in ("task", "model", "process")
    }
    return section_class(key, named, field.annotation)


def _write(
    tree: dict[str, Any],
    key: str,
    value: Any,
    section: type[Section],
    prefix: str,
    *,
    is_named: bool,
    default: str | None = None,
) -> None:
    """Merges a section into the one in `tree`, or replaces it if it names another component.

    If `is_named`, its name stands for a component, by default for `default`; else it is a setting like any other.
    """
    old: Any = tree.get(key)
    is_merged = isinstance(old, dict) and isinstance(value, dict)
    if is_merged and is_named:
        is_merged = value.get("name") in (None, old.get("name", default))
    if not is_merged:
        old = tree[key] = {} if isinstance(value, dict) else value
    if isinstance(value, dict):
        _merge(old, value, section, prefix)


def _within(section: type[Section], key: str) -> tuple[type[Section], bool]:
    """Returns the class of the section `key` within `section`, and whether its name chooses another.

    As far as is known: a name chooses, but for a field of one class of sections (no `SerializeAsAny`).
    """
    if key in section.partial_sections:
        return section.partial_sections[key], False
    field = section.model_fields.get(key)
    if field is None or SerializeAsAny in map(type, field.metadata):
        return Section, True
    for own in (field.annotation, *get_args(field.annotation)):
        if isinstance(own, type) and issubclass(own, Section):
            return own, False
    return Section, True


def updated(base: S, given: dict[str, Any], prefix: str) -> S:
    """Returns `base` with the settings `given`, as `_merge` does.

    Raises:
        UserError: a setting is unknown or wrong; the message calls the section `prefix`.
    """
    settings = base.model_dump()
    _merge(settings, given, type(base), prefix)
    return check_section(type(base), settings, prefix)


def _merge(base: dict[str, Any], update: dict[str, Any], section: type[Section], prefix: str) -> None:
    """Writes `update` into `base`, by the section's own names; `base` has those already.

    One of the section's alternatives replaces the others, with their dependents.

    Raises:
        UserError: a key is there under two names; the message calls the section `prefix`.
    """
    update = _renamed(section, update, prefix)
    if any(update.get(key) is not None for key in section.alternatives):
        for key in section.alternatives:
            base.pop(key, None)
        for key, owner in section.dependents.items():
            if update.get(owner) is None:
                base.pop(key, None)
    for key, value in update.items():
        own, is_named = _within(section, key)
        _write(base, key, value, own, f"{prefix}.{key}", is_named=is_named)
