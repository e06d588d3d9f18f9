"""Turns prompts with answers into rows of tokens, and packs documents into rows.

Every packed row starts with the end token, which is given: a model that predicts a token from those before it then
has one to start from.

Dimensions: n documents or rows, L tokens of a row.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unmask.data.infill import encode_prompts
from unmask.data.prepare import writing
from unmask.data.prepare.documents import find_special_token, read_texts
from unmask.data.prepare.round_trip import check_round_trip, choose_rows
from unmask.data.prepare.settings import PrepareSettings
from unmask.data.prepare.sources import PART, Row
from unmask.data.prepare.writing import FinishedRows, Report, Shard, model_ids
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError


def make_shard(rows: Sequence[Row], vocabulary: Vocabulary, settings: PrepareSettings, before: int = 0) -> Shard:
    """Tokenises `rows`, which follow `before` others; `vocabulary` is that of all ids."""
    found, problems = read_texts(rows, settings.fields)
    texts = {i: [text.strip() for text in pair] for i, pair in found.items()}
    prompts = encode_prompts(vocabulary, [prompt for prompt, _ in texts.values()], settings.separator)
    answers = vocabulary.encode_batch([answer for _, answer in texts.values()])
    fates: Counter[str] = Counter()
    kept: list[tuple[list[int], int]] = []
    checked: list[tuple[str, list[int]]] = []
    chosen = choose_rows(len(texts), before, settings)
    for number, (i, prompt, answer) in enumerate(zip(texts, prompts, answers, strict=True)):
        if problem := find_special_token(prompt + answer, vocabulary):
            problems[i] = problem
            continue
        if number in chosen:
            checked.append((texts[i][1], answer))
        fate = _fate(len(prompt), len(answer), settings) if all(texts[i]) else "dropped_empty"
        fates[fate] += 1
        if fate in ("kept", "truncated"):
            kept.append(((prompt + answer)[: settings.length], len(prompt)))
    check_round_trip(checked, vocabulary, settings.tokenizer, is_exact=True)
    return _join(kept, Report.of(rows, fates, problems, len(kept)))


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


Labels = NDArray[np.uint32]


class Documents(NamedTuple):
    """The ids of n documents, one after the other, and the number of each."""

    ids: NDArray[np.uint32]
    num_tokens: NDArray[np.int64]


def finish_rows(paths: Sequence[Path], vocabulary: Vocabulary, settings: PrepareSettings) -> Iterator[FinishedRows]:
    """Packs the training documents of the shards at `paths`, then those that are held out.

    Raises:
        UserError: too little text for a part.
    """
    last = _find_last_key(
        np.concatenate([np.zeros(0, np.uint64), *(writing.load_keys(path) for path in paths)]), settings
    )
    table = model_ids(vocabulary)
    for is_held_out in (False, True):
        num_rows = 0
        chosen = (_choose(shard, (shard.keys <= last) == is_held_out, table) for shard in map(writing.load, paths))
        for labels in PACKINGS[settings.rows](chosen, settings.length, vocabulary.eos_id):
            num_rows += len(labels)
            is_first = np.broadcast_to(np.arange(settings.length) == 0, labels.shape)
            yield FinishedRows(labels, is_first, is_held_out)
        if not num_rows:
            raise UserError(
                f"the {'held-out' if is_held_out else 'training'} documents fill no row of {settings.length} tokens (a "
                f"share of {settings.validation_ratio} is held out); give more text, shorter rows, or another share"
            )


def _find_last_key(keys: NDArray[np.uint64], settings: PrepareSettings) -> np.uint64:
    """Finds the last key of held-out documents: `validation_ratio` of them, at least one, but not all."""
    distinct = np.unique(keys)
    if len(distinct) < 2:
        raise UserError(
            f"{len(distinct)} document of at least two tokens: one to train on and one to hold out are needed; give "
            f"more text (a text file is one document up to {PART // 1024} kB)"
        )
    count = round(settings.validation_ratio * len(distinct))
    return distinct[min(max(count, 1), len(distinct) - 1) - 1]


def _choose(shard: Shard, is_chosen: NDArray[np.bool_], table: NDArray[np.uint32]) -> Documents:
    ids = table[shard.ids[np.repeat(is_chosen, shard.num_tokens)]]
    return Documents(ids, shard.num_tokens[is_chosen])


def wrap(parts: Iterable[Documents], length: int, eos_id: int) -> Iterator[Labels]:
    """Cuts documents, an end token after each, into rows without padding; a rest that fills no row is left out."""
    rest = np.zeros(0, np.uint32)
    for part in parts:
        stream = np.concatenate([rest, np.insert(part.ids, np.cumsum(part.num_tokens), eos_id)])
        num_rows = len(stream) // (length - 1)
        rows, rest = np.split(stream, [num_rows * (length - 1)])
        yield np.insert(rows.reshape(num_rows, length - 1), 0, eos_id, axis=1)


def one_per_row(parts: Iterable[Documents], length: int, eos_id: int) -> Iterator[Labels]:
    """Makes a row of each document, padded with end tokens; a long one is cut short, without an end."""
    for part in parts:
        labels = np.full((len(part.num_tokens), length), eos_id, np.uint32)
        position = np.arange(length)
        labels[(position > 0) & (position <= part.num_tokens[:, None])] = part.ids
        yield labels


PACKINGS = {"wrap": wrap, "document": one_per_row}
