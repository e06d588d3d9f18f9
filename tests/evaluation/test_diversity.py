"""Unigram entropy and distinct-n against hand-computed values and brute force."""

import math
import random

import pytest

from unmask.evaluation.generative import distinct, unigram_entropy

RANDOM = [random.Random(i).choices(range(5), k=3 * i) for i in range(12)]
"""Texts of 0, 3, .. 33 tokens."""


def test_entropy_by_hand() -> None:
    assert unigram_entropy([[7, 7, 7]]) == 0
    assert unigram_entropy([[0, 1, 1, 0]]) == pytest.approx(math.log(2))
    assert unigram_entropy([[3, 1, 4, 5, 9]]) == pytest.approx(math.log(5))
    # 3/4 ln 4/3 + 1/4 ln 4, and a sample without tokens: the mean over samples, not the entropy of all together
    assert unigram_entropy([[0, 0, 0, 1], []]) == pytest.approx((0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / 2)
    assert unigram_entropy([[0], [1]]) == 0
    assert unigram_entropy([]) == 0


def test_entropy_is_its_definition() -> None:
    expected = [-sum(math.log(ids.count(token) / len(ids)) / len(ids) for token in ids) for ids in RANDOM]
    assert unigram_entropy(RANDOM) == pytest.approx(sum(expected) / len(RANDOM))


def test_distinct_by_hand() -> None:
    assert [distinct([[1, 2, 1, 2]], n) for n in (1, 2, 3, 4, 5)] == [2 / 4, 2 / 3, 2 / 2, 1, 0]
    assert distinct([[1, 2], [1, 2]], 2) == 1 / 2
    assert distinct([[1], [2]], 2) == 0  # no n-gram goes from one document into the next
    assert distinct([], 1) == 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_is_its_definition(n: int) -> None:
    grams = [gram for ids in RANDOM for gram in zip(*(ids[i:] for i in range(n)), strict=False)]
    different = [gram for i, gram in enumerate(grams) if gram not in grams[:i]]
    assert distinct(RANDOM, n) == len(different) / len(grams)


def test_what_one_number_does_not_see_the_other_does() -> None:
    """A model that writes one good text again and again has its entropy, but a tenth of its distinct-n."""
    text = list(range(20))
    assert unigram_entropy([text] * 10) == unigram_entropy([text])
    assert distinct([text] * 10, 2) == pytest.approx(distinct([text], 2) / 10)
