"""A section of settings: what it may hold, and how a wrong one is explained."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema

from unmask.errors import UserError
from unmask.formats import to_yaml_line

LARGEST_INT = 2**63 - 1
"""Largest number that a setting without a bound of its own may be: what tensors hold. All bits of a seed count."""
_LONGEST_SHOWN = 200


def known(what: str, table: Mapping[str, object]) -> AfterValidator:
    """Makes the check that a setting is a key of `table`, which is called `what`."""

    def check(value: str) -> str:
        if value not in table:
            raise ValueError(f"unknown {what}; use one of {', '.join(table)}")
        return value

    return AfterValidator(check)


DTypeName = Literal["auto", "float32", "bfloat16", "float64"]
WeightsName = Literal["ema", "raw"]


def _take_both(value: Any) -> Any:
    if type(value) is int:
        return value, value
    if not isinstance(value, list | tuple):
        raise ValueError("give a whole number, or two of them, as [low, high]")
    return value


OneIsBoth = BeforeValidator(_take_both)
"""Takes one number for both ends of a range."""
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(lambda ids: sorted(set(ids)))]


def _make_numbers_strict(schema: Any) -> None:
    """Changes pydantic's `schema`: no number is taken from text or a truth value, and integers have 64 bits."""
    if isinstance(schema, list | tuple):
        for part in schema:
            _make_numbers_strict(part)
    if not isinstance(schema, dict):
        return
    if schema.get("type") in ("int", "float"):
        schema["strict"] = True
    if schema.get("type") == "int":
        schema.setdefault("le", LARGEST_INT)
        schema.setdefault("ge", -LARGEST_INT - 1)
    for key, part in schema.items():
        if key not in ("default", "metadata"):
            _make_numbers_strict(part)


class Section(BaseModel):
    """A part of the configuration: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    alternatives: ClassVar[tuple[str, ...]] = ()
    """Keys of which a later one, in an override or an extending recipe, takes the place of an earlier one."""
    dependents: ClassVar[dict[str, str]] = {}
    """Keys that mean something only beside one of the alternatives, and go where another takes its place."""

    aliases: ClassVar[dict[str, str]] = {}
    """Other names of keys, which users of other code and older runs bring, and the keys that they stand for.

    A subclass adds its own to those of its parents, but for names that are fields there.
    """
    needs: ClassVar[dict[str, str]] = {}
    """Keys that have an effect only beside another key's value: `key=value`, or `key=..` for any but null.

    A subclass adds its own to those of its parents.
    """
    partial_sections: ClassVar[dict[str, "type[Section]"]] = {}
    """Sections of which a field's mapping holds some settings, which are checked where they are used."""

    @classmethod
    def __pydantic_init_subclass__(cls, **arguments: Any) -> None:
        names = {name: key for own in reversed(cls.__mro__) for name, key in vars(own).get("aliases", {}).items()}
        cls.aliases = {name: key for name, key in names.items() if name not in cls.model_fields}
        cls.needs = {key: need for own in reversed(cls.__mro__) for key, need in vars(own).get("needs", {}).items()}

    @model_validator(mode="before")
    @classmethod
    def _accept_aliases(cls, given: Any) -> Any:
        return cls.rename_aliases(given) if isinstance(given, dict) else given

    @classmethod
    def rename_aliases(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Returns the settings `given` with this section's own keys in place of aliases.

        Raises:
            UserError: two names of one key are there.
        """
        for key in set(cls.aliases.values()):
            if len(names := [name for name in given if cls.aliases.get(name, name) == key]) > 1:
                values = " and ".join(f"{name}={quoted(given[name])}" for name in names)
                raise UserError(f"{values} are one setting; give {key} alone")
        return {cls.aliases.get(key, key): value for key, value in given.items()}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: CoreSchema = handler(source)
        _make_numbers_strict(schema)
        return schema

    def without_effect(self) -> dict[str, str]:
        """Returns what the keys need that have no effect beside the others."""
        return {key: need for key, need in self.needs.items() if not self._has(need)}

    def _has(self, need: str) -> bool:
        key, _, needed = need.partition("=")
        value = getattr(self, key)
        return value is not None if needed == ".." else to_yaml_line(value) == needed

    def of_run(self, folder: Path) -> "Section":
        """Returns these settings for a run that lies in `folder`: a section may prefer the files kept there."""
        return self


def name_of(section: Section) -> str:
    """Returns the name of the component of a `data`, `model` or `process` section."""
    return str(section.model_dump()["name"])


SectionT = TypeVar("SectionT", bound=Section)


class WrongSettings(UserError):
    """A `UserError` that names every wrong key."""


AboutKey = Callable[[str], str | None]
"""Says where a key belongs that a section does not have; None if nothing is known of it."""


def check_section(section: type[SectionT], value: Any, prefix: str, about_key: AboutKey = lambda _: None) -> SectionT:
    """Checks one section; validators that check sections within it find `prefix` as `info.context`.

    Raises:
        WrongSettings: with the keys under `prefix`.
    """
    try:
        return section.model_validate(value, context=prefix)
    except ValidationError as error:
        raise WrongSettings(
            "\n".join(_explain(section, detail, prefix, about_key) for detail in error.errors())
        ) from None


def as_section(section: type[SectionT], config: SectionT | None, settings: dict[str, Any], prefix: str) -> SectionT:
    """Returns `config`, or the section that the keyword arguments `settings` make where there is none.

    Raises:
        UserError: wrong settings, or both are given.
    """
    if config is None:
        return check_section(section, settings, prefix)
    if settings:
        raise UserError(f"{', '.join(settings)}: give a configuration, or its settings by keyword, not both")
    return config


def check_into(
    section: type[Section], value: Any, prefix: str, problems: list[str], about_key: AboutKey = lambda _: None
) -> Section | None:
    """Checks one section. If it is wrong, adds the error to `problems` and returns None."""
    try:
        return check_section(section, value, prefix, about_key)
    except UserError as error:
        problems.append(str(error))
        return None


def _explain(section: type[Section], detail: Any, prefix: str, about_key: AboutKey) -> str:
    key = ".".join([prefix, *(str(part) for part in detail["loc"])])
    if detail["type"] == "extra_forbidden":
        if len(detail["loc"]) == 1 and (said := about_key(detail["loc"][0])):
            return f"{key}={quoted(detail['input'])}: {said}"
        return unknown(key, [f"{prefix}.{name}" for name in section.model_fields])
    if detail["type"] == "missing":
        return f"{key} is missing"
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, WrongSettings):  # of a section within this one
        return str(cause)
    message = _MESSAGES.get(detail["type"], detail["msg"]).removeprefix("Value error, ")
    if message.startswith(f"{prefix}."):  # names its key, in the words of whoever wrote the check
        return message
    if detail["type"] == "model_type" and not detail["loc"]:
        first = next(iter(section.model_fields))
        is_name = first in ("name", "order") and str(detail["input"]).isidentifier()
        value = detail["input"] if is_name and len(detail["input"]) <= _LONGEST_SHOWN else ".."
        return f"{key}={quoted(detail['input'])}: is a section; give its settings, such as {key}.{first}={value}"
    return f"{key}={quoted(detail['input'])}: {message}" if detail["loc"] else f"{prefix}: {message}"


_MESSAGES = dict.fromkeys(("tuple_type", "list_type"), "Input should be a list, as [.., ..]")


def quoted(value: object) -> str:
    """Writes a wrong value, shortened if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than some 4,300 digits
        return "(a number of thousands of digits)"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}.. ({len(text):,} characters)"


def unknown(key: str, valid: list[str]) -> str:
    """Words the error for an unknown key, with the nearest valid one."""
    if len(key) > _LONGEST_SHOWN:
        return f"unknown key {quoted(key)}; valid: {', '.join(valid)}"
    close = [name for name in valid if name.startswith(key)] or difflib.get_close_matches(key, valid, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"valid: {', '.join(valid)}"
    return f"unknown key {key}; {hint}"


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys and values of a nested dict."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
