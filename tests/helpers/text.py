"""Small tokenizers and texts, made here: no test needs a download."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from unmask.data.prepare import PrepareSettings
from unmask.data.words import PATTERNS

QUESTIONS = [
    "How many apples are left?",
    "Ann has 3 pens and buys 4 more.\n\nHow many pens has she now?",
    "It's 7 o'clock;   what's the time in 12 hours?",
    "Zoë pays 5 € for tea – how much is left of 20 €?",
    "A tab\there,\r\nand trailing space, is odd.",
]


def rows(number: int) -> list[dict[str, Any]]:
    """Questions and programs of different lengths, all different."""
    return [
        {
            "question": f"{QUESTIONS[i % len(QUESTIONS)]} ({i})",
            "code": "def solve():\n" + "".join(f"    x{j} = {i} + {j}\n" for j in range(i % 7)) + f"    return {i}",
        }
        for i in range(number)
    ]


def byte_level(pattern: str | None = PATTERNS[1], texts: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE of some hundred ids with Qwen's special tokens; `pattern`: None for GPT-2's own cut."""
    tokenizer = Tokenizer(models.BPE())
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts or [text for row in rows(40) for text in row.values()], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    return tokenizer


def word_piece(unknown: str | None = "[UNK]") -> Tokenizer:
    vocab = {word: i for i, word in enumerate(["[UNK]", "[SEP]", "how", "many", "?", "return", "1"])}
    model = models.WordPiece(vocab, unk_token="[UNK]") if unknown else models.WordLevel(vocab, unk_token="none")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer | None = None, eos: object = "<|endoftext|>") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({} if eos is None else {"eos_token": eos}))
    return folder


def write_lines(path: Path, contents: Sequence[object]) -> Path:
    """JSON lines; a str or bytes stands for itself. Gzipped where the name says so."""
    encoded = [c if isinstance(c, bytes) else (c if isinstance(c, str) else json.dumps(c)).encode() for c in contents]
    content = b"".join(line + b"\n" for line in encoded)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def settings(tmp_path: Path, out: str = "out", **changed: Any) -> PrepareSettings:
    """A preparation of 50 rows in batches of 8."""
    if not (tmp_path / "tokenizer").exists():
        save_tokenizer(tmp_path / "tokenizer")
    if not (tmp_path / "rows.jsonl").exists():
        write_lines(tmp_path / "rows.jsonl", rows(50))
    base = {"tokenizer": str(tmp_path / "tokenizer"), "sources": (str(tmp_path / "rows.jsonl"),), "length": 128}
    return PrepareSettings("tinygsm", out=tmp_path / out, **(base | {"batch_rows": 8} | changed))
