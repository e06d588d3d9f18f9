"""Prompts as ids, and text with gaps: `<mask:N>` stands for N masked tokens, and the text around it is given.

Preparation and evaluation encode prompts by the same functions, so that a model meets the prompts that it learned.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError

_SPAN = re.compile(r"(<mask(?::[^<>\n]*>?|>))")
_WELL_FORMED = re.compile(r"<mask:0*([1-9][0-9]*)>")


def encode_spans(vocabulary: Vocabulary, text: str, where: str, *, room: int) -> list[int]:
    """Encodes `text`, `<mask:N>` as N masks. The text between two spans is encoded apart.

    Raises:
        UserError: a span is malformed or longer than `room`, or the mask token stands in the text by name.
    """
    ids: list[int] = []
    for number, part in enumerate(_SPAN.split(text)):
        is_span = number % 2 == 1
        ids += (
            [vocabulary.mask_id] * _read_span(part, where, room) if is_span else _encode_given(vocabulary, part, where)
        )
    return ids


def _read_span(span: str, where: str, room: int) -> int:
    found = _WELL_FORMED.fullmatch(span)
    if found is None:
        raise UserError(f"{where}: {span}: write <mask:N>, N tokens to fill in, with N at least 1")
    if len(found[1]) > len(str(room)) or int(found[1]) > room:
        raise UserError(f"{where}: {span[:40]}: longer than the canvas, which has {room} tokens (data.length)")
    return int(found[1])


def _encode_given(vocabulary: Vocabulary, text: str, where: str) -> list[int]:
    ids = vocabulary.encode(text)
    if vocabulary.mask_id in ids:
        name = vocabulary.name(vocabulary.mask_id)
        raise UserError(f"{where} holds the mask token {name}; leave it out, or write <mask:N> for N tokens to fill in")
    return ids


def pad_with_ends(vocabulary: Vocabulary, ids: Sequence[int], where: str, *, length: int) -> list[int]:
    """Makes the canvas of a text with spans: `ids`, and end tokens up to `length`, all of them given.

    Raises:
        UserError: it does not fit, or there is nothing to fill in.
    """
    if vocabulary.mask_id not in ids:
        raise UserError(f"{where}: nothing is to be filled in; write <mask:N> for N tokens to fill in")
    if len(ids) > length:
        raise UserError(f"{where}: {len(ids)} tokens do not fit the canvas, which has {length} (data.length)")
    return [*ids, *[vocabulary.eos_id] * (length - len(ids))]


def is_infilling(vocabulary: Vocabulary, prompt: Sequence[int]) -> bool:
    """True if something is given after a masked token."""
    is_masked = [i == vocabulary.mask_id for i in prompt]
    return is_masked != sorted(is_masked)


def whole_text(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    """Decodes a canvas without the end tokens that pad it, masks as `<mask:N>`."""
    end = len(ids)
    while end and ids[end - 1] == vocabulary.eos_id:
        end -= 1
    runs = groupby(ids[:end], key=lambda i: i == vocabulary.mask_id)
    return "".join(f"<mask:{len(list(run))}>" if is_mask else vocabulary.decode(list(run)) for is_mask, run in runs)


def record_spans(vocabulary: Vocabulary, prompt: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
    """Describes a finished text with spans: the `prompt`, the whole `text`, and the text of each of its `spans`."""
    runs = groupby(zip(prompt, tokens, strict=True), key=lambda pair: pair[0] == vocabulary.mask_id)
    spans = [vocabulary.decode([token for _, token in run]) for is_span, run in runs if is_span]
    return {"prompt": whole_text(vocabulary, prompt), "text": whole_text(vocabulary, tokens), "spans": spans}


def encode_prompts(vocabulary: Vocabulary, texts: Sequence[str], separator: str) -> list[list[int]]:
    """Encodes each text, without the space around it, and the separator after it.

    The two are encoded apart, as PUMA's reference implementation does: `?` and a newline, encoded together, are one
    token to Qwen, and a prompt would end otherwise after a question mark than after a full stop.
    """
    end = vocabulary.encode(separator)
    return [ids + end for ids in vocabulary.encode_batch([text.strip() for text in texts])]


def encode_prompt(vocabulary: Vocabulary, text: str, separator: str) -> list[int]:
    """Encodes one prompt as `encode_prompts` does."""
    return encode_prompts(vocabulary, [text], separator)[0]
