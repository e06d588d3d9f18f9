"""Reads and writes text, JSON and YAML that anybody may have made: bounded, typed, and with errors that name the place.

YAML is read by the rules of YAML 1.2's core schema: `010` is ten, `1e3` a thousand; `yes`, `12:30` and `2001-01-01` are
text. Tags and repeated keys are errors.
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
_MAX_YAML_BYTES = 2**18
_MAX_NODES = 10_000
_MAX_DIGITS = 400
_STEERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_HEAD = "tag:yaml.org,2002:"


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """Reads a regular file of UTF-8 text; a byte order mark at its start is dropped.

    Raises:
        UserError: it cannot be read, is no regular file, too long, or not UTF-8; names the line.
    """
    return decode(read_bytes(path, max_bytes=max_bytes), str(path))


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Reads a regular file.

    Raises:
        UserError: it cannot be read, is no regular file, or too long.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # before it is opened: opening a fifo waits for its writer
            raise UserError(f"{path}: is no regular file")
        with path.open("rb") as file:  # not more than there is: a read sets aside all that it may return
            content = file.read(min(max_bytes, about.st_size + 2**20) + 1)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{path}: cannot be read: {error}") from error
    if len(content) > max_bytes:
        raise UserError(f"{path}: has more than {max_bytes:,} bytes, too many for what it should be")
    return content


def decode(content: bytes, where: str, *, first_line: int = 1) -> str:
    """Decodes UTF-8 bytes, which begin in line `first_line`; drops a byte order mark at their start.

    Raises:
        UserError: they are not UTF-8; names the line and the first wrong byte.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise UserError(
            f"{where}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; convert the file to UTF-8"
        ) from error


def read_json(path: Path, kind: Any = Any, *, max_bytes: int = MAX_BYTES, infinity_as_null: bool = False) -> Any:
    """Reads a JSON file whose value is of type `kind` (a type, dataclass or model that pydantic can validate strictly).

    Args:
        path: the file.
        kind: default: any value.
        max_bytes: the most that it may have.
        infinity_as_null: as in `parse_json`.

    Raises:
        UserError: it cannot be read, is not JSON, or a field is of another type or out of range; names the field.
    """
    text = read_text(path, max_bytes=max_bytes)
    return checked(parse_json(text, str(path), infinity_as_null=infinity_as_null), kind, str(path))


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


def parse_json(text: str | bytes, where: str, *, infinity_as_null: bool = False) -> Any:
    """Parses JSON; `NaN` and `Infinity`, which are no JSON, are errors, or null where older files have them.

    Raises:
        UserError: it is not JSON, is nested too deeply, or holds half of a character, which no text can.
    """
    try:
        constant = _null if infinity_as_null else _refuse_constant
        value = json.loads(text, parse_constant=constant, parse_int=_integer, parse_float=_float)
        if _ESCAPED_HALF.search(text if isinstance(text, str) else text.decode(errors="replace")):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UserError(
            f"{where}: is not JSON: {half} is half of a character; write both halves, or neither"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{where}: is not JSON: {error}") from error


def _null(word: str) -> None:
    return None


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):  # as of 1e999
        raise ValueError(f"{digits[:40]} is beyond the largest number")
    return value


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


def read_yaml(path: Path, *, is_saved: bool = False) -> Any:
    """Reads a YAML file, by `parse_yaml`.

    Raises:
        UserError: it cannot be read, or `parse_yaml` refuses it.
    """
    return parse_yaml(read_text(path, max_bytes=_MAX_YAML_BYTES), str(path), is_saved=is_saved)


def parse_yaml(text: str, where: str, *, is_saved: bool = False) -> Any:
    """Parses one YAML document by the core schema of YAML 1.2; also read are `1_000` and merge keys (`<<`).

    Args:
        where: the name of the document, for errors.
        is_saved: it was written by `to_yaml`, or by PyYAML, which leaves text such as `1e3` unquoted.

    Raises:
        UserError: it is not YAML, repeats a key, has a tag, or is larger than any configuration; names the line.
    """
    loader = None
    try:
        loader = (_SavedLoader if is_saved else _Loader)(text)  # finds characters that no YAML may hold
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f", line {mark.line + 1}"
        problem = ", ".join(filter(None, (error.context, error.problem)))
        is_composed = isinstance(error, ComposerError | ConstructorError)  # it is YAML then, but none that is read here
        raise UserError(f"{where}{place}: {problem if is_composed else f'not valid YAML: {problem}'}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML does not check numbers in escapes and heads
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{where}: is nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()


def to_yaml(value: Any) -> str:
    """Formats `value` as YAML, which `parse_yaml` and readers of YAML 1.1 read as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def to_yaml_line(value: Any) -> str:
    """Formats `value` as a user would type it: `null`, `true`, `[1, 4]`, `{name: puma}`, `"one\\ntwo"`."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=math.inf, allow_unicode=True
    )
    return text.removesuffix("...\n").strip()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2, without tags, and with limits."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0
        self._extent: dict[int, tuple[int, int]] = {}  # of each whole node, aliases expanded: values, levels

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        self._count += 1
        if self._depth > _MAX_DEPTH:
            raise _problem(f"nested more than {_MAX_DEPTH} deep", event)
        if getattr(event, "tag", None) is not None:
            raise _problem(f"the tag {_short(event.tag)}: tags are not read; leave it out", event)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._extent:
                raise _problem(f"the alias {_short(f'*{event.anchor}')} stands within itself", event)
        elif isinstance(node, yaml.ScalarNode):
            self._extent[id(node)] = (1, 1)
        else:
            pairs = node.value if isinstance(node, yaml.MappingNode) else [node.value]
            inner = [self._extent[id(part)] for pair in pairs for part in pair]
            values, levels = sum(one for one, _ in inner), max((one for _, one in inner), default=0)
            self._extent[id(node)] = (1 + values, 1 + levels)
        values, levels = self._extent[id(node)]
        if max(values, self._count) > _MAX_NODES:
            raise _problem(f"holds more than {_MAX_NODES:,} values", event)
        if self._depth + levels > _MAX_DEPTH:
            raise _problem(f"nested more than {_MAX_DEPTH} deep, with its aliases", event)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[Any, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("a key that is no plain word", key)
            other = first.setdefault((key.tag, key.value), key)
            if other is not key:
                line = other.start_mark.line + 1
                raise _problem(f"the key {_short(key.value)} stands already in line {line}; give it once", key)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        if any("\ud800" <= sign <= "\udfff" for sign in node.value):
            raise _problem("half of a surrogate pair, which is no character", node)
        return node


class _SavedLoader(_Loader):
    """A loader of what PyYAML wrote: its unquoted text is text."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0] and _YAML_1_1.resolve(kind, value, implicit) == f"{_HEAD}str":
            return f"{_HEAD}str"
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes text that YAML 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_YAML_1_1: Any = yaml.resolver.Resolver()  # as PyYAML has it


def _problem(message: str, at: Any) -> ComposerError:
    return ComposerError(None, None, message, at.start_mark)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}..")


def _construct_integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    word = node.value
    if len(word) > _MAX_DIGITS:
        raise _problem(f"a number of {len(word):,} digits", node)
    return int(word, 0) if word[:2] in ("0x", "0o") else int(word)


_DIGITS = "[0-9]+(?:_[0-9]+)*"

for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    (
        "float",
        rf"[-+]?(\.{_DIGITS}|{_DIGITS}(\.({_DIGITS})?)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+0123456789."],
    ),
    ("merge", r"<<", ["<"]),
):
    for _one in (_Loader, _Dumper):
        _one.add_implicit_resolver(f"{_HEAD}{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first)
_Loader.add_constructor(f"{_HEAD}int", _construct_integer)
