"""Tokenises rows of prompt and answer as a shard."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np

from unmask.data.infill import encode_prompts
from unmask.data.prepare.documents import find_special_token, read_texts
from unmask.data.prepare.settings import PrepareSettings
from unmask.data.prepare.sources import Row
from unmask.data.prepare.writing import Report, Shard
from unmask.data.vocabulary import Vocabulary


def make_shard(rows: Sequence[Row], vocabulary: Vocabulary, settings: PrepareSettings) -> Shard:
    """Tokenises `rows`; `vocabulary` is that of all ids."""
    found, problems = read_texts(rows, settings.fields)
    texts = {i: [text.strip() for text in pair] for i, pair in found.items()}
    prompts = encode_prompts(vocabulary, [prompt for prompt, _ in texts.values()], settings.separator)
    answers = vocabulary.encode_batch([answer for _, answer in texts.values()])
    fates: Counter[str] = Counter()
    kept: list[tuple[list[int], int]] = []
    for i, prompt, answer in zip(texts, prompts, answers, strict=True):
        if problem := find_special_token(prompt + answer, vocabulary):
            problems[i] = problem
            continue
        fate = _fate(len(prompt), len(answer), settings) if all(texts[i]) else "dropped_empty"
        fates[fate] += 1
        if fate in ("kept", "truncated"):
            kept.append(((prompt + answer)[: settings.length], len(prompt)))
    counts = dict(fates) | {"read": len(rows), "kept": len(kept), "bad": len(problems)}
    bad = [{"place": rows[i].place, "problem": problems[i]} for i in sorted(problems)]
    return _join(kept, Report(counts, bad))


def _fate(num_prompt: int, num_answer: int, settings: PrepareSettings) -> str:
    if num_prompt >= settings.length:
        return "dropped_no_room"
    if num_prompt + num_answer < settings.length:  # an end token fits as well
        return "kept"
    return "truncated" if settings.too_long == "truncate" else "dropped_too_long"


def _join(kept: list[tuple[list[int], int]], report: Report) -> Shard:
    num_tokens = np.array([len(ids) for ids, _ in kept], np.int64)
    ids = np.fromiter(chain.from_iterable(ids for ids, _ in kept), np.uint32, int(num_tokens.sum()))
    return Shard(ids, num_tokens, np.array([num_prompt for _, num_prompt in kept], np.int64), report)
