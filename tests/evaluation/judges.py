"""Small causal models in folders such as Hugging Face's, to score text with."""

import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from tests.helpers.text import byte_level

CONTEXT = 48


def random_llama(folder: Path, tokenizer: Tokenizer | None = None, start: str | None = "<|im_start|>") -> Path:
    """A random Llama, whose every token depends on those before it, and its tokenizer: ours of bytes unless given."""
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer or byte_level()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.5, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return with_tokenizer(folder, tokenizer, {} if start is None else {"bos_token": start})


def trained_llama(folder: Path, source: Path) -> Path:
    """The trained Llama of `source`, its tokenizer made of llama2.c's: pieces in the order of their ids are merges."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / "hf" / name, folder / name)
    pieces = [piece.decode().replace(" ", "▁") for piece in _pieces((source / "tok512.bin").read_bytes())[259:]]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [
        (name[:k], name[k:]) for name in pieces for k in range(1, len(name)) if {name[:k], name[k:]} <= vocab.keys()
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names[:3]])
    return with_tokenizer(folder, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def with_tokenizer(folder: Path, tokenizer: Tokenizer, tokens: dict[str, str]) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _pieces(content: bytes) -> list[bytes]:
    found, at = [], 4
    while at < len(content):
        _, size = struct.unpack_from("fi", content, at)
        found.append(content[at + 8 : at + 8 + size])
        at += 8 + size
    return found


class Uniform:
    """A causal model that finds all of 8 tokens equally likely, but for the first `known`, which it is sure of."""

    config = SimpleNamespace(max_position_embeddings=None, bos_token_id=None, eos_token_id=None)
    device = torch.device("cpu")

    def __call__(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 8))

    def get_input_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=torch.zeros(8, 1))


class Letters:
    """A tokenizer of a, b, .. h; what it does not know is h."""

    bos_token_id, eos_token_id, unk_token_id = 0, None, 7

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return ["abcdefg".find(letter) % 8 for letter in text]
