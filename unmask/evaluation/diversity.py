"""How varied samples are: what their likelihood under another model cannot see, which repetition makes high."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

Ids = Sequence[int]


def unigram_entropy(samples: Sequence[Ids]) -> float:
    """`-sum_v p(v) log p(v)` in nats, p being the shares of the tokens within one sample; the mean over the samples.

    As for masked diffusion models since Zheng et al. 2024 (2409.02908). A sample without tokens has none.
    """
    return sum(map(_entropy, samples), 0.0) / max(1, len(samples))


def distinct(documents: Iterable[Ids], n: int) -> float:
    """Different n-grams of all documents, over the number of their n-grams (Li et al. 2016, 1510.03055).

    It falls as more text is taken: compare what is of one amount. 0 where no document is as long as n.
    """
    grams = Counter(tuple(ids[i : i + n]) for ids in documents for i in range(len(ids) - n + 1))
    return len(grams) / max(1, grams.total())


def _entropy(ids: Ids) -> float:
    counts = Counter(ids).values()
    return sum((-count / len(ids) * math.log(count / len(ids)) for count in counts), 0.0)
