"""Checks that a tokenizer gives texts back: what it loses, no model that is trained on its ids can write.

Not all texts are decoded again, which would take half as long as the preparation itself. Of n rows that follow k
others 512 n / (k + n) are drawn at random, and so some 512 log N of N. Wherever those lie of which a tokenizer loses
something, one of them is drawn with a probability of at least 1 - exp(-5.12 s), where they are s per cent of all:
99.4 % at one row in a hundred.
"""

import random
import unicodedata
from collections import Counter
from collections.abc import Sequence

from unmask.data.prepare.settings import PrepareSettings
from unmask.data.vocabulary import BYTES, Vocabulary
from unmask.errors import UserError

_SAMPLE = 512
_LEAST = 16  # rows of a batch
_FEW = 0.1  # share of a sample in which single characters may be lost


class LossyTokenizer(UserError):
    """A tokenizer does not give back what it encoded."""


def choose_rows(count: int, before: int, settings: PrepareSettings) -> set[int]:
    """Chooses those of `count` texts, which follow `before` others, that are decoded again; always the same ones.

    None are with `lossy`, or with the tokenizer of bytes, which loses nothing.
    """
    if settings.lossy or settings.tokenizer == BYTES:
        return set()
    number = max(_LEAST, -(-_SAMPLE * count // max(1, before + count)))
    return set(random.Random(before).sample(range(count), min(number, count)))


def check_round_trip(
    sample: Sequence[tuple[str, Sequence[int]]], vocabulary: Vocabulary, tokenizer: str, *, is_exact: bool
) -> None:
    """Decodes the tokens of texts again, and compares.

    Programs must come back as they were (`is_exact`), but for the Unicode form of characters (NFC) and the kind of line
    ends. Prose may lose capital letters, accents and spaces, as some tokenizers mean to, but neither line ends nor
    characters. Few texts may hold characters that the tokenizer does not know.

    Raises:
        LossyTokenizer: what is lost, an example, and what to use.
    """
    lost: Counter[str] = Counter()
    example = ""
    for text, ids in sample:
        found = vocabulary.decode(ids)
        what = _loss(text, found, is_exact=is_exact)
        if what is None:
            continue
        is_single = what == _CHARACTERS and (vocabulary.unknown_id in ids or _folds_to_same(text, found))
        if not example or (not is_single and not lost.keys() - {""}):
            example = _difference(text, found, what)
        lost["" if is_single else what] += 1
    few = _FEW * len(sample) if is_exact else len(sample)
    if lost.keys() - {""} or lost[""] > max(1, few):
        what = ", ".join(key for key in lost if key) or "characters that it does not know"
        raise LossyTokenizer(
            f"--tokenizer {tokenizer}: does not give back {what}: {example}. No model can write what its tokens do not "
            "hold; use one of bytes, such as gpt2 or Qwen/Qwen2-0.5B, or --tokenizer bytes; or take it with --lossy"
        )


_CHARACTERS, _LINE_ENDS = "some characters", "line ends"


def _loss(text: str, found: str, *, is_exact: bool) -> str | None:
    """Returns what `found`, decoded from the tokens of `text`, lacks of it in words; None if nothing."""
    text, found = (unicodedata.normalize("NFC", each.replace("\r\n", "\n").rstrip()) for each in (text, found))
    if not is_exact:  # a space before a program's first word is an error of its indentation
        text, found = text.lstrip(), found.lstrip()
    if text == found:
        return None
    if text.count("\n") != found.count("\n"):
        return _LINE_ENDS
    if is_exact and _bare(text) == _bare(found):
        lines = zip(text.split("\n"), found.split("\n"), strict=True)
        is_indented = all(_indent(one) == _indent(other) for one, other in lines)
        return "spaces" if is_indented else "indentation"
    if is_exact:
        return "capital letters" if _bare(text).casefold() == _bare(found).casefold() else _CHARACTERS
    missing = Counter(_folded(text)) - Counter(_folded(found))
    # A decoder may join words ("do not", "don't"), which is not what is looked for here.
    return _CHARACTERS if missing.total() > 0.02 * len(text) + 2 else None


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _bare(text: str) -> str:
    return "".join(text.split())


def _folded(text: str) -> str:
    """Returns `text` without spaces, accents, capital letters and special forms of characters."""
    forms = unicodedata.normalize("NFKD", text).casefold()
    return "".join(each for each in _bare(forms) if not unicodedata.combining(each))


def _folds_to_same(text: str, found: str) -> bool:
    return unicodedata.normalize("NFKC", text) == unicodedata.normalize("NFKC", found)


def _difference(text: str, found: str, what: str) -> str:
    """Shows where the two differ."""
    if what == _LINE_ENDS:
        first = text.find("\n")
        return f"as in {text[max(0, first - 20) : first + 20]!r}"
    first = next((i for i, pair in enumerate(zip(text, found, strict=False)) if len(set(pair)) > 1), 0)
    start = max(0, first - 10)
    return f"{text[start : first + 20]!r} comes back as {found[start : first + 20]!r}"
