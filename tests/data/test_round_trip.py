"""A tokenizer that does not give texts back is noticed before anything is trained on it."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.helpers.text import byte_level, rows, save_tokenizer, settings, write_lines
from unmask.data.prepare import PrepareSettings, prepare
from unmask.data.prepare.round_trip import LossyTokenizer, check_round_trip, choose_rows
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


BATCH = 1000
PLACES = {
    "first": lambda lossy, rows: range(lossy),
    "last": lambda lossy, rows: range(rows - lossy, rows),
    "middle": lambda lossy, rows: range((rows - lossy) // 2, (rows + lossy) // 2),
    "evenly": lambda lossy, rows: range(0, rows, rows // lossy),
}


@pytest.mark.parametrize("num_rows", [100, 400, 1000, 1900, 3000, 12_000, 60_000])
@pytest.mark.parametrize("place", PLACES)
def test_a_loss_in_one_row_of_a_hundred_is_seen_in_99_of_100_preparations(
    num_rows: int, place: str, tmp_path: Path
) -> None:
    """By the exact probability that a random sample of each batch misses all such rows, wherever they lie."""
    config = settings(tmp_path)
    missed, drawn = 1.0, 0
    for before in range(0, num_rows, BATCH):
        count = min(BATCH, num_rows - before)
        own = choose_rows(count, before, config)
        assert own == choose_rows(count, before, config)
        assert own <= set(range(count))
        lossy = sum(before <= row < before + count for row in PLACES[place](num_rows // 100, num_rows))
        missed *= math.comb(count - lossy, len(own)) / math.comb(count, len(own))
        drawn += len(own)
    assert missed <= 0.01
    assert drawn <= 600 * (1 + math.log(1 + num_rows / BATCH)) + 16 * num_rows / BATCH


def test_the_sample_is_spread_over_a_batch_and_none_where_nothing_can_be_lost(tmp_path: Path) -> None:
    drawn = [row for before in range(0, 30_000, BATCH) for row in choose_rows(BATCH, before, settings(tmp_path))]
    counts = np.histogram(drawn, bins=10, range=(0, BATCH))[0]
    assert abs(counts - len(drawn) / 10).max() < 5 * (len(drawn) / 10) ** 0.5  # five standard errors
    assert choose_rows(BATCH, 0, settings(tmp_path, lossy=True)) == set()
    assert choose_rows(BATCH, 0, settings(tmp_path, tokenizer="bytes")) == set()


@pytest.mark.parametrize("kind", ["tinygsm", "text"])
def test_a_preparation_sees_what_one_row_of_fifty_loses(kind: str, tmp_path: Path) -> None:
    """The row stands where every former sample of 16 passed it by: not first, and not at a multiple of 25."""
    save_tokenizer(tmp_path / "tokenizer", sentence_pieces(normalizers.Replace("\n@", "@")))
    given = [row | {"text": row["code"]} for row in rows(400)]
    for number in range(27, 400, 50):
        given[number] = {key: f"{value}\n@" for key, value in given[number].items()}
        given[number]["code"] = given[number]["text"] = "def f():\n    return 1\n@g"
    write_lines(tmp_path / "rows.jsonl", given)
    asked = (
        settings(tmp_path)
        if kind == "tinygsm"
        else PrepareSettings("text", str(tmp_path / "tokenizer"), tmp_path / "out", (str(tmp_path / "rows.jsonl"),), 64)
    )
    with pytest.raises(UserError, match="does not give back line ends"):
        prepare(asked)
