"""A tokenizer that does not give texts back is noticed before anything is trained on it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.helpers.text import byte_level, rows, save_tokenizer, settings, write_lines
from unmask.data.prepare import PrepareSettings, prepare
from unmask.data.prepare.round_trip import LossyTokenizer, check_round_trip
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError

ODD = "def f():\n\tx = 'e\u0301 \u00b2 \ufb01 \u4e2d\U0001f600'\n\n\n    if x:\r\n      return 1\n  # a"


def sentence_pieces(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Characters, with spaces as a sign of their own and all others as bytes, as Llama's tokenizer has them."""
    signs = ["<unk>", "<|endoftext|>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127))]
    vocab = {sign: i for i, sign in enumerate(signs)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    first = [] if normalizer is None else [normalizer]
    tokenizer.normalizer = normalizers.Sequence(
        [*first, normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def pairs(texts: list[str], vocabulary: Vocabulary) -> list[tuple[str, list[int]]]:
    return list(zip(texts, vocabulary.encode_batch(texts), strict=True))


def with_prefix_space() -> Tokenizer:
    tokenizer = byte_level(None)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


LOSSY: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "line ends": (lambda: sentence_pieces(normalizers.Replace("\n", " ")), "line ends"),
    "indentation": (lambda: sentence_pieces(normalizers.Replace("    ", " ")), "indentation"),
    "spaces": (lambda: sentence_pieces(normalizers.Replace(" = ", "=")), "spaces"),
    "case": (lambda: sentence_pieces(normalizers.Lowercase()), "capital letters"),
    "characters": (lambda: sentence_pieces(normalizers.Replace("(", "")), "some characters"),
    "a space before": (with_prefix_space, "indentation"),
}


@pytest.mark.parametrize("make", [byte_level, lambda: byte_level(None), sentence_pieces], ids=["qwen", "gpt2", "llama"])
def test_tokenizers_that_give_programs_back(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    vocabulary = Vocabulary(tokenizer, tokenizer.token_to_id("<|endoftext|>"))
    texts = [ODD, *(row["code"] for row in rows(20))]
    check_round_trip(pairs(texts, vocabulary), vocabulary, "x", is_exact=True)


def test_bytes_give_everything_back() -> None:
    vocabulary = Vocabulary.of_bytes()
    check_round_trip(pairs([ODD], vocabulary), vocabulary, "bytes", is_exact=True)


@pytest.mark.parametrize(("make", "what"), LOSSY.values(), ids=LOSSY.keys())
def test_programs_that_do_not_come_back(make: Callable[[], Tokenizer], what: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer", make())
    write_lines(tmp_path / "rows.jsonl", [row | {"code": f"# Sums\n{row['code']}"} for row in rows(20)])
    with pytest.raises(UserError, match=f"does not give back {what}: .*--tokenizer bytes; or take it with --lossy"):
        prepare(settings(tmp_path))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()  # the same command with another tokenizer starts anew
    assert prepare(settings(tmp_path, lossy=True))["num_examples"] == 20


def test_few_programs_may_hold_a_character_that_is_not_known() -> None:
    words = {word: i for i, word in enumerate(["[UNK]", "[END]", "a", "b", "+"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vocabulary = Vocabulary(tokenizer, 1)
    known, unknown = ["a + b"] * 15, "a + \u00a3"
    check_round_trip(pairs([*known, unknown], vocabulary), vocabulary, "x", is_exact=True)
    texts = [*known[:8], *[unknown] * 8]
    with pytest.raises(LossyTokenizer, match="characters that it does not know"):
        check_round_trip(pairs(texts, vocabulary), vocabulary, "x", is_exact=True)


def test_prose_may_lose_capitals_and_accents_but_no_line_ends(tmp_path: Path) -> None:
    lower = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    save_tokenizer(tmp_path / "lower", sentence_pieces(lower))
    save_tokenizer(tmp_path / "lines", sentence_pieces(normalizers.Replace("\n", " ")))
    texts = write_lines(
        tmp_path / "t.jsonl", [{"text": f"Number {i}: a Caf\u00e9.\nAnd another line."} for i in range(9)]
    )

    def make(name: str) -> PrepareSettings:
        return PrepareSettings("text", str(tmp_path / name), tmp_path / f"out_{name}", (str(texts),), 8)

    assert prepare(make("lower"))["num_examples"] > 0
    with pytest.raises(UserError, match="does not give back line ends"):
        prepare(make("lines"))
