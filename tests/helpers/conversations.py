"""Conversations, templates that write them, and a preparation of them."""

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tests.helpers.text import byte_level, save_tokenizer, write_lines
from unmask.data.chat_template import ChatTemplate
from unmask.data.conversations import ConversationEncoder
from unmask.data.prepare import PrepareSettings
from unmask.data.vocabulary import Vocabulary

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
MARKED = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

ASKED, SAID = "How many are\nleft?", "4 + 3 = 7, so *7*."
PAIR = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
LONG = [
    {"role": "system", "content": "Be short."},
    *PAIR,
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes: 7."},
    {"role": "user", "content": "Thanks"},
]


@cache
def tokenizer() -> Tokenizer:
    return byte_level()


def encoder(source: str, turns: str = "all", name: str | None = None) -> ConversationEncoder:
    made = tokenizer()
    vocabulary = Vocabulary.from_source(name) if name else Vocabulary(made, made.token_to_id("<|endoftext|>"))
    eos = vocabulary.name(vocabulary.eos_id)
    return ConversationEncoder(vocabulary, ChatTemplate(source, {"eos_token": eos}, turns=turns))  # type: ignore[arg-type]


def settings(tmp_path: Path, rows: list[Any], out: str = "out", **changed: Any) -> PrepareSettings:
    if not (tmp_path / "tokenizer").exists():
        save_tokenizer(tmp_path / "tokenizer", tokenizer())
    (tmp_path / "chatml.jinja").write_text(CHATML)
    source = write_lines(tmp_path / f"{out}.jsonl", rows)
    base = {"tokenizer": str(tmp_path / "tokenizer"), "template": str(tmp_path / "chatml.jinja"), "length": 128}
    return PrepareSettings("chat", out=tmp_path / out, sources=(str(source),), **(base | changed))
