"""Text that is not the run's, as its rows; and from the command line: other corpora, and samples."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.helpers import SHORT, lines, run_cli
from tests.helpers.likelihood import nelbo
from tests.helpers.text import save_tokenizer, word_piece, write_lines
from unmask.data.prepare import PrepareSettings, prepare
from unmask.errors import UserError
from unmask.evaluation.text import names_of, read_corpora, zero_shot
from unmask.models.build import build_denoiser
from unmask.models.transformer_config import TransformerConfig
from unmask.tasks.text import Text

SMALL = [
    *("model.preset=tiny", "train.compile=false", "train.dtype=float32", "train.batch_size=8", "train.threads=1"),
    *("optim.warmup_steps=1", "eval.examples=4", "data.length=16", *SHORT),
]


@pytest.fixture(autouse=True, scope="module")
def _a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMASK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def corpus(folder: Path, name: str = "corpus.jsonl", number: int = 40) -> Path:
    folder.mkdir(exist_ok=True)
    return write_lines(
        folder / name, [{"text": f"{name} holds text {i} " + "of some length " * (i % 4)} for i in range(number)]
    )


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["wrap", "document"])
def test_a_corpus_in_part_is_spread_over_it(rows: str, tmp_path: Path) -> None:
    """As a file and as a store, first and last rows alike; no row twice."""
    task = Text(Text.Config(length=32, rows=rows))
    path = corpus(tmp_path)
    prepare(PrepareSettings("text", "bytes", tmp_path / "store", (str(path),), 32, rows=rows))
    for source in (path, tmp_path / "store"):
        every, some = task.corpus(source), task.corpus(source, 7)
        place = [i * len(every) // 7 for i in range(7)]
        assert torch.equal(some.x0, every.x0[place])
        assert len(set(place)) == 7
        assert torch.equal(task.corpus(source, 10**6).x0, every.x0)
        assert torch.equal(task.examples_from_file(source).x0, every.x0)


def test_a_corpus_is_evaluated_as_rows_are(tmp_path: Path) -> None:
    task = Text(Text.Config(length=32))
    model = build_denoiser(TransformerConfig(preset="tiny"), task.tokens).eval()
    corpora = read_corpora(task, [corpus(tmp_path, "a.jsonl"), corpus(tmp_path, "b.jsonl")], limit=5, option="")
    found = zero_shot(model, corpora, nelbo_draws=3)
    for name in ("a", "b"):
        rows = task.corpus(tmp_path / f"{name}.jsonl", 5)
        assert found[name].likelihood.estimate == nelbo(model, rows, draws=3)
        likelihoods = found[name].likelihood.values()
        assert likelihoods["ppl"] == pytest.approx(math.exp(likelihoods["nelbo"]))  # packed: no padding
        nats = likelihoods["nelbo"] * 5 * 31
        num_bytes = int((rows.x0[:, 1:] < 256).sum())
        assert likelihoods["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x.txt", "a/y.jsonl.gz"], ["x", "y"]),
        (["a/x.txt", "b/x.txt", "b/y.txt"], ["a_x", "b_x", "b_y"]),
        (["c/a/x.txt", "d/a/x.jsonl"], ["c_a_x", "d_a_x"]),
        (["folder.txt", "v1.5"], ["folder.txt", "v1.5"]),
        ([], []),
    ],
)
def test_names(paths: list[str], names: list[str], tmp_path: Path) -> None:
    """A folder keeps all of its own; files lose their ending."""
    found = [tmp_path / path for path in paths]
    for path in found:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if path.name in ("folder.txt", "v1.5") else path.touch()
    assert names_of(found, "") == names


def test_names_that_cannot_be_told_apart(tmp_path: Path) -> None:
    for other in ("x.txt", "x.jsonl"):
        found = [corpus(tmp_path, "x.jsonl"), tmp_path / other]
        found[1].touch()
        with pytest.raises(UserError, match=r"--corpus .*x\.jsonl, .*: some are the same, or have the same name"):
            names_of(found, "--corpus ")


# --- the command line ------------------------------------------------------------------------------------------------


def train(recipe: str, folder: Path, judge: Path, *settings: str) -> Path:
    """A run that looks at two other corpora and at 3 samples along training."""
    other = [corpus(folder, name) for name in ("reviews.jsonl", "speeches.jsonl")]
    arguments = [
        recipe, f"data.path={corpus(folder)}", f"eval.zero_shot=[{other[0]}, {other[1]}]",
        f"eval.generative.model={judge}", "eval.generative.samples=3", *settings,
    ]  # fmt: skip
    assert run_cli("train", *arguments, *SMALL, "--out", folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, judge: Path) -> Path:
    return train("text/uniform_small", tmp_path_factory.mktemp("run"), judge, "eval.generative.decode.steps=4")


@pytest.mark.parametrize("is_causal", [False, True])
def test_eval_is_what_training_logged(
    is_causal: bool, run: Path, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same rows, and of samples with the same noise."""
    run = train("text/ar_small", tmp_path, judge) if is_causal else run
    last = lines(run / "metrics.jsonl")[-1]
    out, folder = run.parent / "samples.jsonl", run.parent
    decoder = [] if is_causal else ["--decoder", "steps=4"]
    asked = ["--corpus", folder / "reviews.jsonl", "--corpus", folder / "speeches.jsonl", "--generative", judge]
    capsys.readouterr()
    assert run_cli("eval", run, *asked, "--samples", 3, *decoder, "--out", out, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bits_per_byte"] == pytest.approx(last["eval/bits_per_byte"])
    for name in ("reviews", "speeches"):
        own = said["zero_shot"][name]
        assert own["examples"] == 4
        for key in ("nelbo", "nelbo_stderr", "ppl", "bits_per_byte"):
            assert own[key] == pytest.approx(last[f"eval/zero_shot/{name}/{key}"])
    for key in ("gen_ppl", "gen_ppl_stderr", "unigram_entropy", "distinct_1", "distinct_2", "distinct_3"):
        assert said["generative"]["samples"][key] == pytest.approx(last[f"eval/{key}"], rel=1e-5)
        assert said["generative"]["real"][key] == pytest.approx(last[f"eval/real/{key}"], rel=1e-5)
    samples = lines(out)
    assert [own["sample"] for own in samples] == [0, 1, 2]
    nll, number = (sum(own[key] for own in samples) for key in ("nll", "scored_tokens"))
    assert math.exp(nll / number) == pytest.approx(last["eval/gen_ppl"], rel=1e-5)


def test_eval_shows_all_of_it(run: Path, judge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = run.parent / "prompts"
    prompts.write_text('reviews\n{"text": ""}\n')
    asked = ["--corpus", run.parent / "reviews.jsonl", "--generative", judge, "--prompts", prompts, "--samples", 2]
    capsys.readouterr()
    asked += ["--decoder", "steps=2"]
    assert run_cli("eval", run, *asked, "--examples", 3) == 0
    shown = capsys.readouterr().out
    for words in ("reviews", "perplexity", "bits per byte", "samples", "real text", "entropy", "distinct-1, 2, 3"):
        assert words in shown
    assert run_cli("eval", run, *asked, "--json") == 0
    said = json.loads(capsys.readouterr().out)["generative"]
    assert (said["samples"]["rows"], said["prompts"]) == (4, str(prompts))
    assert said["model"]["type"] == "llama"


# --- bad input -------------------------------------------------------------------------------------------------------

BAD_TEXT = {
    "empty": (b"", r"x.txt: its text fills no row of data.length=32 tokens \(nothing to read\)"),
    "short": (b"a few words", r"fills no row of data.length=32 tokens \(1 rows read, 1 rows kept\); give more"),
    "not UTF-8": (b"fine\ncaf\xe9\n" * 20, r"x.txt, from line 1: not UTF-8: byte 0xe9 in line 2"),
}


@pytest.mark.parametrize(("content", "message"), BAD_TEXT.values(), ids=BAD_TEXT)
def test_bad_text(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"--corpus {tmp_path}/{message}" if "x.txt" in message else message):
        read_corpora(Text(Text.Config(length=32)), [tmp_path / "x.txt"], limit=4, option="--corpus ")


def test_text_that_the_tokenizer_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it is an error; more than a little is said."""
    save_tokenizer(tmp_path / "words", word_piece(), eos="[SEP]")
    known = write_lines(tmp_path / "known.jsonl", [{"text": "how many ? return 1 " * i} for i in range(1, 9)])
    prepare(
        PrepareSettings("text", str(tmp_path / "words"), tmp_path / "store", (str(known),), 8, validation_ratio=0.3)
    )
    task = Text(Text.Config(path=str(tmp_path / "store"), validation_ratio=0.3))
    other = write_lines(tmp_path / "other.jsonl", [{"text": "xyz zyx yyy " * 9}])
    with pytest.raises(UserError, match="1 dropped: nothing in it is known to the tokenizer"):
        read_corpora(task, [other], limit=4, option="")
    half = write_lines(tmp_path / "half.jsonl", [{"text": "xyz how " * 35}])
    (found,) = read_corpora(task, [half], limit=None, option="")
    assert found.unknown == pytest.approx(0.5)
    assert "does not know 50% of its tokens" in capsys.readouterr().err


def test_rows_of_another_layout(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    prepare(PrepareSettings("text", "bytes", tmp_path / "store", (str(path),), 32, rows="document"))
    with pytest.raises(UserError, match=r"its rows are made as document, the model's as wrap.*--rows wrap"):
        Text(Text.Config(length=32)).corpus(tmp_path / "store")
    with pytest.raises(UserError, match="its rows have 32 tokens, the model's 64"):
        Text(Text.Config(length=64, rows="document")).corpus(tmp_path / "store")


BAD_OPTIONS = {
    "no corpus": (["--corpus", "no/where"], "--corpus no/where: no such file or folder"),
    "no data": (["--data", "no/where"], "--data no/where: cannot be read: no such file"),
    "samples alone": (["--samples", 4], "--samples 4: goes with --generative FOLDER"),
    "no model": (["--generative", "nowhere"], "--generative nowhere: is not a folder with a model"),
    "no samples": (["--generative", "JUDGE", "--samples", 0], "--samples"),
    "greedy": (
        ["--generative", "JUDGE", "--decoder", "left_to_right,temperature=0"],
        "--decoder: with temperature=0 all 64 samples are the same",
    ),
    "two decoders": (["--generative", "JUDGE", "--decoder", "a", "--decoder", "b"], "2 are given"),
    "no prompts": (["--generative", "JUDGE", "--prompts", "nowhere"], "nowhere: cannot be read"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(options: list, message: str, run: Path, judge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run_cli("eval", run, *(judge if option == "JUDGE" else option for option in options)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


BAD_SETTINGS = {
    "no corpus": ("text/uniform_small", ["eval.zero_shot=[nowhere]"], "eval.zero_shot=nowhere: no such file or folder"),
    "no model": ("text/uniform_small", ["eval.generative.model=x"], "eval.generative.model=x: is not a folder with a"),
    "a wrong key": ("text/uniform_small", ["eval.generative={modle: x}"], "did you mean eval.generative.model?"),
    "a wrong decoder": (
        "text/uniform_small",
        ["eval.generative={model: x, decode: {stpes: 3}}"],
        "unknown key eval.generative.decode.stpes; did you mean eval.generative.decode.steps?",
    ),
    "no text": ("debug", ["eval.zero_shot=[nowhere]"], "eval.zero_shot: the task sudoku is no running text"),
    "no text to sample": ("debug", ["eval.generative.model=x"], "eval.generative: the task sudoku is no running text"),
}


@pytest.mark.parametrize(("recipe", "settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings(
    recipe: str, settings: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any work."""
    small = [] if recipe == "debug" else [f"data.path={corpus(tmp_path)}", *SMALL]
    assert run_cli("train", recipe, *small, *settings, "--out", tmp_path / "run") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
