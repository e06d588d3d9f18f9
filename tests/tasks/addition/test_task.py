import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import SHORT, lines, run_cli
from unmask.config.settings import WrongSettings, check_section
from unmask.data.stream import EpochStream
from unmask.errors import UserError
from unmask.tasks.addition import task as task_module
from unmask.tasks.addition.sums import longest_chain
from unmask.tasks.addition.task import Addition, AdditionData
from unmask.tasks.task import GradedTask
from unmask.types import CleanBatch


def make_task(**settings: Any) -> Addition:
    return Addition(AdditionData(**{"digits": [2, 5], "examples": 60} | settings))


def texts(task: Addition, batch: CleanBatch) -> list[str]:
    return [task.render(x0, prompt, prompt).plain for x0, prompt in zip(batch.x0, batch.prompt_mask, strict=True)]


def test_it_is_a_task_and_an_epoch_has_every_example_once() -> None:
    task = make_task()
    assert isinstance(task, GradedTask)
    stream = task.train_stream(0)
    assert isinstance(stream, EpochStream)
    assert stream.epoch_size == 60
    first, second = (texts(task, stream[torch.arange(60) + 60 * epoch]) for epoch in range(2))
    assert sorted(first) == sorted(second)
    assert first != second
    assert texts(task, stream[torch.tensor([7, 3])]) == [first[7], first[3]]


def test_many_examples_are_drawn_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = make_task().train_stream(0)[torch.arange(30)].x0
    monkeypatch.setattr(task_module, "_MOST_KEPT", 100)
    assert torch.equal(make_task().train_stream(0)[torch.arange(30)].x0, kept)
    assert len(make_task(examples=2**40).train_stream(0)[torch.tensor([2**50])]) == 1


@pytest.mark.parametrize(("answer", "written"), [("natural", "013023"), ("reversed", "320310")])
def test_a_canvas_is_the_sum_in_fixed_width(answer: str, written: str) -> None:
    task = make_task(answer=answer)
    (prompt,) = task.prompts(["12345+678="], "here")
    assert "".join(task.symbol(token) or "?" for token in prompt.tolist()) == "12345+00678=??????"
    tokens = torch.tensor([[int(symbol) for symbol in written]])
    full = torch.cat([prompt[None, :12], tokens], dim=1)
    assert task.record(prompt, full[0]) == {"prompt": "12345+678=", "answer": "13023", "right": True}
    wrong = full.clone()
    wrong[0, -1] = 9
    assert task.record(prompt, wrong[0])["right"] is False
    assert "·" in task.record(prompt, prompt)["answer"]


def test_an_answer_is_right_if_all_its_digits_are() -> None:
    task = make_task(test_chain=[0, 4])
    examples = task.validation(20)
    for position in range(12, 18):
        tokens = examples.x0.clone()
        tokens[3, position] = (tokens[3, position] + 1) % 10
        tokens[5, position] = 10  # a plus sign
        assert task.grade(examples, tokens).measures["accuracy"].tolist() == [i not in (3, 5) for i in range(20)]
    grades = task.grade(examples, examples.x0)
    assert grades.measures["accuracy"].all()
    assert grades.details == [{"chain": i % 5} for i in range(20)]


def test_training_has_its_own_chains_and_none_of_the_held_out_sums() -> None:
    task = make_task(digits=3, chain=2, test_chain=[0, 3], examples=5000, validation_ratio=0.3)
    training, held_out = task.train_stream(0)[torch.arange(5000)], task.validation(400)
    assert longest_chain(*task.operands(training.x0)).unique().tolist() == [2]
    assert longest_chain(*task.operands(held_out.x0)).unique().tolist() == [0, 1, 2, 3]
    assert not {*texts(task, training)} & {*texts(task, held_out)}


def test_held_out_sums_are_distinct() -> None:
    task = make_task(digits=2)
    few, all_of_them = task.validation(100), task.validation(1000)
    found = texts(task, all_of_them)
    assert texts(task, few) == found[:100]
    assert 100 < len({*found}) == len(found) < 1000


def test_files_of_sums_are_read(tmp_path: Path) -> None:
    task = make_task()
    (tmp_path / "sums.txt").write_text('1+2\n\n 00099999 + 1 = 100000\n{"prompt": "7+5="}\n')
    examples = task.examples_from_file(tmp_path / "sums.txt")
    assert texts(task, examples) == ["00001+00002=000003", "99999+00001=100000", "00007+00005=000012"]


BAD_LINES = {
    "12+": "line 2: is no sum of two numbers; write it as 12345+678=",
    "-1+2=": "line 2: is no sum",
    "1+2+3=": "line 2: is no sum",
    "\u0663+1=": "line 2: is no sum",
    "123456+1=": "line 2: a number is too long; this task has up to 5 digits (data.digits=[2, 5])",
    "1+2=1234567": "line 2: a number is too long",
    "1+2=4": "line 2: 1+2 is 3, not 4; correct it",
    '{"sum": "1+2"}': "line 2: needs the string `prompt`",
    "{": "line 2: ",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items())
def test_bad_lines_are_refused(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "sums.txt").write_text(f"1+1\n{line}\n")
    with pytest.raises(UserError) as error:
        make_task().examples_from_file(tmp_path / "sums.txt")
    assert message in str(error.value)


def test_prompts_without_a_sum_or_with_an_answer_are_refused() -> None:
    for given, message in (
        ([""], "here: holds no sum"),
        (["1+2=3"], "line 1: holds an answer; end it with the sign: 1+2="),
    ):
        with pytest.raises(UserError, match="here") as error:
            make_task().prompts(given, "here")
        assert message in str(error.value)


BAD_SETTINGS: list[dict[str, object]] = [
    {"digits": 0},
    {"digits": 1},
    {"digits": [5, 2]},
    {"digits": [2, 101]},
    {"digits": True},
    {"digits": [2, 3, 4]},
    {"examples": 0},
    {"chain": 9},
    {"chain": [3, 2]},
    {"chain": -1},
    {"test_chain": [0, 9]},
    {"answer": "backwards"},
    {"validation_ratio": 0},
    {"validation_ratio": 0.9},
    {"seed": -1},
]


@pytest.mark.parametrize("settings", BAD_SETTINGS)
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(WrongSettings) as error:
        check_section(AdditionData, {"digits": 8} | settings, "data")
    assert f"data.{next(iter(settings))}" in str(error.value)


SMALL = [
    *SHORT,
    "train.compile=false",
    "train.dtype=float32",
    "data.digits=[2, 3]",
    "data.test_chain=[0, 3]",
    "train.batch_size=8",
    "eval.examples=8",
    "model.dim=16",
    "model.ff_dim=16",
    "model.num_layers=1",
]


def test_it_is_decoded_evaluated_and_diagnosed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert run_cli("train", "addition/puma", *SMALL, "--out", run) == 0
    (tmp_path / "sums.txt").write_text("123+45=\n99+1\n")
    answers = tmp_path / "answers.jsonl"
    assert run_cli("decode", run, tmp_path / "sums.txt", "--decoder", "right_to_left", "--out", answers) == 0
    records = lines(answers)
    assert [record["prompt"] for record in records] == ["123+45=", "99+1="]
    capsys.readouterr()
    assert run_cli("eval", run, "--decoder", "right_to_left", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    groups = found["groups"]["right_to_left/1"]
    assert [*groups] == [f"longest carry chain {chain}" for chain in range(4)]
    assert [own["examples"] for own in groups.values()] == [2] * 4
    assert sum(own["accuracy"] for own in groups.values()) / 4 == found["accuracy"]["right_to_left/1"]
    assert run_cli("eval", run, "--data", tmp_path / "sums.txt") == 0
    assert "longest carry chain 2" in capsys.readouterr().out  # 99 + 1
    assert run_cli("diagnose", run, "--examples", 4, "--draws", 2, "--per-bin", 2, "--json") == 0
    (diagnosis,) = json.loads(capsys.readouterr().out)["runs"]
    assert diagnosis["missing"] == {}


@pytest.mark.slow
def test_the_report_shows_it(tmp_path: Path) -> None:
    assert run_cli("train", "addition/puma", *SMALL, "--out", tmp_path / "run") == 0
    assert run_cli("report", tmp_path / "run", "--out", tmp_path / "report.html", "--examples", 2) == 0
    assert (tmp_path / "report.html").is_file()


def test_the_causal_model_writes_the_least_significant_digit_first(tmp_path: Path) -> None:
    assert run_cli("train", "addition/ar", *SMALL, "--out", tmp_path / "ar") == 0
    assert run_cli("eval", tmp_path / "ar", "--examples", 4) == 0
