"""Chat templates: the Jinja that comes with a tokenizer and turns a conversation into text.

A template may come from anybody, so it runs in Jinja's sandbox, as strict as that of transformers: it sees messages,
the names of special tokens and its options, all of them plain values, and can change and import nothing. The clock is
not among them: a template that writes today's date, if it can, writes the date that it falls back to.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from unmask import files, formats
from unmask.errors import UserError, first_line
from unmask.formats import printable

CHAT = "chat.json"
"""Name of the file that keeps a template beside its vocabulary."""
PLAIN = "plain"
"""Name of the template `PLAIN_SOURCE`."""
PLAIN_SOURCE = """\
{%- for message in messages %}
{{- message.role + ':\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content + eos_token }}{% endgeneration %}
{%- else %}
{{- message.content + eos_token }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant:\\n' }}{% endif %}"""
"""A template for every tokenizer: a line with the role and a colon, the text, the end token, a line end."""
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MOST_CHARACTERS = 2**26

Turns = Literal["all", "last"]
Message = dict[str, str]
"""`role` and `content`."""


class Rendered(NamedTuple):
    """A conversation as text, and where (start, end) it was marked by `{% generation %}`."""

    text: str
    marks: list[tuple[int, int]]


@dataclass(frozen=True)
class ChatTemplate:
    """A template, with all that it is rendered with beside the messages.

    Attributes:
        source: the Jinja.
        tokens: texts of special tokens by name, such as `bos_token`.
        options: further variables, such as `enable_thinking`.
        turns: the assistant's turns that are learned in what it writes: `all`, or the `last` alone.

    Raises:
        UserError: it is no template.
    """

    source: str
    tokens: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    turns: Turns = "all"

    def __post_init__(self) -> None:
        _compile(self.source)

    @property
    def has_marks(self) -> bool:
        """True if it marks what the assistant says by `{% generation %}`."""
        return _MARK.search(self.source) is not None

    def render(self, messages: Sequence[Message], *, asks: bool = False) -> Rendered:
        """Writes a conversation; `asks` adds the header of the assistant's next turn (`add_generation_prompt`).

        Raises:
            ValueError: the template refuses these messages, or fails at them; the message says why.
        """
        parts: list[str] = []
        marks: list[tuple[int, int]] = []
        size = 0
        variables = self.tokens | self.options | {"tools": None, "documents": None}
        compiled = _compile(self.source)
        _Marks.of(compiled.environment).start(parts, marks)
        try:
            for part in compiled.generate(
                variables | {"messages": [dict(message) for message in messages], "add_generation_prompt": asks}
            ):
                parts.append(part)
                if (size := size + len(part)) > _MOST_CHARACTERS:
                    raise ValueError(f"it writes more than {_MOST_CHARACTERS:,} characters")
        except Exception as error:  # a template is code: it may raise anything
            raise ValueError(f"the chat template refuses it: {_first_line(error)}") from error
        return Rendered("".join(parts), marks)

    def save(self, folder: Path) -> None:
        """Writes `chat.json` into `folder`."""
        files.write(folder / CHAT, json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(folder: Path) -> "ChatTemplate":
        """Loads the file that `save` wrote into `folder`.

        Raises:
            UserError: it is missing or damaged.
        """
        saved = formats.read_json(folder / CHAT, _Saved)
        return ChatTemplate(**vars(saved))


@dataclass(frozen=True)
class _Saved:
    """The content of `chat.json`."""

    source: str
    tokens: dict[str, str]
    options: dict[str, Any]
    turns: Turns


def _first_line(error: Exception) -> str:
    return printable(first_line(error)[:200])


# --- the sandbox -----------------------------------------------------------------------------------------------------


class _Marks(Extension):
    """The tag `{% generation %}`, as transformers has it: what stands in it is what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it
    _parts: list[str]
    _marks: list[tuple[int, int]]

    @staticmethod
    def of(environment: Any) -> "_Marks":
        """Returns the extension of `environment`."""
        return environment.extensions[_Marks.identifier]

    def start(self, parts: list[str], marks: list[tuple[int, int]]) -> None:
        """Writes marks to `marks` from now on; `parts` are the pieces of text that are already rendered."""
        self._parts, self._marks = parts, marks

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        start = sum(map(len, self._parts))
        self._marks.append((start, start + len(text)))
        return text


class _Dict:
    """`dict` without its attributes."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)


class _Namespace(Namespace):
    """Jinja's namespace, without attributes that begin with an underscore."""

    def __init__(*arguments: Any, **named: Any) -> None:
        self, *rest = arguments  # so that a template may set an attribute `self`
        Namespace.__init__(self)
        for name, value in dict(*rest, **named).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}")
        Namespace.__setitem__(self, name, value)


@lru_cache(maxsize=8)
def _compile(source: str) -> Template:
    try:
        return _environment().from_string(source)
    except (TemplateError, RecursionError) as error:
        raise UserError(f"chat template: is no Jinja: {_first_line(error)}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Marks, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _refuse, "dict": _Dict(), "namespace": _Namespace}
    return made


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **more: Any) -> str:
    """Writes JSON as it is, where Jinja's own filter escapes it for HTML."""
    sort_keys = bool(more.get("sort_keys"))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
