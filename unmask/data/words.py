r"""A faster encoder of ASCII text for the byte-level BPE tokenizers of GPT-2, Llama 3 and Qwen.

These cut a text into words with a regular expression, then merge the bytes of each word. The cut costs most of the
time, and most words come again and again. For ASCII text Python's own `re` makes the same cut, many times faster, and
the ids of a word are cached. All else, which might differ, is left to the tokenizer: other tokenizers, text that is not
ASCII, text with an added token in it.
"""

import json
import re
from itertools import chain
from typing import Any

from tokenizers import Tokenizer, models

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = (_GPT2, _CL100K % "", _CL100K % "{1,3}")
"""The cuts of GPT-2, of Qwen 2 and later, and of Llama 3, as their `tokenizer.json` has them."""

_MOST_WORDS = 2**18


def ascii_pattern(pattern: str) -> re.Pattern[str]:
    """Translates one of `PATTERNS` for Python's `re`, without `\\p{L}` and `\\p{N}`; it cuts ASCII text the same."""
    in_brackets = re.sub(
        r"\[[^\]]*\]", lambda found: found[0].replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9"), pattern
    )
    return re.compile(in_brackets.replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]"), re.ASCII)


def byte_symbols() -> list[str]:
    """Returns the character that stands for each of the 256 bytes in the tokens of a byte-level tokenizer.

    Printable Latin-1 characters stand for themselves, the other bytes for characters from 256 on (GPT-2's encoder.py).
    """
    is_printable = [33 <= byte <= 126 or (byte >= 161 and byte != 173) for byte in range(256)]
    others = iter(range(256, 512))
    return [chr(byte if printable else next(others)) for byte, printable in enumerate(is_printable)]


class WordEncoder:
    """An encoder that caches the ids of words."""

    def __init__(self, tokenizer: Tokenizer, pattern: str) -> None:
        self._model = tokenizer.model
        self._cut = ascii_pattern(pattern).findall
        self._symbols = dict(enumerate(byte_symbols()))
        added = (token.content for token in tokenizer.get_added_tokens_decoder().values())
        self._has_added = re.compile("|".join(map(re.escape, added)) or r"(?!)").search
        self._ids: dict[str, list[int]] = {}

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer) -> "WordEncoder | None":
        """Makes the encoder of `tokenizer`; None where it is not known to give the same ids."""
        pattern = _find_pattern(tokenizer)
        return None if pattern is None else cls(tokenizer, pattern)

    def encode(self, text: str) -> list[int] | None:
        """Encodes `text`; None if only the tokenizer can."""
        if not text.isascii() or self._has_added(text):
            return None
        words = self._cut(text)
        try:
            return list(chain.from_iterable(map(self._ids.__getitem__, words)))
        except KeyError:
            self._learn(words)
        return list(chain.from_iterable(map(self._ids.__getitem__, words)))

    def _learn(self, words: list[str]) -> None:
        if len(self._ids) > _MOST_WORDS:
            self._ids.clear()
        for word in {word for word in words if word not in self._ids}:  # `set - keys` goes through all the keys
            self._ids[word] = [token.id for token in self._model.tokenize(word.translate(self._symbols))]


def _find_pattern(tokenizer: Tokenizer) -> str | None:
    model = tokenizer.model
    if not isinstance(model, models.BPE) or model.dropout or _state(tokenizer.normalizer) not in ({}, {"type": "NFC"}):
        return None
    steps = _state(tokenizer.pre_tokenizer)
    *before, last = steps.get("pretokenizers", [steps])
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not before:
        return _GPT2 if last["use_regex"] else None
    if last["use_regex"] or len(before) > 1 or before[0]["type"] != "Split":
        return None
    split = before[0]
    pattern = split["pattern"].get("Regex")
    return pattern if pattern in PATTERNS and split["behavior"] == "Isolated" and not split["invert"] else None


def _state(part: Any) -> dict[str, Any]:
    return {} if part is None else json.loads(part.__getstate__())
