"""Runs on word problems, from the command line: training, evaluation, answers, and starts from other weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import SHORT, lines, run_cli
from tests.helpers.gsm8k import PROBLEMS
from tests.helpers.text import byte_level, save_tokenizer, settings, write_lines
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
    assert "its model has model.ff_dim=24 (not 32); set it so" in " ".join(capsys.readouterr().err.split())


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
