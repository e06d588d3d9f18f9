import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.text import byte_level, rows, save_tokenizer, word_piece
from unmask.data.infill import encode_prompt, encode_prompts
from unmask.data.vocabulary import Vocabulary, load_tokenizer
from unmask.errors import UserError

TOKENIZER = byte_level()
EOS, START, END = (TOKENIZER.token_to_id(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
SIZE = TOKENIZER.get_vocab_size()
TEXTS = [text for row in rows(10) for text in row.values()]
FULL = Vocabulary(TOKENIZER, EOS)
USED = FULL.restrict_to(i for text in TEXTS for i in FULL.encode(text))
IN_NFC = st.text(st.characters(exclude_categories=("Cs",))).map(lambda text: TOKENIZER.normalizer.normalize_str(text))


@pytest.mark.parametrize("vocabulary", [FULL, USED], ids=["full", "used"])
@given(IN_NFC)
def test_there_and_back(vocabulary: Vocabulary, text: str) -> None:
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert all(0 <= i < vocabulary.vocab_size and i != vocabulary.mask_id for i in ids)


@pytest.mark.parametrize("text", ["xylophone", " Ünseen", "日本 😀", "a<|im_end|>b", "<|im_start|>"])
def test_a_token_that_is_not_kept_becomes_its_bytes(text: str) -> None:
    used = FULL.restrict_to([])
    assert used.vocab_size == 256 + 2
    assert len(used.encode(text)) == len(text.encode())
    assert used.decode(used.encode(text)) == text
    assert used.encode("<|endoftext|>") == [used.eos_id]


def test_used_ids_mean_the_same_and_are_fewer() -> None:
    assert USED.vocab_size < FULL.vocab_size
    for text in TEXTS:
        assert USED.original(USED.encode(text)) == FULL.encode(text)
    assert USED.original_ids[:-1] == sorted(USED.original_ids[:-1])


def test_a_new_mask_comes_after_all_ids() -> None:
    assert (FULL.mask_id, FULL.vocab_size, FULL.original([FULL.mask_id])) == (SIZE, SIZE + 1, [None])
    assert (USED.mask_id, USED.original([USED.mask_id])) == (USED.vocab_size - 1, [None])
    assert FULL.original_ids == [*range(SIZE), None]


def test_a_mask_that_the_tokenizer_has_stays_one_of_its_ids() -> None:
    full = Vocabulary(TOKENIZER, EOS, START)
    assert (full.mask_id, full.vocab_size, full.eos_id) == (START, SIZE, EOS)
    used = full.restrict_to([5, 7])
    assert used.original([used.mask_id, used.eos_id]) == [START, EOS]
    assert used.vocab_size == len({*full.restrict_to([]).original_ids, 5, 7})
    assert used.decode([used.mask_id, used.eos_id]) == "<|endoftext|>"


@pytest.mark.parametrize("vocabulary", [FULL, USED, Vocabulary(TOKENIZER, EOS, START)])
def test_masks_are_left_out_or_shown(vocabulary: Vocabulary) -> None:
    a, b = vocabulary.encode("Zoë"), vocabulary.encode(" pays")
    ids = [*a, vocabulary.mask_id, vocabulary.mask_id, *b]
    assert vocabulary.decode(ids) == "Zoë pays"
    assert vocabulary.decode(ids, mask_text="_") == "Zoë__ pays"


def test_batches_are_texts_one_by_one_in_order() -> None:
    assert FULL.encode_batch(TEXTS) == [TOKENIZER.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert FULL.encode_batch([]) == []


def test_word_pieces_become_the_unknown_token() -> None:
    full = Vocabulary(word_piece(), eos=1)
    used = full.restrict_to(full.encode("how"))
    assert used.original(used.encode("how many ?")) == [2, 0, 0]
    assert used.decode(used.encode("how")) == "how"


def test_nothing_to_put_in_place_is_an_error() -> None:
    used = Vocabulary(word_piece(unknown=None), eos=1).restrict_to([2])
    with pytest.raises(UserError, match=r"token 'many' is not in the vocabulary.*prepare with --vocab full"):
        used.encode("how many")


@pytest.mark.parametrize("vocabulary", [FULL, USED, Vocabulary(TOKENIZER, EOS, START).restrict_to([9])])
def test_saved_and_loaded(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path)
    loaded = Vocabulary.load(tmp_path)
    assert loaded.fingerprint == vocabulary.fingerprint
    assert loaded.original_ids == vocabulary.original_ids
    assert (loaded.eos_id, loaded.mask_id) == (vocabulary.eos_id, vocabulary.mask_id)
    assert [loaded.encode(text) for text in TEXTS] == [vocabulary.encode(text) for text in TEXTS]


def test_fingerprints_tell_meanings_apart() -> None:
    others = [
        FULL,
        USED,
        Vocabulary(TOKENIZER, EOS, START),
        Vocabulary(TOKENIZER, END),
        Vocabulary(byte_level(None), EOS),
    ]
    assert len({vocabulary.fingerprint for vocabulary in others}) == len(others)
    assert Vocabulary(byte_level(), EOS).fingerprint == FULL.fingerprint


DAMAGED = {
    "absent": (None, "cannot be read"),
    "no JSON": ("{", "is not JSON"),
    "a list": ("[]", "the value: "),
    "no ids": ("{}", "eos_id: Field required"),
    "an id too far": (
        '{"eos_id": 9999, "mask_id": 0, "kept": null, "vocab_size": 1, "fingerprint": "x"}',
        "cannot be read",
    ),
    "a huge id": ('{"eos_id": 1e30, "mask_id": 0, "vocab_size": 1, "fingerprint": "x"}', "eos_id: "),
    "kept text": ('{"eos_id": 0, "mask_id": 0, "kept": ["a"], "vocab_size": 1, "fingerprint": "x"}', "kept.0: "),
    "nested": ("[" * 50_000, "is nested too deeply"),
    "of another tokenizer": (
        f'{{"eos_id": {EOS}, "mask_id": {SIZE}, "kept": null, "vocab_size": {SIZE + 1}, "fingerprint": "x"}}',
        "is not of the tokenizer.json beside it",
    ),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_vocabulary_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    FULL.save(tmp_path)
    (tmp_path / "vocabulary.json").unlink()
    if content is not None:
        (tmp_path / "vocabulary.json").write_text(content)
    with pytest.raises(UserError) as caught:
        Vocabulary.load(tmp_path)
    assert f"{tmp_path / 'vocabulary.json'}: {message}" in str(caught.value)


@pytest.mark.parametrize("eos", ["<|endoftext|>", {"content": "<|endoftext|>", "lstrip": False}])
def test_a_folder_or_a_file_names_its_end_token(eos: object, tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, eos=eos)
    for source in (folder, folder / "tokenizer.json"):
        assert Vocabulary.from_source(str(source)).fingerprint == FULL.fingerprint
        assert Vocabulary.from_source(str(source), "<|im_end|>", "<|im_start|>").eos_id == END


def test_the_end_token_of_a_special_tokens_map(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, eos=None)
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert Vocabulary.from_source(str(folder)).eos_id == END


def test_padding_and_truncation_of_the_tokenizer_are_off(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(3)
    vocabulary = Vocabulary.from_source(str(save_tokenizer(tmp_path, tokenizer)))
    assert vocabulary.encode(TEXTS[0]) == FULL.encode(TEXTS[0])
    assert vocabulary.encode("é" + TEXTS[0]) == FULL.encode("é" + TEXTS[0])


BAD_TOKENS = {
    "no end": ({"eos": None}, {}, "tokenizer_config.json names no eos_token; say with --eos TOKEN"),
    "another end": ({"eos": "</s>"}, {}, "--eos </s>: {folder} has no such token"),
    "no such end": ({}, {"eos_token": "<eos>"}, "--eos <eos>: {folder} has no such token; name one that it has"),
    "no such mask": ({}, {"mask_token": "<m>"}, "--mask-token <m>: {folder} has no such token; leave it out"),
    "mask is end": ({}, {"mask_token": "<|endoftext|>"}, "--mask-token <|endoftext|>: is the end token too"),
}


@pytest.mark.parametrize(("saved", "asked", "message"), BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_bad_tokens_are_named(saved: dict[str, object], asked: dict[str, str], message: str, tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, **saved)
    with pytest.raises(UserError) as caught:
        Vocabulary.from_source(str(folder), **asked)
    assert message.format(folder=folder) in str(caught.value)


def test_an_unknown_tokenizer_names_value_and_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object, **options: object) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"tokenizer Owen/Owen2: no such file.*no network; give a folder with"):
        load_tokenizer("Owen/Owen2")


def test_the_hub_is_asked_for_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(folder))
    assert Vocabulary.from_source("Qwen/Qwen2-0.5B").fingerprint == FULL.fingerprint
    assert load_tokenizer("Qwen/Qwen2-0.5B").to_str() == TOKENIZER.to_str()


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        load_tokenizer(str(tmp_path))
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: is not JSON"):
        Vocabulary.from_source(str(tmp_path))


@pytest.mark.parametrize("number", [2**32 - 1, 2 * SIZE + 5000])
def test_an_id_far_beyond_the_others_is_refused_before_tables_are_made(number: int, tmp_path: Path) -> None:
    content = json.loads(TOKENIZER.to_str())
    content["added_tokens"][-1]["id"] = number
    content["model"]["vocab"]["far"] = number
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"tokenizer.json: its largest id is {number}"):
        Vocabulary.from_source(str(tmp_path))


def test_a_tokenizer_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="is no regular file"):
        load_tokenizer(str(tmp_path))


def test_older_files_are_converted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "how", "many"]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    vocabulary = Vocabulary.from_source(str(tmp_path), eos_token="[SEP]", mask_token="[MASK]")
    assert (vocabulary.eos_id, vocabulary.mask_id) == (3, 4)
    assert vocabulary.encode("How many xs") == [5, 6, 1]


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"has no tokenizer\.json, and transformers cannot make one"):
        load_tokenizer(str(tmp_path))


def test_prompt_and_separator_are_encoded_apart_and_the_space_around_is_gone() -> None:
    for text in ("How many?", "  How many?\n\n", "Zoë", ""):
        expected = FULL.encode(text.strip()) + FULL.encode("\n")
        assert encode_prompt(FULL, text, "\n") == expected
        assert encode_prompts(FULL, ["x", text], "\n")[1] == expected


def test_qwen(qwen: Path) -> None:
    vocabulary = Vocabulary.from_source(str(qwen))
    assert vocabulary.encode("\n") == [198]
    assert (vocabulary.eos_id, vocabulary.mask_id, vocabulary.vocab_size) == (151643, 151646, 151647)
    paper = Vocabulary.from_source(str(qwen), mask_token="<|im_start|>")
    assert (paper.mask_id, paper.vocab_size) == (151644, 151646)
    assert vocabulary.encode("Why?\n") != encode_prompt(vocabulary, "Why?", "\n") == [*vocabulary.encode("Why?"), 198]


def test_qwen_is_as_transformers_has_it(qwen: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(str(qwen))
    texts = [text for row in rows(200) for text in row.values()] + json.loads('["\\u2028 \\u00a0", "a<|im_end|>"]')
    ids = Vocabulary.from_source(str(qwen)).encode_batch(texts)
    assert ids == [reference(text, add_special_tokens=False).input_ids for text in texts]
