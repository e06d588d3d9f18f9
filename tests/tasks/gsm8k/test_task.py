"""Word problems answered by programs: from files of text to a score."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.gsm8k import PROBLEMS, said
from tests.helpers.text import rows, settings, write_lines
from unmask.data.prepare import prepare
from unmask.errors import UserError
from unmask.tasks.gsm8k import Gsm8k, Gsm8kData

# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_the_stores(store: Path, task: Gsm8k) -> None:
    meta = json.loads((store / "meta.json").read_text())
    config = task.config
    assert (config.length, config.vocab_size, config.mask_id) == (128, meta["vocab_size"], meta["mask_id"])
    assert config.fingerprint == task.tokens.fingerprint == meta["tokenizer"]["fingerprint"]
    assert Gsm8kData(path=str(store), seed=3).seed == 3
    assert task.original_ids[: config.mask_id] == list(range(config.mask_id))


def test_without_a_store_they_are_the_papers() -> None:
    config = Gsm8kData()
    assert (config.length, config.vocab_size, config.mask_id, config.eos_id) == (512, 151_645, 151_644, 151_643)


# --- grading ---------------------------------------------------------------------------------------------------------

ANSWERS = {
    "the number": ("def f():\n    return {gold}", "correct"),
    "as a float": ("def f():\n    return {gold} * 1.0", "correct"),
    "as text": ("def f():\n    return '{gold}'", "correct"),
    "in a fence": ("```python\ndef f():\n    return {gold}\n```", "correct"),
    "after talk": ("Here it is:\ndef f():\n    return {gold}", "correct"),
    "then rubbish": ("def f():\n    return {gold}\n((", "correct"),
    "another number": ("def f():\n    return {gold} + 1", "wrong"),
    "no program": ("The answer is {gold}.", "no_program"),
    "a fault": ("def f():\n    return {gold} / 0", "error"),
    "a file": ("def f():\n    return open('x')", "blocked"),
}


@pytest.mark.parametrize(("text", "reason"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_is_what_its_program_returns(task: Gsm8k, text: str, reason: str) -> None:
    """The held-out row's own program says what is right."""
    example = task.validation(1)
    gold = task.grade(example, example.x0).details[0]["gold"]
    grades = task.grade(example, said(task, text.format(gold=int(gold))))
    (detail,) = grades.details
    assert detail["reason"] == reason
    assert grades.measures["accuracy"].tolist() == [reason == "correct"]
    assert grades.measures["runs"].tolist() == [reason in ("correct", "wrong")]
    assert grades.measures["parses"].tolist() == [reason != "no_program"]


def test_stored_answers_are_right(task: Gsm8k) -> None:
    examples = task.examples_from_file(Path(task.config.path))
    grades = task.grade(examples, examples.x0)
    assert [detail["gold"] for detail in grades.details] == list(range(50))
    assert grades.measures["accuracy"].all()


def test_what_follows_the_end_and_masks_that_are_left_do_not_count(task: Gsm8k) -> None:
    example = task.validation(1)
    tokens = example.x0.clone()
    tokens[0, -1] = 5
    end = int((tokens[0] == task.tokens.eos_id).nonzero()[0])
    assert task.grade(example, tokens).measures["accuracy"].all()
    tokens[0, end:] = task.tokens.mask_id
    assert task.grade(example, tokens).measures["accuracy"].all()


# --- questions from files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["problems.jsonl", "problems.jsonl.gz"])
def test_problems_bring_their_answers(task: Gsm8k, tmp_path: Path, name: str) -> None:
    examples = task.examples_from_file(write_lines(tmp_path / name, PROBLEMS))
    assert examples.answers == (1004, 2.5, 7)
    assert not examples.is_known(task.tokens.mask_id)
    for row in range(3):
        prompt = task.vocabulary.decode(examples.x0[row][examples.prompt_mask[row]].tolist())
        assert prompt == PROBLEMS[row]["question"].strip() + "\n"
    grades = task.grade(examples[:2], said(task, "def f():\n    return 1004", "def f():\n    return 1004"))
    assert grades.measures["accuracy"].tolist() == [True, False]


def test_a_prompt_is_tokenised_as_in_training(store: Path, task: Gsm8k, tmp_path: Path) -> None:
    """Of every row, so that a question whose last token would merge with the separator is among them."""
    trained = task.examples_from_file(store)
    asked = task.prompts([json.dumps({"question": row["question"]}) for row in rows(50)], "here")
    assert torch.equal(asked, trained.masked(task.tokens.mask_id))


def test_of_a_long_question_the_end_is_asked(task: Gsm8k, capsys: pytest.CaptureFixture[str]) -> None:
    canvas = task.prompts(["What is " + " and ".join(map(str, range(200))) + "?"], "stdin")[0]
    assert (canvas == task.tokens.mask_id).tolist() == [False] * 64 + [True] * 64
    assert task.vocabulary.decode(canvas.tolist()).endswith("199?\n")
    assert "stdin: 1 of 1 questions" in capsys.readouterr().err


def test_a_question_may_not_hold_the_mask(store: Path, task: Gsm8k, tmp_path: Path) -> None:
    """Where the mask is a token that can be written."""
    prepare(settings(tmp_path, mask_token="<|im_start|>"))
    other = Gsm8k(Gsm8kData(path=str(tmp_path / "out")))
    with pytest.raises(UserError, match=r"stdin, line 2 holds the mask token <\|im_start\|>"):
        other.prompts(["How many?", "How <|im_start|> many?"], "stdin")
    assert task.prompts(["How <|im_start|> many?"], "stdin").shape == (1, 128)  # there the mask is a token of its own


# --- texts with spans to fill in -------------------------------------------------------------------------------------


def test_a_program_with_spans_is_laid_out_as_in_training(store: Path, task: Gsm8k) -> None:
    """Wherever text can be cut without its tokens changing."""
    trained, encode, decode = task.examples_from_file(store), task.vocabulary.encode, task.vocabulary.decode
    num_cut = 0
    for example, row in zip(range(8), rows(8), strict=True):
        prompt, ids = int(trained.prompt_mask[example].sum()), encode(row["code"])
        for k in range(1, len(ids) - 4, 3):
            head, tail = decode(ids[:k]), decode(ids[k + 3 :])
            if encode(head) == ids[:k] and encode(tail) == ids[k + 3 :]:
                spans = {"question": row["question"], "program": f"{head}<mask:3>{tail}"}
                (canvas,) = task.prompts([json.dumps(spans)], "here")
                expected = trained.x0[example].clone()
                expected[prompt + k : prompt + k + 3] = task.tokens.mask_id
                assert torch.equal(canvas, expected)
                num_cut += 1
    assert num_cut > 20


def test_spans_may_stand_anywhere_and_are_recorded(task: Gsm8k) -> None:
    text = "<mask:2>Ann has<mask:3> pens.\n<mask:1>"
    (canvas,) = task.prompts([json.dumps({"text": text})], "here")
    encode, mask = task.vocabulary.encode, [task.tokens.mask_id]
    given = mask * 2 + encode("Ann has") + mask * 3 + encode(" pens.\n") + mask
    assert canvas.tolist() == given + [task.tokens.eos_id] * (task.config.length - len(given))
    tokens = canvas.clone()
    tokens[canvas == mask[0]] = torch.tensor(encode("abc")[:1] * 5 + [task.tokens.eos_id])
    letter = task.vocabulary.decode(encode("abc")[:1])
    assert task.record(canvas, tokens) == {
        "prompt": text,
        "text": f"{letter * 2}Ann has{letter * 3} pens.\n",
        "spans": [letter * 2, letter * 3, "<|endoftext|>"],
    }
    assert task.text(canvas) == text


def test_a_question_with_a_span_is_answered_too(task: Gsm8k) -> None:
    (canvas,) = task.prompts(["How <mask:2> are left?"], "here")
    encode = task.vocabulary.encode
    given = [*encode("How "), *[task.tokens.mask_id] * 2, *encode(" are left?"), *encode("\n")]
    assert canvas.tolist() == given + [task.tokens.mask_id] * (task.config.length - len(given))
    assert task.record(canvas, torch.zeros_like(canvas))["prompt"].startswith("How <mask:2> are left?\n<mask:1")


def test_a_text_may_fill_the_canvas(task: Gsm8k) -> None:
    (canvas,) = task.prompts(['{"text": "<mask:128>"}'], "here")
    assert (canvas == task.tokens.mask_id).all()


BAD_SPANS = {
    "of no tokens": ({"text": "a<mask:0>b"}, "<mask:0>: write <mask:N>"),
    "of a fraction": ({"text": "a<mask:1.5>b"}, "<mask:1.5>: write <mask:N>"),
    "below zero": ({"text": "a<mask:-1>b"}, "<mask:-1>: write <mask:N>"),
    "without a number": ({"question": "a<mask>b"}, "<mask>: write <mask:N>"),
    "not closed": ({"text": "a<mask:3"}, "<mask:3: write <mask:N>"),
    "longer than the canvas": ({"text": "<mask:129>"}, "<mask:129>: longer than the canvas, which has 128 tokens"),
    "far longer": ({"text": f"<mask:{'9' * 5000}>"}, "9: longer than the canvas"),
    "a text that is too long": ({"text": "<mask:128>!"}, "129 tokens do not fit the canvas, which has 128"),
    "no room for a program": ({"question": "<mask:100>", "program": "<mask:100>"}, "201 tokens do not fit the canvas"),
    "no room for an answer": ({"question": "a<mask:127>"}, "129 tokens leave no room for an answer in 128"),
    "no span": ({"text": "all of it"}, "nothing is to be filled in"),
    "no span in a program": ({"question": "a", "program": "b"}, "nothing is to be filled in"),
    "a program alone": ({"program": "<mask:1>"}, "needs `question`, or `question` and `program`, or `text`"),
    "two forms": ({"question": "a", "text": "<mask:1>"}, "needs `question`, or `question` and `program`, or `text`"),
    "no text": ({"text": 3}, "needs the string `text`"),
}


@pytest.mark.parametrize(("row", "message"), BAD_SPANS.values(), ids=BAD_SPANS)
def test_a_bad_span_is_named_with_its_line(task: Gsm8k, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        task.prompts(["How many?", "", json.dumps(row)], "prompts.jsonl")
    assert str(caught.value).startswith("prompts.jsonl, line 3: ")
    assert message in str(caught.value)


def test_what_can_be_forbidden_is_one_token(task: Gsm8k) -> None:
    vocabulary = task.vocabulary
    assert vocabulary.decode([task.token(" return")]) == " return"
    assert task.token("<|endoftext|>") == task.tokens.eos_id
    with pytest.raises(UserError, match=r"'Zoë Q' is not one token, but [0-9]+: '.*"):
        task.token("Zoë Q")
    with pytest.raises(UserError, match="'' is not one token, but 0"):
        task.token("")


# --- problems from files ---------------------------------------------------------------------------------------------

BAD_PROBLEMS = {
    "no JSON": ("{", "not JSON"),
    "a list": ([1], "holds no JSON object: [1]"),
    "no question": ({"answer": 1}, "needs the string `question`"),
    "no answer": ({"question": "a"}, "needs `answer`: a number"),
    "two answers": ({"question": "a", "answer": "#### 1.234,56"}, "answer: '1.234,56' is not a number"),
    "an answer in words": ({"question": "a", "answer": "#### many"}, "answer: 'many' is not a number"),
}


@pytest.mark.parametrize(("row", "message"), BAD_PROBLEMS.values(), ids=BAD_PROBLEMS)
def test_a_bad_problem_is_named(task: Gsm8k, tmp_path: Path, row: object, message: str) -> None:
    path = write_lines(tmp_path / "problems.jsonl", [PROBLEMS[0], row])
    with pytest.raises(UserError) as caught:
        task.examples_from_file(path)
    assert f"{path}, line 2: " in str(caught.value)
    assert message in str(caught.value)
