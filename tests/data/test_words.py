import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from tests.helpers.text import byte_level, word_piece
from unmask.data.words import PATTERNS, WordEncoder, ascii_pattern, byte_symbols

ASCII = st.text(st.characters(max_codepoint=127))
LIKE_CODE = st.lists(
    st.sampled_from(
        [" ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", "'s", "'S", "'LL", "a", "Bc", "7", "1234", "?", "()", "_"]
    )
).map("".join)
TOKENIZERS = [byte_level(None), *(byte_level(pattern) for pattern in PATTERNS)]


@given(ASCII | LIKE_CODE)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_cut_is_the_tokenizers(pattern: str, text: str) -> None:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    words = ascii_pattern(pattern).findall(text)
    assert words == [word for word, _ in split.pre_tokenize_str(text)]
    assert "".join(words) == text


@given(ASCII | LIKE_CODE)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_ids_are_the_tokenizers(tokenizer: Tokenizer, text: str) -> None:
    words = WordEncoder.for_tokenizer(tokenizer)
    assert words is not None
    for _ in range(2):  # learned, then remembered
        assert words.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", ["Zoë", "a<|im_end|>b", "<|endoftext|>", "\u2003"])
def test_other_texts_are_left_to_the_tokenizer(text: str) -> None:
    words = WordEncoder.for_tokenizer(TOKENIZERS[0])
    assert words is not None
    assert words.encode(text) is None


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.data.words._MOST_WORDS", 20)
    words = WordEncoder.for_tokenizer(TOKENIZERS[0])
    assert words is not None
    for i in range(100):
        text = f"number {i} of a hundred"
        assert words.encode(text) == TOKENIZERS[0].encode(text).ids
        assert len(words._ids) < 30


def changed(**parts: object) -> Tokenizer:
    tokenizer = byte_level()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


UNKNOWN = {
    "word piece": word_piece(),
    "lower case": changed(normalizer=normalizers.Lowercase()),
    "a space in front": changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "another cut": changed(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\w+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    ),
    "another behaviour": changed(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(PATTERNS[1]), "removed"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    ),
    "uncut": changed(pre_tokenizer=pre_tokenizers.ByteLevel(False, use_regex=False)),
    "nothing before": changed(pre_tokenizer=None),
    "dropout": changed(model=models.BPE(dropout=0.1)),
}


@pytest.mark.parametrize("tokenizer", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_other_tokenizers_have_no_short_way(tokenizer: Tokenizer) -> None:
    assert WordEncoder.for_tokenizer(tokenizer) is None


def test_byte_symbols_are_the_librarys() -> None:
    assert set(byte_symbols()) == set(pre_tokenizers.ByteLevel.alphabet())
    for byte in range(128):
        assert (
            pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(chr(byte))[0][0] == byte_symbols()[byte]
        )
    symbols = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str("€é日")[0][0]
    assert symbols == "".join(byte_symbols()[byte] for byte in "€é日".encode())
