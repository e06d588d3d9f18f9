"""Running text: from files to rows, and to a likelihood."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from tests.helpers import SHORT, lines, run_cli
from tests.helpers.text import byte_level, save_tokenizer, word_piece, write_lines
from unmask.config import recipes
from unmask.data.prepare import PrepareSettings, prepare
from unmask.data.prepare.documents import standard_library
from unmask.data.prepare.sources import PART, FileSource
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError
from unmask.evaluation.nelbo import TextLikelihood
from unmask.lab.compare import choose_measure
from unmask.tasks.task import Extent, GradedTask
from unmask.tasks.text import Text
from unmask.types import CleanBatch

END, MASK = 256, 257
SMALL = [
    *("model.preset=tiny", "train.compile=false", "train.dtype=float32", "train.batch_size=8", "train.threads=1"),
    *("optim.warmup_steps=1", "eval.examples=4", "data.length=32", *SHORT),
]


def documents(number: int) -> list[str]:
    """Of different lengths, all different, some with what is not ASCII or looks special."""
    draw = random.Random(0)
    words = ["mask", "röw", "tokens", "<|end|>", "∎", " \n", "and", "0", "the"]
    return [f"{i} " + " ".join(draw.choices(words, k=draw.randrange(1, 40))) for i in range(number)]


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))


def corpus(folder: Path, texts: list[str]) -> Path:
    return write_lines(folder / "corpus.jsonl", [{"text": text} for text in texts])


def text(path: Path, **settings: object) -> Text:
    return Text(Text.Config(path=str(path), **{"length": 32, "validation_ratio": 0.2} | settings))


def train_rows(task: Text) -> CleanBatch:
    stream = task.train_stream(0)
    return stream[torch.arange(stream.epoch_size)]


# --- rows ------------------------------------------------------------------------------------------------------------


def test_wrapped_rows_are_the_documents_joined_by_end_tokens(tmp_path: Path) -> None:
    """In their order in the store, where training comes first; only what fills no row is missing."""
    texts = documents(40)
    task = text(corpus(tmp_path, texts))
    store = task._store[torch.arange(len(task._store))]
    assert (store.x0[:, 0] == END).all()
    assert store.prompt_mask.tolist() == [[True] + [False] * 31] * len(store)
    held_out = int(task._store.meta["num_held_out"])
    found = []
    for part in (store.x0[:-held_out, 1:], store.x0[-held_out:, 1:]):
        *whole, rest = bytes(255 if i == END else i for i in part.flatten().tolist()).split(b"\xff")
        found.append([document.decode() for document in whole])
        left = [own for own in texts if own.encode().startswith(rest) and own not in whole]
        assert left
    assert set(found[0]).isdisjoint(found[1])
    assert found[0] == [own for own in texts if own in found[0]]
    assert len(found[0]) + len(found[1]) >= len(texts) - 6  # of each part at most 31 bytes are missing
    assert task.tokens.eos_id is None


def test_a_document_a_row(tmp_path: Path) -> None:
    """Cut or padded; one that does not fit has no end token after it."""
    texts = documents(40)
    task = text(corpus(tmp_path, texts), rows="document", validation_ratio=0.25)
    train, held_out = train_rows(task), task.validation(100)
    assert (len(train), len(held_out)) == (30, 10)
    expected = set()
    for own in texts:
        ids = [END, *own.encode()][:32]
        expected.add(tuple(ids + [END] * (32 - len(ids))))
    assert {tuple(row) for row in [*train.x0.tolist(), *held_out.x0.tolist()]} == expected
    assert task.tokens.eos_id == END


def test_long_documents_can_be_dropped(tmp_path: Path) -> None:
    """One fits where its end token does: 30 bytes in a row of 32."""
    path = corpus(tmp_path, ["a" * 30, "b" * 31, "c" * 32, "d" * 3, "e", ""])
    kept = {}
    for too_long in ("truncate", "drop"):
        asked = PrepareSettings("text", "bytes", tmp_path / too_long, (str(path),), 32, too_long, rows="document")
        kept[too_long] = prepare(asked)["rows"]
    assert [kept["truncate"][key] for key in ("kept", "truncated", "dropped_short")] == [4, 2, 2]
    assert [kept["drop"][key] for key in ("kept", "dropped_too_long", "dropped_short")] == [2, 2, 2]


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.99])
def test_equal_documents_lie_on_one_side(tmp_path: Path, ratio: float) -> None:
    """The split is one of texts, and depends on neither their order nor the tokenizer."""
    texts = documents(20)
    sides = []
    save_tokenizer(tmp_path / "tokenizer", byte_level())
    for name, order, tokenizer in (("a", texts * 3, "bytes"), ("b", texts[::-1], str(tmp_path / "tokenizer"))):
        (tmp_path / name).mkdir()
        asked = PrepareSettings(
            "text", tokenizer, tmp_path / name / "out", (str(corpus(tmp_path / name, order)),), 128,
            rows="document", validation_ratio=ratio,
        )  # fmt: skip
        prepare(asked)
        task = Text(Text.Config(path=str(asked.out), validation_ratio=ratio, rows="document"))
        canvas = torch.tensor([task.config.eos_id, *[task.config.mask_id] * 127])
        parts = (train_rows(task), task.validation(100))
        shown = [{task.record(canvas, row)["text"] for row in part.x0} for part in parts]
        assert shown[0].isdisjoint(shown[1])
        assert len(shown[1]) == min(max(1, round(20 * ratio)), 19)
        sides.append(shown[1])
    assert {own[:12] for own in sides[0]} == {own[:12] for own in sides[1]}


def test_several_workers_make_the_same_store(tmp_path: Path) -> None:
    path = corpus(tmp_path, documents(60))
    stores = []
    for workers in (1, 2):
        asked = PrepareSettings(
            "text", "bytes", tmp_path / f"out{workers}", (str(path),), 32, workers=workers, batch_rows=7
        )
        prepare(asked)
        stores.append((asked.out / "labels.bin").read_bytes())
    assert stores[0] == stores[1]


# --- sources ---------------------------------------------------------------------------------------------------------


def test_a_text_file_is_cut_at_line_ends_and_between_characters(tmp_path: Path) -> None:
    content = "".join(f"line {i} of ä text\n" for i in range(9000)) + "ü" * 100_000
    (tmp_path / "long.txt").write_text(content)
    parts = [row.fields["text"] for row in FileSource(str(tmp_path / "long.txt")).rows(("text",))]
    assert "".join(parts) == content
    assert parts[0].endswith("\n")
    assert PART < max(len(part.encode()) for part in parts) <= 2 * PART + 3


def test_a_folder_is_its_files_but_for_hidden_ones(tmp_path: Path) -> None:
    (tmp_path / "in" / ".hidden").mkdir(parents=True)
    for name, own in (("b.txt", "second document"), ("a.md", "the first one"), (".hidden/c.txt", "x" * 50)):
        (tmp_path / "in" / name).write_text(own)
    write_lines(tmp_path / "in" / "z.jsonl", [{"text": "as JSON"}])
    task = text(tmp_path / "in", rows="document")
    shown = [
        bytes(i for i in row if i < END).decode()
        for row in [*train_rows(task).x0.tolist(), *task.validation(9).x0.tolist()]
    ]
    assert sorted(shown) == ["as JSON", "second document", "the first one"]


def test_without_a_path_it_is_the_standard_library() -> None:
    """Known files are there, its tests are not; nothing is read yet."""
    names = {path.name for path in standard_library()._paths}
    assert {"random.py", "dataclasses.py"} <= names
    assert not any("test" in path.parts for path in standard_library()._paths)


def test_rows_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one text and one way to cut it, wherever it lies."""
    path = corpus(tmp_path, documents(30))
    made = [text(path)._store.folder, text(path)._store.folder]
    assert capsys.readouterr().err.count("Rows of text kept in") == 1
    made.append(text(path.rename(tmp_path / "other.jsonl"))._store.folder)
    assert made[0] == made[1]
    assert made[2].name.split("_")[-1] == made[0].name.split("_")[-1]
    assert text(tmp_path / "other.jsonl", length=64)._store.folder != made[0]


# --- decoding --------------------------------------------------------------------------------------------------------


GAP = '{"text": "the<mask:3> cat"}'


def filled(task: Text, line: str, written: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The canvas of a prompt, and the same with `written` in its masks, @ the end token."""
    (canvas,) = task.prompts([line], "here")
    ids = [END if i == ord("@") else i for i in written.encode()]
    return canvas, canvas.clone().masked_scatter(canvas == MASK, torch.tensor(ids))


@pytest.mark.parametrize("rows", ["wrap", "document"])
def test_a_text_with_gaps_is_recorded_as_it_was_given(rows: str, tmp_path: Path) -> None:
    task = text(corpus(tmp_path, documents(5)), rows=rows)
    goes_on = rows == "wrap"
    canvas, tokens = filled(task, GAP, "big" + "." * 21 * goes_on)
    expected = {"prompt": "the<mask:3> cat", "text": "thebig cat", "spans": ["big"]}
    if goes_on:  # with one more gap, to the end of the row
        more = {"prompt": "<mask:21>", "text": "." * 21, "spans": ["." * 21]}
        expected = {key: value + more[key] for key, value in expected.items()}
    assert task.record(canvas, tokens) == expected


@pytest.mark.parametrize(
    ("rows", "line", "at_first", "written", "at_last"),
    [
        ("wrap", "the cat", "the cat" + "_" * 24, " sat@" + "x" * 19, "the cat sat"),
        ("wrap", '{"text": ""}', "_" * 31, "a cat@" + "x" * 25, "a cat"),
        ("wrap", GAP, "the___ cat" + "_" * 21, "b@g!@" + "x" * 19, "theb<|end|>g cat!"),
        ("document", "the cat", "the cat" + "_" * 24, " sat" + "@" * 20, "the cat sat"),
        ("document", GAP, "the___ cat", "big", "thebig cat"),
    ],
    ids=["packed", "nothing given", "packed, with a gap", "a document", "a document with a gap"],
)
def test_what_is_shown_while_a_text_is_decoded(
    rows: str, line: str, at_first: str, written: str, at_last: str, tmp_path: Path
) -> None:
    """Rows start with an end token, and a document with gaps is padded with given ones: neither ends the answer."""
    task = text(corpus(tmp_path, documents(5)), rows=rows)
    canvas, tokens = filled(task, line, written)
    is_given = canvas != MASK
    assert task.render(canvas, is_given, ~is_given).plain == at_first
    assert task.render(tokens, is_given, ~is_given).plain == at_last


# --- likelihood ------------------------------------------------------------------------------------------------------


def test_units_of_likelihood() -> None:
    """Uniform over the 256 bytes: 8 bits each, whatever the padding."""
    both = TextLikelihood.of(math.log(256), 100, Extent(tokens=100, bytes=100, rows="wrap"))
    assert (both.ppl, both.bits_per_byte) == (pytest.approx(256), pytest.approx(8))
    padded = TextLikelihood.of(math.log(256) / 4, 100, Extent(tokens=25, bytes=25, rows="document"))
    assert (padded.ppl, padded.bits_per_byte) == (pytest.approx(256), pytest.approx(8))


@pytest.mark.parametrize("rows", ["wrap", "document"])
@pytest.mark.parametrize("tokenizer", ["bytes", "byte_level"])
def test_the_extent_counts_the_bytes_of_the_text(tmp_path: Path, rows: str, tokenizer: str) -> None:
    """Of documents that fit whole, and are all held out but one."""
    texts = [own.replace("<|end|>", "") for own in documents(12)]
    save_tokenizer(tmp_path / "byte_level", byte_level())
    source = "bytes" if tokenizer == "bytes" else str(tmp_path / "byte_level")
    path = corpus(tmp_path, texts)
    asked = PrepareSettings("text", source, tmp_path / "out", (str(path),), 256, rows="document", validation_ratio=0.9)
    prepare(asked)
    task = Text(Text.Config(path=str(asked.out)))
    examples = task.examples_from_file(asked.out)
    extent = task.extent(examples)
    assert extent.bytes == sum(len(own.encode()) for own in texts)
    assert extent.tokens == sum(len(task.vocabulary.encode(own)) + 1 for own in texts)


def test_a_file_is_evaluated_as_a_store_is_made(tmp_path: Path) -> None:
    path = corpus(tmp_path, documents(30))
    (tmp_path / "more").mkdir()
    other = corpus(tmp_path / "more", documents(9))
    for rows in ("wrap", "document"):
        task = text(path, rows=rows)
        examples = task.examples_from_file(other)
        joined = b"\xff".join(own.encode() for own in documents(9)) + b"\xff"
        if rows == "wrap":
            found = bytes(min(i, 255) for i in examples.x0[:, 1:].flatten().tolist())
            assert found == joined[: len(found)]
            assert len(joined) - len(found) < 31
        else:
            assert len(examples) == 9
        assert examples.prompt_mask.sum() == len(examples)


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["text/uniform_small", "text/ar_small"])
def test_from_text_to_bits_per_byte(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = corpus(tmp_path, documents(60)), tmp_path / "run"
    assert run_cli("train", recipe, f"data.path={path}", *SMALL, "--out", run) == 0
    last = [row for row in lines(run / "metrics.jsonl") if "eval/nelbo" in row][-1]
    assert last["eval/ppl"] == pytest.approx(math.exp(last["eval/nelbo"]))
    assert "eval/accuracy" not in last
    path.unlink()  # the rows are kept
    (tmp_path / "prompts").write_text('a röw\n{"text": ""}\n')
    capsys.readouterr()
    assert run_cli("decode", run, tmp_path / "prompts", "--out", tmp_path / "answers.jsonl") == 0
    first, second = lines(tmp_path / "answers.jsonl")
    assert (first["prompt"], second["prompt"]) == ("a röw", "")
    assert first["nfe"] == 31 - len("a röw".encode())
    corpus(tmp_path, documents(60))
    capsys.readouterr()
    assert run_cli("eval", run, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bits_per_byte"] == pytest.approx(last["eval/bits_per_byte"])
    assert said["accuracy"] == said["protocol"]["decoders"] == {}
    assert said["protocol"]["rows"] == "wrap"
    assert run_cli("eval", run) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert run_cli("eval", run, "--decoder", "margin") == 2
    assert "--decoder: the task text has no right answers" in capsys.readouterr().err
    if recipe == "text/uniform_small":
        replay = ["--decoder", "prob,tokens_per_step=16", "--examples", "1"]
        assert run_cli("report", run, "--out", tmp_path / "page.html", *replay) == 0
        page = (tmp_path / "page.html").read_text()
        assert "Bits per byte" in page
        assert '"is_solved":null' in page
        assert "What is struck through" not in page


def test_a_comparison_goes_by_the_nelbo() -> None:
    configs = [recipes.load(f"text/{name}_small") for name in ("uniform", "ar")]
    assert choose_measure(None, configs) == "eval/nelbo"
    with pytest.raises(UserError, match="give one of eval/nelbo"):
        choose_measure("eval/accuracy/ema/prob/1", configs)


def test_a_task_of_text_grades_nothing(tmp_path: Path) -> None:
    assert not isinstance(text(corpus(tmp_path, documents(5))), GradedTask)


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "not UTF-8": (b"fine\n" * 3 + b"caf\xe9\n", "from line 1: not UTF-8: byte 0xe9 in line 4"),
    "empty": (b"", "no row is left: nothing to read"),
    "a letter": (b"a", "no row is left: 1 rows read, 1 dropped: fewer than two tokens"),
    "one document": (b"one short document", "1 document of at least two tokens"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_text(content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    arguments = ["text/uniform_small", f"data.path={tmp_path / 'bad.txt'}", *SMALL, "--out", tmp_path / "run"]
    assert run_cli("train", *arguments) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"data.path={tmp_path / 'bad.txt'}" in said
    assert message in said
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache" / "text").glob("*.partial"))


def test_documents_that_a_tokenizer_does_not_know(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "words", word_piece(), eos="[SEP]")
    path = corpus(tmp_path, ["xyz zyx", "zzz yyy xxx"])
    asked = PrepareSettings("text", str(tmp_path / "words"), tmp_path / "out", (str(path),), 32)
    with pytest.raises(UserError, match="2 dropped: nothing in it is known to the tokenizer"):
        prepare(asked)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"path": "nowhere.txt"}, r"data.path=nowhere.txt: no such file or folder"),
        ({"vocab_size": 300, "mask_id": 299, "eos_id": 298}, "the ids are not those of bytes"),
        ({"length": 4096}, r"the training documents fill no row of 4096 tokens"),
    ],
)
def test_wrong_settings(changed: dict, message: str, tmp_path: Path) -> None:
    path = corpus(tmp_path, documents(5))
    with pytest.raises(UserError, match=message):
        text(**{"path": path} | changed).validation(1)


def test_a_store_says_how_it_was_made(tmp_path: Path) -> None:
    path = corpus(tmp_path, documents(20))
    prepare(PrepareSettings("text", "bytes", tmp_path / "out", (str(path),), 64, rows="document", split_seed=3))
    config = Text.Config(path=str(tmp_path / "out"))
    assert (config.length, config.rows, config.seed) == (64, "document", 3)
    with pytest.raises(UserError, match=r"data.rows=wrap, but it was made with document"):
        Text(Text.Config(path=str(tmp_path / "out"), rows="wrap")).validation(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"separator": " "}, "--separator  : text has none"),
        ({"answer_field": "a"}, "--answer-field a: text has none"),
        ({"too_long": "drop"}, "--too-long drop: nothing is too long for --rows wrap"),
    ],
)
def test_options_of_another_kind(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        PrepareSettings("text", "bytes", tmp_path / "out", **options)
    with pytest.raises(UserError, match="--rows document: tinygsm has none"):
        PrepareSettings("tinygsm", "bytes", tmp_path / "out", rows="document")


def test_bytes_are_their_own_ids() -> None:
    vocabulary = Vocabulary.of_bytes()
    every = "".join(map(chr, range(0x3000))) + "<|end|>∎🦆"
    assert bytes(vocabulary.encode(every)) == every.encode()
    assert vocabulary.decode(vocabulary.encode(every)) == every
    assert vocabulary.num_bytes([*every.encode(), END, MASK]) == len(every.encode())
    assert (vocabulary.eos_id, vocabulary.mask_id, vocabulary.vocab_size) == (END, MASK, 258)
