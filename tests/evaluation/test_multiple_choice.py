"""Multiple choice along training: the figures of the verb, at each evaluation; and files that cannot be asked."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import lines, run_cli
from tests.helpers.runs import tiny_run
from tests.helpers.text import write_lines
from unmask.config import recipes
from unmask.errors import UserError

TEXT = ["task.name=text", "process.name=uniform", "data.length=64", "train.dtype=float64", "log.tensorboard=true"]
QUESTIONS: list[dict[str, Any]] = [
    {"question": "Is it?", "choices": ["yes", "no", "perhaps so"], "answer": 1},
    {"context": "They sit. They", "choices": ["stand up.", "stand."], "answer": "stand."},
    {"ctx": "One, two,", "endings": ["three", "four", "5"], "label": "0"},
    {"context": "Is this", "choices": ["left", "out"], "answer": 0},
]


def train(folder: Path, *settings: str) -> Path:
    write_lines(folder / "text.jsonl", [{"text": f"They sit. They stand up {n}. " * 9} for n in range(60)])
    own = [f"data.path={folder / 'text.jsonl'}", f"data.cache_dir={folder}"]
    tiny_run(folder / "run", *TEXT, *own, *settings).train()
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that looks at two files of questions, the first three of each."""
    folder = tmp_path_factory.mktemp("choices")
    files = [write_lines(folder / name, QUESTIONS) for name in ("easy.jsonl", "hard.jsonl.gz")]
    setting = f"eval.multiple_choice=[{files[0]}, {files[1]}]"
    return train(folder, setting, "eval.choice_draws=4", "eval.examples=3", "eval.every=1", "train.keep_last=2")


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run_cli("eval", *arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(("step", "name"), [(1, "easy"), (2, "easy"), (2, "hard")])
def test_training_logs_what_the_verb_says(step: int, name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same masks of the same questions, at each evaluation, by each of the two ways of asking."""
    (logged,) = (row for row in lines(run / "metrics.jsonl") if row["step"] == step and "eval/nelbo" in row)
    logged = {key: value for key, value in logged.items() if key.startswith(f"eval/multiple_choice/{name}/")}
    (file,) = run.parent.glob(f"{name}.jsonl*")
    verb = evaluate(
        capsys, run, "--task", "multiple_choice", "--data", file, "--examples", 3, "--step", step, "--draws", 4
    )
    shares = verb["shares"]["likelihood"]
    expected = {
        **{measure: shares[measure] for measure in ("accuracy", "acc_norm")},
        **{f"{measure}_stderr": math.sqrt(share * (1 - share) / 3) for measure, share in shares.items()},
        "chance": pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3),
        "examples": 3,
    }
    assert logged == {f"eval/multiple_choice/{name}/{key}": value for key, value in expected.items()}
    both = evaluate(capsys, run, "--questions", file, "--examples", 3, "--step", step)["multiple_choice"][name]
    assert both == expected | {"data": str(file), "loglikelihood_stderr": verb["loglikelihood_stderr"]}


def test_tensorboard_has_it(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    last = lines(run / "metrics.jsonl")[-1]
    for key in ("accuracy", "acc_norm_stderr", "chance"):
        tag = f"eval/multiple_choice/hard/{key}"
        assert [event.step for event in events.Scalars(tag)] == [1, 2]
        assert events.Scalars(tag)[-1].value == pytest.approx(last[tag], rel=1e-6)  # float32


def test_it_is_shown_kept_and_repeated(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_lines(tmp_path / "own.jsonl", QUESTIONS), tmp_path / "out.jsonl"
    found = evaluate(capsys, run, "--questions", file, "--draws", 2, "--out", out)
    assert [row["answer"] for row in lines(out) if row["set"] == "own"] == [1, 1, 0, 0]
    assert found["protocol"]["multiple_choice"]["own"]["draws"] == 2
    assert found["protocol"]["multiple_choice"]["own"]["examples"] == 4
    (tmp_path / "result.json").write_text(json.dumps(found))
    repeats = evaluate(capsys, "--protocol", tmp_path / "result.json")["repeats"]
    assert repeats["differs"] == {}
    assert repeats["figures"]["multiple_choice.own.accuracy"] == [found["multiple_choice"]["own"]["accuracy"]] * 2
    write_lines(file, QUESTIONS[:3])
    assert run_cli("eval", "--protocol", tmp_path / "result.json") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("multiple_choice.own.data_sha256", "multiple choice", "by chance", "acc_norm"):
        assert words in shown
    assert "multiple_choice" not in evaluate(capsys, run)  # only where it is asked for


BAD = {
    "no file": (None, "eval.multiple_choice=FILE: cannot be read: no such file"),
    "no choices": ({"question": "?", "answer": 0}, "eval.multiple_choice=FILE, line 2: needs `choices`"),
    "the right one twice": (
        {"question": "?", "choices": ["a", " a"], "answer": 1},
        "eval.multiple_choice=FILE, line 2: `choices` has the right one, 'a', twice",
    ),
    "too long": (
        {"question": "?", "choices": ["a", "long " * 20], "answer": 0},
        "eval.multiple_choice=FILE, line 2: choice 1, 'long long long long long long long long ': has 100 tokens, and "
        "the model reads 64; shorten it",
    ),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_asked_is_refused_before_the_training(
    row: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "q.jsonl"
    if row is not None:
        write_lines(file, [QUESTIONS[0], row])
    with pytest.raises(UserError) as caught:
        train(tmp_path, f"eval.multiple_choice=[{file}]", "eval.examples=2")
    assert message.replace("FILE", str(file)) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_task_without_text_is_asked_nothing(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "q.jsonl", QUESTIONS)
    with pytest.raises(UserError, match=r"eval.multiple_choice=.*q.jsonl: the likelihood of a text needs"):
        tiny_run(tmp_path / "run", f"eval.multiple_choice=[{file}]").train()


@pytest.mark.parametrize("setting", ["eval.choice_draws=1", "eval.multiple_choice=q.jsonl"])
def test_wrong_settings(setting: str) -> None:
    with pytest.raises(UserError, match=setting.partition("=")[0]):
        recipes.load("debug", [setting])


def test_options_that_do_not_go_together(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run.parent / "easy.jsonl"
    assert run_cli("eval", run, "--questions", file, "--against", run) == 2
    assert "leave --generative, --corpus and --questions out" in " ".join(capsys.readouterr().err.split())
    assert run_cli("eval", run, "--questions", run.parent / "nowhere") == 2
    assert "nowhere: cannot be read: no such file" in " ".join(capsys.readouterr().err.split())
