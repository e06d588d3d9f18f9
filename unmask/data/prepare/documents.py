"""From the rows of a source to a shard of documents: running text, without prompts."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unmask.data.prepare.settings import Settings
from unmask.data.prepare.shards import Report, Shard
from unmask.data.prepare.sources import Row
from unmask.data.prepare.texts import read_texts, special_token
from unmask.data.vocabulary import Vocabulary

_AT_ONCE = 32
"""Documents of which Python objects are held, token by token."""


def make_shard(rows: Sequence[Row], vocabulary: Vocabulary, settings: Settings) -> Shard:
    """Tokenises `rows`, in the ids of `vocabulary`. Text is taken as it is, with the space around it."""
    texts, problems = read_texts(rows, settings.fields)
    fates: Counter[str] = Counter()
    kept: list[NDArray[np.uint32]] = []
    keys = []
    places = list(texts)
    for start in range(0, len(places), _AT_ONCE):
        some = places[start : start + _AT_ONCE]
        for i, ids in zip(some, vocabulary.encode_batch([texts[i][0] for i in some]), strict=True):
            if problem := special_token(ids, vocabulary):
                problems[i] = problem
                continue
            fate = _fate(ids, vocabulary, settings)
            fates[fate] += 1
            if fate in ("kept", "truncated"):
                kept.append(np.array(ids[: None if settings.rows == "wrap" else settings.length - 1], np.uint32))
                keys.append(_key(texts[i][0], settings.split_seed))
    counts = dict(fates) | {"read": len(rows), "kept": len(kept), "bad": len(problems)}
    return Shard(
        ids=np.concatenate([np.zeros(0, np.uint32), *kept]),
        num_tokens=np.array([len(ids) for ids in kept], np.int64),
        num_prompt=np.zeros(len(kept), np.int64),
        report=Report(counts, [{"place": rows[i].place, "problem": problems[i]} for i in sorted(problems)]),
        keys=np.array(keys, np.uint64),
    )


def _fate(ids: Sequence[int], vocabulary: Vocabulary, settings: Settings) -> str:
    if len(ids) < 2:
        return "dropped_short"
    if all(i == vocabulary.unknown_id for i in ids):
        return "dropped_unknown"
    if settings.rows == "wrap" or len(ids) + 2 <= settings.length:  # an end token before it, and one after it
        return "kept"
    return "truncated" if settings.too_long == "truncate" else "dropped_too_long"


def _key(text: str, seed: int) -> int:
    """The hash by which a document is held out or not, whatever the tokenizer; equal texts share it."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest(), "big")
