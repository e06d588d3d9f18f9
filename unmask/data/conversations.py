"""Conversations: read from the fields of a row in any of the usual forms, and encoded as tokens by a chat template.

Forms: `messages`, a list of `role` and `content`; ShareGPT's `conversations`, a list of `from` and `value`; `prompt`
and `completion`, texts or lists of messages; Alpaca's `instruction`, `input` and `output`. All become messages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from unmask.data.chat_template import ChatTemplate, Message
from unmask.data.vocabulary import Vocabulary
from unmask.formats import printable

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "model", "bot"), "assistant"),
    "observation": "tool",
}
_MOST_MESSAGES = 1000


@dataclass(frozen=True)
class FieldNames:
    """The fields of a row that hold its conversation; None: whichever form it has."""

    messages: str | None = None
    prompt: str | None = None
    answer: str | None = None


def read_conversation(
    fields: dict[str, Any], names: FieldNames | None = None, *, to_answer: bool = False
) -> list[Message]:
    """Reads the messages of a row, by the names of its fields.

    Args:
        names: the fields, if they are not the usual ones.
        to_answer: the last message may be the user's, as in a prompt.

    Raises:
        ValueError: it holds no conversation, or one with nothing to learn; the message says why.
    """
    messages = _read(fields, names or FieldNames())
    if isinstance(system := fields.get("system"), str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if len(messages) > _MOST_MESSAGES:
        raise ValueError(f"has {len(messages)} messages, more than {_MOST_MESSAGES}")
    if not to_answer and all(message["role"] != "assistant" for message in messages):
        raise ValueError("has no message of the role 'assistant', so nothing to learn")
    return messages


def _read(fields: dict[str, Any], names: FieldNames) -> list[Message]:
    if names.messages is not None:
        return _read_list(_get(fields, names.messages), names.messages)
    if names.prompt is not None or names.answer is not None:
        return _read_pair(fields, names.prompt or "prompt", names.answer or "completion")
    for form, read in _FORMS.items():
        if all(fields.get(key) is not None for key in form):
            return read(fields)
    forms = ", ".join(" and ".join(f"`{key}`" for key in form) for form in _FORMS)
    raise ValueError(
        f"has none of the fields {forms}, but {', '.join(map(_shown, fields)) or 'none'} (name them: --messages-field, "
        "or --prompt-field and --answer-field)"
    )


def _get(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise ValueError(f"has no field {name!r}, but {', '.join(map(_shown, fields)) or 'none'}")
    return fields[name]


def _read_pair(fields: dict[str, Any], prompt: str, answer: str) -> list[Message]:
    asked, said = _get(fields, prompt), _get(fields, answer)
    return [*_read_side(asked, prompt, "user"), *_read_side(said, answer, "assistant")]


def _read_side(value: Any, name: str, role: str) -> list[Message]:
    return _read_list(value, name) if isinstance(value, list) else [_message(role, value, f"field {name!r}")]


def _read_alpaca(fields: dict[str, Any]) -> list[Message]:
    """Reads an instruction and, on a line after it, its input."""
    if fields.get("history"):
        raise ValueError("has a `history`, which is not read; write the conversation as `messages`")
    user = _message("user", fields["instruction"], "field 'instruction'")
    if fields.get("input"):
        user["content"] += "\n" + _message("user", fields["input"], "field 'input'")["content"]
    return [user, _message("assistant", fields["output"], "field 'output'")]


def _read_list(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {name!r} is {_shown(value)}, not a list of messages")
    return [_read_message(each, f"message {number}") for number, each in enumerate(value, 1)]


def _read_message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {_shown(value)}, not an object with `role` and `content`")
    if value.get("tool_calls"):
        raise ValueError(f"{place} calls tools, which no text stands for; write the call into its `content`")
    role, content = next((pair for pair in _KEYS if value.get(pair[0]) is not None), _KEYS[0])
    if value.get(role) is None:
        raise ValueError(f"{place} has no `role`, but {', '.join(map(_shown, value)) or 'nothing'}")
    known = _SHAREGPT if role == "from" else dict.fromkeys(ROLES, "")
    given = value[role]
    if not isinstance(given, str) or given not in known:
        raise ValueError(f"{place} has the {role} {_shown(given)}; known: {', '.join(known)}")
    return _message(known[given] or given, value.get(content), f"{place}: `{content}`")


_KEYS = (("role", "content"), ("from", "value"))


def _message(role: str, content: Any, place: str) -> Message:
    if not isinstance(content, str):
        raise ValueError(f"{place} is {_shown(content)}, not text")
    if not content.strip():
        raise ValueError(f"{place} is empty")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} is no text: {error}") from error
    return {"role": role, "content": content}


def _shown(value: Any) -> str:
    return printable(repr(value)[:60])


_FORMS: dict[tuple[str, ...], Callable[[dict[str, Any]], list[Message]]] = {
    ("messages",): lambda fields: _read_list(fields["messages"], "messages"),
    ("conversations",): lambda fields: _read_list(fields["conversations"], "conversations"),
    ("prompt", "completion"): lambda fields: _read_pair(fields, "prompt", "completion"),
    ("instruction", "output"): _read_alpaca,
}


# --- tokens ----------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A stretch of a conversation's text: given, or said by the assistant and to be learned."""

    text: str
    is_learned: bool


@dataclass(frozen=True)
class EncodedConversation:
    """The tokens of a conversation up to the end of the last turn that is learned.

    Attributes:
        ids: the model's ids.
        turns: for each learned turn its first token, and the one after its last.
    """

    ids: list[int]
    turns: list[tuple[int, int]]


class ConversationEncoder:
    """Encodes conversations as a chat template writes them.

    The text before an answer, the answer, and what follows are encoded apart, so that a prompt has the same tokens in
    training and when it is asked.
    """

    def __init__(self, vocabulary: Vocabulary, template: ChatTemplate) -> None:
        self.vocabulary, self.template = vocabulary, template

    @cached_property
    def special(self) -> dict[str, int]:
        """The special tokens' names and, for those that the vocabulary has, ids of the tokenizer."""
        tokenizer = self.vocabulary.tokenizer
        added = tokenizer.get_added_tokens_decoder()
        own = [self.vocabulary.original_ids[i] for i in (self.vocabulary.eos_id, self.vocabulary.mask_id)]
        return {token.content: i for i, token in added.items() if token.special or i in own}

    @cached_property
    def end_ids(self) -> set[int]:
        """The model's ids of the tokens that end a turn: the end token, and the one that the template puts there."""
        ends = {self.vocabulary.eos_id}
        try:
            pieces = self.pieces([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except ValueError:
            return ends
        said = next(piece.text for piece in pieces if piece.is_learned)
        name = next((name for name in self.special if said.endswith(name)), None)
        return ends | ({self.vocabulary.encode_with_ends([name])[0][0]} if name else set())

    def check(self, messages: Sequence[Message]) -> None:
        """Raises `ValueError` if a special token stands in a message by name, where it would end or begin a turn."""
        for number, message in enumerate(messages, 1):
            for name in self.special:
                if name in message["content"]:
                    raise ValueError(f"message {number} holds the special token {name!r} as text; leave it out")

    def encode(self, messages: Sequence[Message]) -> EncodedConversation:
        """Encodes a conversation, of which every answer is learned, or the last alone (`ChatTemplate.turns`).

        Raises:
            ValueError: the template refuses it, or what is to be learned cannot be told; the message says why.
        """
        self.check(messages)
        pieces = self.pieces(messages)
        ids: list[int] = []
        turns = []
        for piece, own in zip(pieces, self._encode_parts([piece.text for piece in pieces]), strict=True):
            if piece.is_learned and own:
                turns.append((len(ids), len(ids) + len(own)))
            ids += own
        return EncodedConversation(ids, turns)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Encodes messages and the header of the answer to them.

        Raises:
            ValueError: the template refuses them.
        """
        self.check(messages)
        text = self.template.render(messages, asks=True).text
        said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        texts: list[str] = []
        if said and self.template.turns == "all":  # cut as in training: before and after every answer
            texts = [piece.text for piece in self.pieces(messages[: said[-1] + 1])]
        given = "".join(texts)
        if not text.startswith(given):
            raise ValueError(_NOT_A_PREFIX.format(said[-1] + 1, "ends with", *_difference(given, text)))
        texts.append(text[len(given) :])
        return [i for ids in self._encode_parts(texts) for i in ids]

    def _encode_parts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes the parts of one text, each apart.

        Some tokenizers put a space before a text, and after every special token. Where neither is before a part, it is
        encoded after a line end, whose tokens are then taken away.
        """
        encode, specials = self.vocabulary.encode_with_ends, tuple(self.special)
        found = encode(texts)
        line_end, with_letter, letter = encode(["\n", "\na", "a"])
        if with_letter == line_end + letter:
            return found
        inner = [i for i in range(1, len(texts)) if not texts[i - 1].endswith(specials)]
        for i, ids in zip(inner, encode(["\n" + texts[i] for i in inner]), strict=True):
            if ids[: len(line_end)] == line_end:
                found[i] = ids[len(line_end) :]
        return found

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """Cuts the text of a conversation at the turns that are learned; what follows the last one is left out.

        Turns are where the template marks them by `{% generation %}`; without marks, from the end of the header that it
        writes when it is asked for an answer to the end of the answer.

        Raises:
            ValueError: the template refuses it, or an answer is not the continuation of what it is asked with.
        """
        find = self._find_marked if self.template.has_marks else self._find_by_prefix
        text, turns = find(messages)
        pieces, at = [], 0
        for start, end in turns:
            pieces += [Piece(text[at:start], False), Piece(text[start:end], True)]
            at = end
        return [piece for piece in pieces if piece.text]

    def _find_marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        text, marks = self.template.render(messages)
        turns = [(start, start + len(self._turn(text[start:end]))) for start, end in marks if start < end]
        if not turns:
            raise ValueError("the chat template marks nothing of it by {% generation %}")
        return text, turns[-1:] if self.template.turns == "last" else turns

    def _find_by_prefix(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        whole = self.template.render(messages[: said[-1] + 1]).text
        turns = []
        for number in said[-1:] if self.template.turns == "last" else said:
            asked = self.template.render(messages[:number], asks=True).text
            told = whole if number == said[-1] else self.template.render(messages[: number + 1]).text
            if not told.startswith(asked):
                raise ValueError(_NOT_A_PREFIX.format(number + 1, "is asked with", *_difference(asked, told)))
            end = len(asked) + len(self._turn(told[len(asked) :]))
            if not whole.startswith(told[:end]):
                raise ValueError(_NOT_A_PREFIX.format(number + 1, "ends with", *_difference(told[:end], whole)))
            turns.append((len(asked), end))
        return whole, turns

    def _turn(self, text: str) -> str:
        """Returns what is said without the space that the template puts after its last special token."""
        bare = text.rstrip()
        return bare if bare.endswith(tuple(self.special)) else text


_NOT_A_PREFIX = (
    "message {}: the text that it {} is not how the whole conversation begins: {} in place of {}. This chat template "
    "writes a turn otherwise once others follow; learn the last turn alone (--turns last), give options for the "
    "template, or one with {{% generation %}} marks (--template)"
)


def _difference(expected: str, found: str) -> tuple[str, str]:
    """Shows the place from which the two differ."""
    first = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if len(set(pair)) > 1), None)
    first = min(len(expected), len(found)) if first is None else first
    start = max(0, first - 20)
    return repr(found[start : first + 30]), repr(expected[start : first + 30])
