"""Conversations: from files of messages to a model that answers them."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evaluation.judges import trained_llama
from tests.helpers import SHORT, lines, run_cli
from tests.helpers.runs import decode_prompts
from tests.helpers.text import byte_level, save_tokenizer, write_lines
from unmask.data.prepare import PrepareSettings, prepare
from unmask.errors import UserError
from unmask.tasks.chat import Chat, ChatData

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SMALL = [
    *("model={preset: tinygsm-small, dim: 16, ff_dim: 24, num_layers: 1, num_heads: 2}", "train.compile=false"),
    *("train.dtype=float32", "train.batch_size=8", "eval.examples=4", "train.threads=1", "train.device=cpu"),
    *("data.validation_ratio=0.1", "optim.warmup_steps=1", *SHORT),
]


def talks(number: int) -> list[dict[str, Any]]:
    """Conversations of one to three turns, all different."""
    return [
        {
            "messages": [
                {"role": role, "content": f"{'Why' if role == 'user' else 'So'} {i} {turn} {'many words ' * (i % 3)}"}
                for turn in range(i % 3 + 1)
                for role in ("user", "assistant")
            ]
        }
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 conversations in rows of 128 tokens."""
    folder = tmp_path_factory.mktemp("store")
    save_tokenizer(folder / "tokenizer", byte_level())
    (folder / "tokenizer" / "chat_template.jinja").write_text(CHATML)
    rows = write_lines(folder / "rows.jsonl", talks(40))
    prepare(PrepareSettings("chat", str(folder / "tokenizer"), folder / "out", (str(rows),), 256, "drop", "used"))
    return folder / "out"


def make_task(store: Path, **settings: Any) -> Chat:
    return Chat(ChatData(path=str(store), **settings))


# --- padding ---------------------------------------------------------------------------------------------------------


def test_padding_is_learned_or_hidden_and_never_scored(store: Path) -> None:
    both = [make_task(store, padding=padding).examples_from_file(store) for padding in ("supervised", "ignored")]
    supervised, ignored = both
    eos, mask = make_task(store).tokens.eos_id, make_task(store).tokens.mask_id
    is_padding = ignored.prompt_mask & ~supervised.prompt_mask
    assert (ignored.x0[is_padding] == mask).all()
    assert (supervised.x0[is_padding] == eos).all()
    assert torch.equal(ignored.x0[~is_padding], supervised.x0[~is_padding])
    for row in range(len(ignored)):  # one end is learned, and padding is what follows it, to the last position
        (place,) = (~ignored.prompt_mask[row] & (ignored.x0[row] == eos)).nonzero().flatten().tolist()
        assert is_padding[row].nonzero().flatten().tolist() == [*range(place + 1, 256)]
    assert torch.equal(~ignored.prompt_mask, supervised.answer_mask(eos))
    assert ignored.is_known(mask)


def test_both_paddings_make_the_canvas_that_a_decoder_begins_with(store: Path) -> None:
    tasks = [make_task(store, padding=padding) for padding in ("supervised", "ignored")]
    canvases = [task.validation(1).masked(task.tokens.mask_id) for task in tasks]
    assert torch.equal(*canvases)


def test_the_train_stream_pads_as_the_examples(store: Path) -> None:
    task = make_task(store, padding="ignored")
    rows = task.train_stream(0)[torch.arange(8)]
    assert (rows.x0[:, -1] == task.tokens.mask_id).all()
    assert rows.prompt_mask[:, -1].all()


# --- examples and prompts --------------------------------------------------------------------------------------------


def test_a_file_of_conversations_gives_the_rows_of_its_store(store: Path, tmp_path: Path) -> None:
    for padding in ("supervised", "ignored"):
        task = make_task(store, padding=padding)
        found = task.examples_from_file(write_lines(tmp_path / "rows.jsonl", talks(40)))
        expected = task.examples_from_file(store)
        assert torch.equal(found.x0, expected.x0)
        assert torch.equal(found.prompt_mask, expected.prompt_mask)


def test_files_of_examples_are_checked(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"prompt": "a", "completion": "long " * 300}
    task = make_task(store)
    assert len(task.examples_from_file(write_lines(tmp_path / "a.jsonl", [long, talks(1)[0]]))) == 1
    assert "1 of 2 conversations do not fit data.length=256" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no conversation that fits"):
        task.examples_from_file(write_lines(tmp_path / "b.jsonl", [long]))
    with pytest.raises(UserError, match=r"c\.jsonl, line 2: has none of the fields"):
        task.examples_from_file(write_lines(tmp_path / "c.jsonl", [talks(1)[0], {"x": 1}]))


def test_a_message_is_asked_as_it_was_in_training(store: Path) -> None:
    task = make_task(store)
    examples = task.examples_from_file(store)
    for row, talk in enumerate(talks(3)):
        canvas = task.prompts([json.dumps({"messages": talk["messages"][:-1]})], "here")[0]
        given = int((canvas != task.tokens.mask_id).sum())
        assert torch.equal(canvas[:given], examples.x0[row, :given])
        assert not examples.prompt_mask[row, given]
    plain, alone, listed = (
        task.prompts([line], "here")
        for line in ("Why?", '{"prompt": "Why?"}', '{"prompt": [{"role": "user", "content": "Why?"}]}')
    )
    assert torch.equal(plain, alone)
    assert torch.equal(plain, listed)


WRONG = {
    '{"x": 1}': "needs `prompt`",
    '{"prompt": 3}': "message 1: `content` is 3, not text",
    json.dumps(talks(1)[0]): "ends with the assistant",
    "a <|im_end|>": "holds the special token '<|im_end|>'",
    "long " * 300: "leave no room for an answer in data.length=256",
}


@pytest.mark.parametrize("line", WRONG, ids=WRONG.values())
def test_wrong_prompts_are_named(store: Path, line: str) -> None:
    with pytest.raises(UserError, match="here, line 2: ") as error:
        make_task(store).prompts(["Why?", line], "here")
    assert WRONG[line] in str(error.value)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_an_answer_ends_with_its_turn(store: Path, end: str) -> None:
    task = make_task(store)
    canvas = task.prompts(["Why?"], "here")[0]
    tokens = canvas.clone()
    said = task.vocabulary.encode(f"So 1.{end}\nrest")
    start = int((canvas != task.tokens.mask_id).sum())
    tokens[start : start + len(said)] = torch.tensor(said)
    record = task.record(canvas, tokens)
    assert record == {"prompt": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "text": "So 1."}


def test_the_answer_is_shown_where_the_prompt_holds_end_tokens(tmp_path: Path) -> None:
    """As it does with the template of bytes, whose turns end with them."""
    rows = write_lines(tmp_path / "rows.jsonl", talks(9))
    prepare(PrepareSettings("chat", "bytes", tmp_path / "out", (str(rows),), 256, "drop"))
    task = make_task(tmp_path / "out")
    (canvas,) = task.prompts(["Why?"], "here")
    is_given = canvas != task.tokens.mask_id
    answer = [*b"Yes.", 256, *b"x" * 300][: int((~is_given).sum())]
    tokens = canvas.clone().masked_scatter(~is_given, torch.tensor(answer))
    shown = task.render(tokens, is_given, ~is_given).plain
    assert shown == "user:\nWhy?<|end|>\nassistant:\nYes."


def test_a_store_without_a_template_is_refused(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in store.iterdir():
        if file.name != "chat.json":
            (copy / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"has no chat\.json, the chat template"):
        make_task(copy).validation(1)


# --- from files to answers -------------------------------------------------------------------------------------------


def test_prepare_train_decode_evaluate_and_chat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", talks(40))
    out = tmp_path / "data"
    options = ["--tokenizer", "bytes", "--length", 256, "--too-long", "turns", "--workers", 1]
    assert run_cli("prepare", "chat", rows, *options, "--out", out) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: unmask "))
    run = tmp_path / "run"
    assert run_cli(*command.split()[2:], *SMALL, "data.padding=ignored", "--out", run) == 0
    out.rename(tmp_path / "gone")  # the run keeps what prompts need

    (answer,) = decode_prompts(run, tmp_path, ["Why?"], "--decoder", "prob,tokens_per_step=64")
    assert answer["prompt"] == "user:\nWhy?<|end|>\nassistant:\n"
    assert run_cli("eval", run, "--data", rows) == 0
    assert "NELBO" in capsys.readouterr().out

    asked: list[str] = []
    read = Chat.prompts
    monkeypatch.setattr(
        Chat, "prompts", lambda self, lines, source: (asked.extend(lines), read(self, lines, source))[1]
    )
    monkeypatch.setattr(Chat, "record", lambda *arguments: {"prompt": "", "text": "Yes."})
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\nAnd?\n/new\nWho?\n"))
    assert run_cli("chat", run, "--decoder", "prob,tokens_per_step=64") == 0
    assert capsys.readouterr().out.count("text: Yes.\n") == 3
    contents = [[each["content"] for each in json.loads(line)["messages"]] for line in asked]
    assert contents == [["Why?"], ["Why?", "Yes.", "And?"], ["Who?"]]


def test_a_trained_llama_goes_on_as_a_diffusion_model_of_conversations(tiny_llama: Path, tmp_path: Path) -> None:
    llama = trained_llama(tmp_path / "llama", tiny_llama)
    rows = write_lines(tmp_path / "rows.jsonl", talks(20))
    prepare(PrepareSettings("chat", str(llama), tmp_path / "data", (str(rows),), 128, "turns"))
    warm = [
        f"data.path={tmp_path / 'data'}",
        "data.validation_ratio=0.1",
        f"train.init={llama}",
    ]
    short = ["train.steps=2", "train.batch_size=4", "train.compile=false", "train.threads=1", "train.device=cpu"]
    log = ["eval.every=2", "eval.examples=2", "log.tensorboard=false", "optim.warmup_steps=1"]
    assert run_cli("train", "chat/block_puma", *warm, *short, *log, "--out", tmp_path / "run") == 0
    (answer,) = decode_prompts(tmp_path / "run", tmp_path, ["Tell me a story."], "--decoder", "prob,tokens_per_step=32")
    assert answer["prompt"] == " user:\nTell me a story.</s> \nassistant:\n"


def test_questions_are_asked_along_training(store: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "q.jsonl", [{"question": "Why?", "choices": ["So.", "No."], "answer": 0}] * 2)
    settings = [f"data.path={store}", *SMALL, f"eval.multiple_choice=[{file}]", "eval.choice_draws=2"]
    assert run_cli("train", "chat/uniform", *settings, "--out", tmp_path / "run") == 0
    (found,) = (row for row in lines(tmp_path / "run" / "metrics.jsonl") if "eval/nelbo" in row)
    assert found["eval/multiple_choice/q/accuracy"] in (0, 1)  # one question twice
    assert found["eval/multiple_choice/q/chance"] == 0.5


def test_gsm8k_as_conversations_of_qwen(gsm8k: Path, qwen: Path, tmp_path: Path) -> None:
    """What is learned of a problem is its answer and the end of the turn, and it is asked as it was learned."""
    (tmp_path / "chatml.jinja").write_text(CHATML)
    fields = {"prompt_field": "question", "answer_field": "answer", "template": str(tmp_path / "chatml.jinja")}
    source = gsm8k / "train.jsonl"
    asked = PrepareSettings("chat", str(qwen), tmp_path / "out", (str(source),), 512, "drop", limit=40, **fields)
    assert prepare(asked)["rows"]["kept"] == 40
    task = make_task(tmp_path / "out", padding="ignored")
    examples = task.examples_from_file(tmp_path / "out")
    problems = [json.loads(line) for line in source.read_text().splitlines()[:40]]
    for row, problem in enumerate(problems):
        learned = task.vocabulary.decode(examples.x0[row, ~examples.prompt_mask[row]].tolist())
        assert learned == f"{problem['answer']}<|im_end|><|endoftext|>"
        canvas = task.prompts([json.dumps({"prompt": problem["question"]})], "here")[0]
        assert torch.equal(canvas, examples.masked(task.tokens.mask_id)[row])
        assert task.record(canvas, examples.x0[row])["text"] == problem["answer"]
