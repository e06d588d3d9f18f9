"""Chat templates: those of tokenizers, rendered as transformers does; those of strangers, in a sandbox."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from tests.helpers.conversations import CHATML, LONG, MARKED, PAIR, SAID, encoder, settings, tokenizer
from tests.helpers.text import save_tokenizer
from unmask.data.chat_template import PLAIN_SOURCE, ChatTemplate
from unmask.data.conversations import ConversationEncoder
from unmask.data.prepare import prepare
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError


def test_the_tokenizers_own_template_is_taken(tmp_path: Path) -> None:
    expected = prepare(settings(tmp_path, [{"messages": LONG}], "given"))
    folder = save_tokenizer(tmp_path / "own", tokenizer())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    for number, template in enumerate((CHATML, several, None)):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        if template is None:
            (folder / "chat_template.jinja").write_text(CHATML)
        out = f"own{number}"
        found = prepare(settings(tmp_path, [{"messages": LONG}], out, tokenizer=str(folder), template=None))
        assert found["sha256"] == expected["sha256"]
        assert ChatTemplate.load(tmp_path / out).source == CHATML


def test_rendering_is_that_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token="<|endoftext|>")
    for source in (
        CHATML,
        MARKED,
        PLAIN_SOURCE,
        "{% set n = namespace(x=1) %}{{ n.x }}{{ messages | tojson }}{{ eos_token }}",
    ):
        ours = ChatTemplate(source, {"eos_token": "<|endoftext|>"})
        for asks in (False, True):
            text = made.apply_chat_template(LONG, chat_template=source, tokenize=False, add_generation_prompt=asks)
            assert ours.render(LONG, asks=asks).text == text
    own = encoder(MARKED)
    theirs = made.apply_chat_template(
        LONG, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    found = own.encode(LONG)
    size = len(found.ids)
    assert theirs["input_ids"][:size] == found.ids
    is_learned = [any(start <= place < end for start, end in found.turns) for place in range(size)]
    assert theirs["assistant_masks"] == [int(each) for each in is_learned] + [0] * (len(theirs["input_ids"]) - size)


INST = """\
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}
    {%- else %}{{- ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""


def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_within_one() -> None:
    transformers = pytest.importorskip("transformers")
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "S", "▁S"]
    merges = [("▁", "a"), ("▁", "S")]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken("</s>", normalized=False)])
    own = ConversationEncoder(Vocabulary(made, 1), ChatTemplate(INST, {"eos_token": "</s>"}))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    expected = theirs.apply_chat_template(LONG[1:-1], chat_template=INST, tokenize=True, return_dict=True)
    found = own.encode(LONG[1:-1])
    assert found.ids == expected["input_ids"]
    assert [own.vocabulary.decode(found.ids[start:end]) for start, end in found.turns] == [
        f" {SAID}</s>",
        " Yes: 7.</s>",
    ]
    assert own.encode_prompt(LONG[1:2]) == found.ids[: found.turns[0][0]]


ATTACKS = {
    "classes": "{{ messages.__class__.__mro__ }}",
    "a function's globals": "{{ raise_exception.__globals__['__builtins__'] }}",
    "changing messages": "{{ messages.append(1) }}",
    "changing a message": "{{ messages[0].update(role='x') }}",
    "a namespace's class": "{% set n = namespace(_x=1) %}{{ n._x }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "an import": "{% include '/etc/passwd' %}",
    "its own error": "{{ raise_exception('roles must alternate') }}",
    "a fault": "{{ messages[7].content + 1 }}",
}


@pytest.mark.parametrize("source", ATTACKS.values(), ids=ATTACKS)
def test_a_strangers_template_does_no_harm(source: str) -> None:
    messages = [dict(message) for message in PAIR]
    with pytest.raises(ValueError, match="the chat template refuses it: "):
        ChatTemplate(source).render(messages)
    assert messages == PAIR


def test_what_is_no_template_is_refused_before_any_row_is_read(tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("{% for message in messages %}")
    for template, message in ((str(tmp_path / "bad.jinja"), "is no Jinja"), ("missing.jinja", "no such file")):
        with pytest.raises(UserError, match=message) as error:
            prepare(settings(tmp_path, [{"messages": PAIR}], template=template))
        assert f"--template {template}" in str(error.value)


def test_options_of_a_template(tmp_path: Path) -> None:
    source = CHATML.replace("{%- for", "{%- if is_polite %}{{- 'Please. ' }}{% endif %}{%- for")
    assert ChatTemplate(source, options={"is_polite": True}).render(PAIR).text.startswith("Please. <|im_start|>user")
    assert ChatTemplate(source).render(PAIR).text.startswith("<|im_start|>user")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sources": ()}, "chat: name the conversations"),
        ({"separator": "x"}, "--separator x: chat has none"),
        ({"turns": "first"}, "--turns first: use all or last"),
        ({"messages_field": "a", "prompt_field": "b"}, "--messages-field: is the whole conversation"),
        ({"sources": ("notes.md",)}, "text has no messages"),
    ],
)
def test_wrong_options_are_named(
    changed: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("Hello")
    asked = settings(tmp_path, [{"messages": PAIR}])
    with pytest.raises(UserError, match=message):
        prepare(replace(asked, **changed))
