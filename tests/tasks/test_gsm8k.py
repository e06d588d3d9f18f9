"""Word problems answered by programs: from files of text to a score."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import SHORT, lines, run_cli
from tests.helpers.text import byte_level, rows, save_tokenizer, settings, write_lines
from unmask.data.prepare import prepare
from unmask.errors import UserError
from unmask.tasks import gsm8k
from unmask.tasks.gsm8k import Gsm8k, Gsm8kData
from unmask.tasks.programs.grading import Judgement, judge
from unmask.training.loading import LoadedRun, load

SMALL = [
    *("model={preset: tinygsm-small, dim: 16, ff_dim: 24, num_layers: 2, num_heads: 2}", "train.compile=false"),
    *("train.dtype=float32", "train.batch_size=8", "eval.examples=4", "eval.tokens_per_step=[40]", "train.threads=1"),
    *("data.validation_ratio=0.1", "optim.warmup_steps=1", *SHORT),
]
AR = [*SMALL, "eval.tokens_per_step=[1]"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 rows of 128 tokens, whose programs return their number."""
    folder = tmp_path_factory.mktemp("store")
    prepare(settings(folder))
    return folder / "out"


@pytest.fixture
def task(store: Path) -> Gsm8k:
    return Gsm8k(Gsm8kData(path=str(store)))


def said(task: Gsm8k, *texts: str) -> Tensor:
    """Canvases of the first held-out question, answered so and padded with the end token."""
    canvas = task.validation(1)
    prompt = canvas.x0[canvas.prompt_mask].tolist()
    result = torch.full((len(texts), task.config.length), task.tokens.eos_id)
    for row, text in zip(result, texts, strict=True):
        ids = prompt + task.vocabulary.encode(text)
        row[: len(ids)] = torch.tensor(ids)
    return result


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

PROBLEMS = [
    {"question": "How many?", "answer": "Two and two.\n#### 1,004"},
    {"question": "How much? ", "answer": 2.5},
    {"question": "And now?", "answer": "7", "other": None},
]


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


# --- from the command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ar_run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ar"
    assert run_cli("train", "tinygsm/ar_small", f"data.path={store}", *AR, "--out", folder) == 0
    return folder


def test_an_autoregressive_run_goes_from_text_to_a_score(
    ar_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems, answers = write_lines(tmp_path / "test.jsonl", PROBLEMS), tmp_path / "answers.jsonl"
    assert run_cli("eval", ar_run, "--task", "gsm8k", "--data", problems, "--out", answers, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["nelbo"] is None
    assert result["accuracy"] == {"left_to_right/1": 0.0}
    assert result["interval"]["left_to_right/1"] == pytest.approx([0, 0.5615], abs=1e-3)  # Wilson, 0 of 3
    assert result["protocol"]["weights"] == "ema"
    assert len(result["protocol"]["data_sha256"]) == 64
    assert sum(result["reasons"]["left_to_right/1"].values()) == 3
    records = lines(answers)
    assert [record["question"] for record in records] == ["How many?", "How much?", "And now?"]
    assert {"text", "program", "value", "gold", "reason", "output", "accuracy", "nfe"} <= records[0].keys()


def fail_to_run(monkeypatch: pytest.MonkeyPatch, *which: int) -> None:
    """Makes these programs of each call programs that the machine cannot run."""

    def judge_some(texts: list[str], golds: list[float | int | None], **options: Any) -> list[Judgement]:
        failed = Judgement(None, None, "no process for it", False, "not_graded")
        return [failed if n in which else each for n, each in enumerate(judge(texts, golds, **options))]

    monkeypatch.setattr(gsm8k, "judge", judge_some)


def test_what_cannot_be_run_is_not_wrong(task: Gsm8k, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the answer nor, where the row's own program says what is right, that one; which is run again later."""
    examples = task.examples_from_file(Path(task.config.path))[:3]
    fail_to_run(monkeypatch, 0)
    grades = task.grade(examples, examples.x0)
    assert grades.is_graded.tolist() == [False, True, True]
    assert grades.measures["accuracy"].tolist() == [False, True, True]
    assert grades.details[0]["reason"] == "not_graded"
    monkeypatch.undo()
    grades = task.grade(examples, examples.x0)
    assert grades.is_graded.all()
    assert grades.measures["accuracy"].all()


@pytest.mark.parametrize("which", [(1,), (0, 1, 2)], ids=["one", "all"])
def test_an_evaluation_fails_where_programs_cannot_be_run(
    which: tuple[int, ...],
    ar_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail_to_run(monkeypatch, *which)
    problems, answers = write_lines(tmp_path / "test.jsonl", PROBLEMS), tmp_path / "answers.jsonl"
    assert run_cli("eval", ar_run, "--task", "gsm8k", "--data", problems, "--out", answers, "--json") == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["accuracy"] == {"left_to_right/1": None if len(which) == 3 else 0.0}
    assert result["not_graded"] == {"left_to_right/1": len(which)}
    assert sum(result["reasons"].get("left_to_right/1", {}).values()) == 3 - len(which)
    said = f"could not grade {len(which)} of 3 (left_to_right/1) answers, which count in no share: no process for it"
    assert said in captured.err
    assert [record["accuracy"] for record in lines(answers)] == [None if n in which else False for n in range(3)]
    assert run_cli("eval", ar_run, "--task", "gsm8k", "--data", problems) == 1
    assert f"{len(which)} of 3 not graded" in capsys.readouterr().out


def test_a_training_logs_the_accuracy_of_what_could_be_run(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_to_run(monkeypatch, *range(4))
    arguments = ["tinygsm/ar_small", f"data.path={store}", *AR, "train.steps=1"]
    assert run_cli("train", *arguments, "--out", tmp_path / "run") == 0
    assert "Warning: step 1: the machine could not grade 4 of 4" in capsys.readouterr().err
    (logged,) = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "eval/nelbo" in line]
    assert not any(name.startswith("eval/accuracy") for name in logged)
    assert [value for name, value in logged.items() if name.startswith("eval/not_graded/")] == [4]


def test_held_out_rows_have_an_exact_likelihood(ar_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("eval", ar_run) == 0
    assert "NLL " in capsys.readouterr().out
    logged = [line["eval/nelbo"] for line in lines(ar_run / "metrics.jsonl") if "eval/nelbo" in line]
    assert run_cli("eval", ar_run, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["nelbo"] == pytest.approx(logged[-1])
    assert "exact NLL" in result["protocol"]["nelbo"]


def test_questions_are_answered_with_programs(ar_run: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.txt").write_text('How many?\n\n{"question": "How much?"}\n')
    assert run_cli("decode", ar_run, tmp_path / "questions.txt", "--out", tmp_path / "out.jsonl") == 0
    records = lines(tmp_path / "out.jsonl")
    assert [(record["question"], type(record["text"])) for record in records] == [
        ("How many?", str),
        ("How much?", str),
    ]
    for record in records:
        assert record["canvas"].startswith(record["question"] + "\n" + record["text"])
        assert len(record["tokens"]) == 128


def test_a_causal_run_has_no_way_to_fill_in_spans(
    ar_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_text('How many?\n{"text": "Ann<mask:3> pens"}\n')
    assert run_cli("decode", ar_run, tmp_path / "x.jsonl", "--out", tmp_path / "out.jsonl") == 2
    assert "x.jsonl, line 2: a causal model fills in what follows a prompt" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("method", ["uniform", "puma"])
def test_a_run_starts_from_an_autoregressive_one(ar_run: Path, store: Path, tmp_path: Path, method: str) -> None:
    recipe = f"tinygsm/{method}_from_ar_small"
    arguments = [recipe, f"data.path={store}", f"train.init={ar_run}", *SMALL]
    assert run_cli("train", *arguments, "train.steps=1", "optim.lr=1e-30", "--out", tmp_path / "run") == 0
    start, source = load(tmp_path / "run", weights="raw"), load(ar_run)
    assert (start.alignment, start.is_causal, source.is_causal) == ("next", False, True)
    for name, value in source.state_dict().items():
        assert torch.allclose(start.state_dict()[name], value, atol=1e-6), name


def test_a_run_can_be_used_where_its_store_is_not(ar_run: Path, store: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(ar_run, moved)
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(store), "/nowhere"))
    (tmp_path / "questions.txt").write_text("How many?\n")
    assert run_cli("decode", moved, tmp_path / "questions.txt", "--out", tmp_path / "out.jsonl") == 0
    assert run_cli("export", moved, tmp_path / "export") == 0
    assert run_cli("decode", tmp_path / "export", tmp_path / "questions.txt", "--out", tmp_path / "out2.jsonl") == 0
    one, other = (lines(tmp_path / name) for name in ("out.jsonl", "out2.jsonl"))
    assert [record | {"seconds": 0} for record in one] == [record | {"seconds": 0} for record in other]


def other_store(tmp_path: Path, **changed: Any) -> Path:
    """A store that another tokenizer made."""
    save_tokenizer(tmp_path / "other", byte_level(texts=["zzz yyy xxx" * 20]))
    prepare(settings(tmp_path, tokenizer=str(tmp_path / "other"), **changed))
    return tmp_path / "out"


def test_another_tokenizers_store_is_refused(ar_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = other_store(tmp_path)
    assert run_cli("eval", ar_run, "--data", other) == 2
    assert f"{other}: was made with another tokenizer" in capsys.readouterr().err
    start = ["tinygsm/uniform_from_ar_small", f"data.path={other}", f"train.init={ar_run}", *SMALL]
    assert run_cli("train", *start, "--out", tmp_path / "run") == 2
    assert f"train.init={ar_run}: its ids mean other tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_shape_is_named(ar_run: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["tinygsm/uniform_from_ar_small", f"data.path={store}", f"train.init={ar_run}", *SMALL, "model.ff_dim=32"]
    assert run_cli("train", *start, "--out", tmp_path / "run") == 2
    assert "mlp.down.weight is (16, 24), here (16, 32)" in capsys.readouterr().err


def test_a_missing_start_is_named(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["tinygsm/uniform_from_ar_small", f"data.path={store}", "train.init=/nowhere", *SMALL]
    assert run_cli("train", *start, "--out", tmp_path / "run") == 2
    assert "/nowhere" in capsys.readouterr().err


def test_a_causal_run_has_one_decoder(
    ar_run: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("eval", ar_run, "--decoder", "prob") == 2
    assert "set decode.order=left_to_right" in capsys.readouterr().err
    arguments = ["tinygsm/ar_small", f"data.path={store}", *AR, "eval.tokens_per_step=[2]", "--out", tmp_path / "run"]
    assert run_cli("train", *arguments) == 2
    assert "set decode.tokens_per_step=1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def bare_store(store: Path, tmp_path: Path) -> Path:
    """The three files that the reference implementation writes, which says no more than the sizes."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("labels.bin", "prompt_mask.bin"):
        shutil.copy(store / name, bare / name)
    meta = json.loads((store / "meta.json").read_text())
    (bare / "meta.json").write_text(json.dumps({key: meta[key] for key in ("num_examples", "max_len")}))
    return bare


def test_a_store_of_the_reference_needs_its_tokenizer(
    store: Path, task: Gsm8k, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, ids = bare_store(store, tmp_path), task.config
    data = {
        "path": str(bare),
        "vocab_size": ids.vocab_size,
        "mask_id": ids.mask_id,
        "eos_id": ids.eos_id,
        "length": 128,
    }
    arguments = ["tinygsm/uniform_small", f"data={json.dumps(data)}", *SMALL, "--out", tmp_path / "run"]
    assert run_cli("train", *arguments) == 2
    assert f"{bare}: does not say what its ids mean" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run_cli("train", *arguments, f"data.tokenizer={store.parent / 'tokenizer'}", "train.steps=1") == 0
    kept = Gsm8k(LoadedRun.open(tmp_path / "run").config.data)
    assert kept.grade(task.validation(3), task.validation(3).x0).measures["accuracy"].all()


def test_a_run_on_plain_ids_is_graded_as_programs(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The task `tokens` knows no text; `--task gsm8k` reads the same run's ids with the store's vocabulary."""
    arguments = ["tinygsm/uniform_small", "task.name=tokens", f"data.path={store}", *SMALL, "train.steps=1"]
    assert run_cli("train", *arguments, "--out", tmp_path / "run") == 0
    problems = write_lines(tmp_path / "test.jsonl", PROBLEMS)
    assert run_cli("eval", tmp_path / "run", "--data", problems) == 2
    assert run_cli("eval", tmp_path / "run", "--task", "chess", "--data", problems) == 2
    assert "chess: no such task" in capsys.readouterr().err
    assert run_cli("eval", tmp_path / "run", "--task", "gsm8k", "--data", problems, "--json") == 0
    assert sum(json.loads(capsys.readouterr().out)["reasons"]["prob/40"].values()) == 3


def test_another_tokenizer_than_the_datas_is_refused(store: Path, task: Gsm8k, tmp_path: Path) -> None:
    other = save_tokenizer(tmp_path / "other", byte_level(texts=["zzz yyy xxx" * 20]))
    data = {"path": str(bare_store(store, tmp_path)), "tokenizer": str(other), "length": 128}
    ids = {key: getattr(task.config, key) for key in ("vocab_size", "mask_id", "eos_id")}
    with pytest.raises(UserError, match=r"is not the data's tokenizer|has no such token"):
        Gsm8k(Gsm8kData(**data, **ids)).validation(1)


def test_a_checkpoint_of_hugging_face_is_a_start(store: Path, tmp_path: Path) -> None:
    """A tiny Qwen2 whose rows are the tokenizer's ids; the mask is new."""
    transformers = pytest.importorskip("transformers")
    mask_id = json.loads((store / "meta.json").read_text())["mask_id"]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Qwen2Config(
        vocab_size=mask_id, num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-6, **sizes
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "hf")
    start = ["tinygsm/puma_from_ar_small", f"data.path={store}", f"train.init={tmp_path / 'hf'}", *SMALL]
    assert run_cli("train", *start, "train.steps=1", "optim.lr=1e-30", "--out", tmp_path / "run") == 0
    embedding = load(tmp_path / "run", weights="raw").backbone.embedding.weight
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "hf").get_input_embeddings().weight
    assert torch.allclose(embedding[:mask_id], theirs, atol=1e-6)
    assert torch.allclose(embedding[mask_id], theirs.mean(0), atol=1e-6)
