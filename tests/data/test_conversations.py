"""Conversations: every form of a row gives the same tokens, and what is learned is what the assistant says."""

import json
import pickle
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.conversations import ASKED, CHATML, LONG, MARKED, PAIR, SAID, encoder, settings
from unmask.data.chat_template import PLAIN_SOURCE, ChatTemplate
from unmask.data.conversations import FieldNames, read_conversation
from unmask.data.prepare import prepare
from unmask.data.prepare.conversations import find_template, make_shard
from unmask.data.prepare.sources import Row
from unmask.data.store import RowStore
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError

FORGETS = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last %}{{- 'So: ' }}{% endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\nSo: ' }}{% endif %}
"""
"""As templates that drop the thoughts of earlier turns."""

FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": PAIR},
    "texts": {"prompt": ASKED, "completion": SAID},
    "lists": {"prompt": PAIR[:1], "completion": PAIR[1:]},
    "alpaca": {"instruction": "How many are", "input": "left?", "output": SAID},
    "alpaca without input": {"instruction": ASKED, "input": "", "output": SAID},
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
    "sharegpt in roles": {"conversations": PAIR},
    "with other fields": {"id": 3, "messages": [each | {"weight": None, "tool_calls": []} for each in PAIR]},
}


def stored(folder: Path) -> list[str]:
    """What is learned of each row, without its padding, turns divided by |."""
    store = RowStore(folder)
    batch, vocabulary = store[torch.arange(len(store))], store.vocabulary
    assert vocabulary is not None
    found = []
    for x0, is_given in zip(batch.x0.tolist(), batch.prompt_mask.tolist(), strict=True):
        runs = groupby(zip(x0, is_given, strict=True), key=lambda pair: pair[1])
        turns = [vocabulary.decode([i for i, _ in run]) for is_prompt, run in runs if not is_prompt]
        found.append("|".join(turns).split("<|endoftext|>")[0])
    return found


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_form_is_the_same_conversation(row: dict[str, Any]) -> None:
    assert read_conversation(row) == PAIR


def test_every_form_and_kind_of_file_gives_the_same_tokens(tmp_path: Path) -> None:
    prepare(settings(tmp_path, [{"messages": PAIR}] * len(FORMS), "expected"))
    prepare(settings(tmp_path, [*FORMS.values()], "found"))
    for name in ("labels.bin", "prompt_mask.bin"):
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number, form in enumerate(FORMS.values()):
        parquet.write_table(pyarrow.Table.from_pylist([form]), tmp_path / f"{number}.parquet")
    files = tuple(str(tmp_path / f"{number}.parquet") for number in range(len(FORMS)))
    prepare(replace(settings(tmp_path, [], "parquet"), sources=files))
    assert (tmp_path / "parquet" / "labels.bin").read_bytes() == (tmp_path / "expected" / "labels.bin").read_bytes()


def test_a_system_message_may_stand_beside() -> None:
    said = read_conversation({"system": "Be short.", "prompt": ASKED, "completion": SAID})
    assert said == [{"role": "system", "content": "Be short."}, *PAIR]


def test_other_fields() -> None:
    assert read_conversation({"q": ASKED, "a": SAID}, FieldNames(prompt="q", answer="a")) == PAIR
    assert read_conversation({"talk": PAIR, "messages": 3}, FieldNames(messages="talk")) == PAIR


BAD: dict[str, tuple[Any, str]] = {
    "nothing known": (
        {"text": "Hello"},
        "has none of the fields `messages`, `conversations`, `prompt` and `completion`",
    ),
    "no list": ({"messages": "Hello"}, "field 'messages' is 'Hello', not a list of messages"),
    "empty list": ({"messages": []}, "field 'messages' is [], not a list of messages"),
    "no object": ({"messages": ["Hello"]}, "message 1 is 'Hello', not an object"),
    "no role": ({"messages": [{"content": "Hello"}]}, "message 1 has no `role`, but 'content'"),
    "unknown role": (
        {"messages": [{"role": "boss", "content": "Hello"}]},
        "message 1 has the role 'boss'; known: system",
    ),
    "role of another type": ({"messages": [{"role": 3, "content": "Hello"}]}, "message 1 has the role 3"),
    "unknown speaker": ({"conversations": [{"from": "cat", "value": "x"}]}, "message 1 has the from 'cat'"),
    "no text": (
        {"messages": [PAIR[0], {"role": "assistant", "content": None}]},
        "message 2: `content` is None, not text",
    ),
    "parts": ({"messages": [{"role": "user", "content": [1]}]}, "message 1: `content` is [1], not text"),
    "empty": ({"messages": [PAIR[0], {"role": "assistant", "content": " \n"}]}, "message 2: `content` is empty"),
    "empty answer": ({"prompt": ASKED, "completion": ""}, "field 'completion' is empty"),
    "no answer": ({"messages": PAIR[:1]}, "has no message of the role 'assistant'"),
    "tools": ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "message 1 calls tools"),
    "history": ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "has a `history`"),
    "huge": ({"messages": PAIR * 600}, "has 1200 messages, more than 1000"),
    "end token": (
        {"prompt": "a<|im_end|>", "completion": "b"},
        "message 1 holds the special token '<|im_end|>' as text",
    ),
    "no JSON": ("{", "not JSON"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_bad_rows_are_named_or_counted(row: Any, message: str, tmp_path: Path) -> None:
    rows = [{"messages": PAIR}, row, {"messages": PAIR}]
    with pytest.raises(UserError, match=r"out\.jsonl, line 2: ") as error:
        prepare(settings(tmp_path, rows))
    assert message in str(error.value)
    meta = prepare(settings(tmp_path, rows, skip_bad=True))
    assert (meta["rows"]["kept"], meta["rows"]["bad"]) == (2, 1)
    listed = json.loads((tmp_path / "out" / "bad_rows.jsonl").read_text())
    assert message in listed["problem"]


# --- what is learned -------------------------------------------------------------------------------------------------


def test_marks_and_prefixes_tell_the_same() -> None:
    for turns in ("all", "last"):
        for messages in (PAIR, LONG):
            marked, found = (encoder(source, turns).encode(messages) for source in (MARKED, CHATML))
            assert marked == found
            assert len(found.turns) == (2 if turns == "all" and messages is LONG else 1)


def test_each_turn_is_learned_with_its_end_and_nothing_follows_the_last() -> None:
    own = encoder(CHATML)
    found = own.encode(LONG)
    decoded = [own.vocabulary.decode(found.ids[start:end]) for start, end in found.turns]
    assert decoded == [f"{SAID}<|im_end|>", "Yes: 7.<|im_end|>"]
    assert found.turns[-1][1] == len(found.ids)
    assert own.vocabulary.decode(found.ids) == ChatTemplate(CHATML).render(LONG[:-1]).text.rstrip()


def test_a_prompt_has_the_tokens_that_it_had_in_training() -> None:
    for source in (CHATML, MARKED, PLAIN_SOURCE):
        own = encoder(source)
        found = own.encode(LONG)
        for number, (start, _) in zip((2, 4), found.turns, strict=True):
            assert own.encode_prompt(LONG[:number]) == found.ids[:start]


@pytest.mark.parametrize("name", ["bytes", None])
def test_the_plain_template_ends_turns_with_the_end_token(name: str | None) -> None:
    own = encoder(PLAIN_SOURCE, name=name)
    found = own.encode(LONG)
    eos = own.vocabulary.eos_id
    assert found.ids.count(eos) == 5
    assert all(found.ids[end - 1] == eos for _, end in found.turns)
    assert own.end_ids == {eos}


def test_the_end_of_a_turn_is_found() -> None:
    own = encoder(CHATML)
    assert {own.vocabulary.name(i) for i in own.end_ids} == {"<|endoftext|>", "<|im_end|>"}


def test_a_template_that_forgets_is_refused_with_the_row_or_learned_by_its_last_turn(tmp_path: Path) -> None:
    (tmp_path / "forgets.jinja").write_text(FORGETS)
    rows = [{"messages": PAIR}, {"messages": LONG}]
    asked = {"template": str(tmp_path / "forgets.jinja")}
    with pytest.raises(UserError) as error:
        prepare(settings(tmp_path, rows, **asked))
    for part in ("out.jsonl, line 2: message 3", "So: 4 + 3", "--turns last"):
        assert part in str(error.value)
    prepare(settings(tmp_path, rows, "last", turns="last", **asked))
    assert stored(tmp_path / "last") == [f"{SAID}<|im_end|>", "Yes: 7.<|im_end|>"]


def test_an_answer_that_does_not_continue_its_prompt_is_refused() -> None:
    source = CHATML.replace("<|im_start|>assistant\\n' }}{% endif", "<|im_start|>model\\n' }}{% endif")
    with pytest.raises(
        ValueError, match=r"message 2: the text that it is asked with .*assistant.* in place of .*model"
    ):
        encoder(source).encode(PAIR)


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_what_is_too_long_meets_the_stated_fate(tmp_path: Path) -> None:
    """The second turn does not fit, or nothing of it, or not the prompt."""
    own = encoder(CHATML)
    whole, first = own.encode(LONG), own.encode(LONG).turns[0]
    fits, cut = -(-(len(whole.ids) + 1) // 8) * 8, (whole.turns[1][0] // 8 + 1) * 8
    between, short = first[1] // 8 * 8 + 8, first[0] // 8 * 8
    assert whole.turns[1][0] < cut < len(whole.ids)
    assert first[1] < between <= whole.turns[1][0]
    expected = {
        (fits, "truncate"): {"kept": 1},
        (cut, "truncate"): {"kept": 1, "truncated": 1},
        (cut, "turns"): {"kept": 1, "shortened": 1},
        (cut, "drop"): {"dropped_too_long": 1},
        (between, "truncate"): {"kept": 1, "shortened": 1},
        (short, "turns"): {"dropped_no_room": 1},
    }
    for (length, too_long), fate in expected.items():
        out = f"{length}{too_long}"
        rows = [{"messages": LONG}, {"prompt": "a", "completion": "b"}]
        meta = prepare(settings(tmp_path, rows, out, length=length, too_long=too_long))
        counts = {key: value for key, value in meta["rows"].items() if value and key != "read"}
        counts["kept"] -= 1
        assert {key: value for key, value in counts.items() if value} == fate
        said = stored(tmp_path / out)[0]
        if "truncated" in fate:
            assert said.startswith(f"{SAID}<|im_end|>|Y")
            assert not said.endswith("<|im_end|>")
        if "shortened" in fate:
            assert said == f"{SAID}<|im_end|>"


def test_a_worker_makes_the_same_shard(tmp_path: Path) -> None:
    """A process is given the settings, and the template within them, as bytes."""
    asked = settings(tmp_path, [])
    vocabulary = Vocabulary.from_source(asked.tokenizer)
    rows = [Row("here", number, {"messages": each}) for number, each in enumerate((PAIR, LONG))]
    shards = [make_shard(rows, vocabulary, replace(asked, template=find_template(asked, vocabulary)))]
    sent = pickle.loads(pickle.dumps(replace(asked, template=find_template(asked, vocabulary))))
    (tmp_path / "chatml.jinja").unlink()
    shards.append(make_shard(rows, vocabulary, sent))
    for name in ("ids", "num_tokens", "num_prompt", "is_given"):
        assert (getattr(shards[0], name) == getattr(shards[1], name)).all()
