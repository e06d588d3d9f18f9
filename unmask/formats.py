"""Reads and writes text, JSON and YAML that anybody may have made: bounded, typed, and with errors that name the place.

YAML is read by the rules of YAML 1.2's core schema: `010` is ten, `yes`, `12:30` and `2001-01-01` are text. Tags and
repeated keys are errors.
"""

import json
import math
import re
import stat
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from unmask.errors import UserError

MAX_BYTES = 64 * 2**20
"""Most bytes of a file that is read whole, unless its reader asks for more."""
_MAX_DEPTH = 64
_MAX_NODES = 200_000
_MAX_DIGITS = 400
_STEERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)
_HEAD = "tag:yaml.org,2002:"


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """Reads a regular file of UTF-8 text; a byte order mark at its start is dropped.

    Raises:
        UserError: it cannot be read, is no regular file, too long, or not UTF-8; names the line.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: opening a fifo waits for its writer
            raise UserError(f"{path}: is no regular file")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{path}: cannot be read: {error}") from error
    if len(content) > max_bytes:
        raise UserError(f"{path}: has more than {max_bytes:,} bytes, too many for what it should be")
    return decode(content, str(path))


def decode(content: bytes, where: str) -> str:
    """Decodes UTF-8 bytes; drops a byte order mark at their start.

    Raises:
        UserError: they are not UTF-8; names the line and the first wrong byte.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{where}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; convert the file to UTF-8"
        ) from error


def read_json(path: Path, kind: Any = Any, *, max_bytes: int = MAX_BYTES) -> Any:
    """Reads a JSON file whose value is of type `kind` (a type, dataclass or model that pydantic can validate strictly).

    Raises:
        UserError: it cannot be read, is not JSON, or a field is of another type or out of range; names the field.
    """
    return checked(parse_json(read_text(path, max_bytes=max_bytes), str(path)), kind, str(path))


def checked(value: Any, kind: Any, where: str) -> Any:
    """Returns `value` as the type `kind`, converted as JSON needs (a list to a tuple), never guessed.

    Raises:
        UserError: it is of another type; names the first wrong field.
    """
    if kind is Any:
        return value
    try:
        return _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the value"
        raise UserError(f"{where}: {field}: {first['msg']} (found {str(first['input'])[:60]!r})") from error


@cache
def _adapter(kind: Any) -> Any:
    return TypeAdapter(kind)


def parse_json(text: str | bytes, where: str) -> Any:
    """Parses JSON; `NaN` and `Infinity`, which are no JSON, are errors.

    Raises:
        UserError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_int=_integer)
    except RecursionError as error:
        raise UserError(f"{where}: is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{where}: is not JSON: {error}") from error


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def to_json(value: Any, **options: Any) -> str:
    """Formats `value` as JSON; numbers that are not finite become null."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def printable(text: str) -> str:
    """Escapes what could steer a terminal or turn a line's direction; line ends and tabs stay.

    An escape character becomes the four characters `\\x1b`.
    """
    return _STEERS.sub(lambda found: ascii(found.group())[1:-1], text)


def read_yaml(path: Path) -> Any:
    """Reads a YAML file.

    Raises:
        UserError: it cannot be read, or `parse_yaml` refuses it.
    """
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Parses one YAML document by the core schema of YAML 1.2.

    Raises:
        UserError: it is not YAML, repeats a key, has a tag, or is larger than any configuration; names the line.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise UserError(f"{where}: is not valid YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{where}: is nested too deeply") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2, without tags, and with limits."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ComposerError(None, None, f"nested more than {_MAX_DEPTH} deep", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise ComposerError(None, None, f"the tag {event.tag}: tags are not read", event.start_mark)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        is_alias = isinstance(event, yaml.AliasEvent)
        if is_alias:
            if id(node) not in self._sizes:
                raise ComposerError(None, None, f"the alias {event.anchor} stands within itself", event.start_mark)
        else:
            inner = node.value if isinstance(node, yaml.SequenceNode) else []
            if isinstance(node, yaml.MappingNode):
                inner = [part for pair in node.value for part in pair]
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in inner)  # aliases expanded
        if self._sizes[id(node)] > _MAX_NODES:
            raise ComposerError(None, None, f"holds more than {_MAX_NODES:,} values", event.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConstructorError(None, None, "a key that is no plain word", key.start_mark)
            if key.value in seen:
                first = seen[key.value].start_mark.line + 1
                raise ConstructorError(
                    None, None, f"the key {key.value!r} stands in line {first} and again", key.start_mark
                )
            seen[key.value] = key
        return super().construct_mapping(node, deep)


def _construct_integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    word = node.value
    if len(word) > _MAX_DIGITS:
        raise ConstructorError(None, None, f"a number of {len(word):,} digits", node.start_mark)
    return int(word, 0) if word[:2] in ("0x", "0o") else int(word)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+0123456789."],
    ),
):
    _Loader.add_implicit_resolver(f"{_HEAD}{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first)
_Loader.add_constructor(f"{_HEAD}int", _construct_integer)
