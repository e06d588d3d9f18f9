"""From the rows of a source to a shard: the texts of a row, their ids, and whether they fit."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from unmask.data.prepare.settings import Settings
from unmask.data.prepare.shards import Report, Shard
from unmask.data.prepare.sources import Row
from unmask.data.prompts import encode_prompts
from unmask.data.vocabulary import Vocabulary


class _Bad(Exception):
    """Why a row cannot be used."""


def make_shard(rows: Sequence[Row], vocabulary: Vocabulary, settings: Settings) -> Shard:
    """Tokenises `rows`; `vocabulary` is that of all ids."""
    texts, problems = _read(rows, settings.fields)
    prompts = encode_prompts(vocabulary, [prompt for prompt, _ in texts.values()], settings.separator)
    answers = vocabulary.encode_batch([answer for _, answer in texts.values()])
    fates: Counter[str] = Counter()
    kept: list[tuple[list[int], int]] = []
    for i, prompt, answer in zip(texts, prompts, answers, strict=True):
        if problem := _special_token(prompt + answer, vocabulary):
            problems[i] = problem
            continue
        fate = _fate(len(prompt), len(answer), settings) if all(texts[i]) else "dropped_empty"
        fates[fate] += 1
        if fate in ("kept", "truncated"):
            kept.append(((prompt + answer)[: settings.length], len(prompt)))
    counts = dict(fates) | {"read": len(rows), "kept": len(kept), "bad": len(problems)}
    bad = [{"place": rows[i].place, "problem": problems[i]} for i in sorted(problems)]
    return _pack(kept, Report(counts, bad))


def _read(rows: Sequence[Row], fields: tuple[str, str]) -> tuple[dict[int, tuple[str, str]], dict[int, str]]:
    """By their place in `rows`: the texts of those that have them, what is wrong with the others."""
    texts, problems = {}, {}
    for i, row in enumerate(rows):
        try:
            texts[i] = _texts(row, fields)
        except _Bad as problem:
            problems[i] = str(problem)
    return texts, problems


def _texts(row: Row, fields: tuple[str, str]) -> tuple[str, str]:
    """Prompt and answer of `row`, without the space around them."""
    try:
        content = row.fields
    except ValueError as error:
        raise _Bad(str(error)) from error
    prompt, answer = (_text(content, field) for field in fields)
    return prompt, answer


def _text(content: dict[str, Any], field: str) -> str:
    if field not in content:
        raise _Bad(
            f"has no field {field!r}, but {', '.join(content) or 'none'} (name it: --prompt-field, --answer-field)"
        )
    value = content[field]
    if not isinstance(value, str):
        raise _Bad(f"field {field!r} is {str(value)[:40]}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Bad(f"field {field!r} is no text: {error}") from error
    return value.strip()


def _special_token(ids: list[int], vocabulary: Vocabulary) -> str | None:
    """What is wrong with a row in which the mask or the end stands as text."""
    for name, option, token in (("mask", "--mask-token", vocabulary.mask_id), ("end", "--eos", vocabulary.eos_id)):
        if token in ids:
            return f"holds the {name} token {vocabulary.name(token)!r} (choose another: {option})"
    return None


def _fate(num_prompt: int, num_answer: int, settings: Settings) -> str:
    if num_prompt >= settings.length:
        return "dropped_no_room"
    if num_prompt + num_answer < settings.length:  # an end token fits as well
        return "kept"
    return "truncated" if settings.too_long == "truncate" else "dropped_too_long"


def _pack(kept: list[tuple[list[int], int]], report: Report) -> Shard:
    num_tokens = np.array([len(ids) for ids, _ in kept], np.int64)
    ids = np.fromiter(chain.from_iterable(ids for ids, _ in kept), np.uint32, int(num_tokens.sum()))
    return Shard(ids, num_tokens, np.array([num_prompt for _, num_prompt in kept], np.int64), report)
