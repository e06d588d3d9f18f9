"""Weights of Hugging Face's Llama and Qwen checkpoints: equal logits, the vocabulary's rows, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import unmask
from tests.helpers import SHORT, run_cli
from tests.parity import hf_folders
from tests.parity.hf_folders import ROWS, SIZES
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.errors import UserError
from unmask.models.build import build_denoiser
from unmask.models.denoiser import Denoiser
from unmask.models.hf import is_checkpoint, read_model_settings
from unmask.models.hf_weights import read_weights
from unmask.models.transformer_config import TransformerConfig
from unmask.types import TokenSpec

CAUSAL = {"causal": True, "alignment": "next"}
MODELS = {
    "llama": ("LlamaForCausalLM", {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}),
    "llama, one head for all": ("LlamaForCausalLM", {"num_key_value_heads": 1, "rope_theta": 500_000.0}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3, untied": ("Qwen3ForCausalLM", {"head_dim": 8, "num_key_value_heads": 4}),
}


def theirs(kind: str, **changes: object) -> Any:
    """A random model of transformers."""
    transformers = pytest.importorskip("transformers")
    name, settings = MODELS[kind]
    model_class = getattr(transformers, name)
    config = model_class.config_class(**{**SIZES, **settings, **changes})
    return hf_folders.random_model(model_class, config)


def saved(folder: Path, kind: str = "qwen2", *, shards: bool = False, **changes: object) -> Path:
    theirs(kind, **changes).save_pretrained(folder, **({"max_shard_size": "20KB"} if shards else {}))
    return folder


def ours(folder: Path, **settings: object) -> Denoiser:
    """The native model of a checkpoint, the mask token added to its vocabulary."""
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = TransformerConfig(**(read_model_settings(folder) | settings))
    model = build_denoiser(config, TokenSpec(vocab_size=rows + 1, length=128, mask_id=rows)).eval()
    model.load_state_dict(read_weights(folder, original_ids=None, vocab_size=rows + 1))
    return model


def our_logits(model: Denoiser, ids: Tensor) -> Tensor:
    """(B, L) -> (B, L, R), the mask token's, which is last, left out."""
    return model.logits(ids, torch.arange(ids.numel())).unflatten(0, ids.shape)[..., :-1]


def assert_equal_logits(folder: Path, their_model: Any, rows: int) -> None:
    """Sums of fp32 products in another order: a few rounding steps, 6e-8, of sums of 50 values of size 1."""
    ids = torch.randint(rows, (3, 17), generator=torch.Generator().manual_seed(1))
    everywhere = torch.zeros(3, 1, 17, 17)  # added to the scores: nothing is hidden
    with torch.no_grad():
        found, expected = our_logits(ours(folder), ids), their_model(ids, attention_mask=everywhere).logits
    assert expected.std() > 0.3
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Which is asked to attend to all positions, as we do."""
    model = theirs(kind)
    model.save_pretrained(tmp_path)
    assert_equal_logits(tmp_path, model, ROWS)


def next_logits(model: Denoiser, ids: Tensor) -> Tensor:
    """(B, L) -> (B, L - 1, R): of every position but the first, read at the one before."""
    at = torch.arange(ids.numel()).view(ids.shape)[:, 1:]
    return model.logits(ids, at.flatten()).unflatten(0, at.shape)[..., :-1]


@pytest.mark.parametrize("kind", MODELS)
def test_causal_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = theirs(kind)
    model.save_pretrained(tmp_path)
    ids = torch.randint(ROWS, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = next_logits(ours(tmp_path, **CAUSAL), ids), model(ids).logits[:, :-1]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)  # as above


@pytest.mark.parametrize("kind", MODELS)
def test_rows_in_bfloat16_arrive_in_fp32(kind: str, tmp_path: Path) -> None:
    model = theirs(kind).bfloat16()
    model.save_pretrained(tmp_path)
    weights = read_weights(tmp_path, original_ids=None, vocab_size=ROWS)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert torch.equal(weights["backbone.norm.weight"], model.model.norm.weight.float())


def test_a_trained_llama(tiny_llama: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tiny_llama / "hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert_equal_logits(folder, model, 512)


def test_a_trained_llama_goes_on_as_its_reference_does(tiny_llama: Path) -> None:
    ids = torch.tensor([json.loads((tiny_llama / "reference_greedy.json").read_text())["greedy_ids"]])
    model = ours(tiny_llama / "hf", **CAUSAL)
    assert torch.equal(next_logits(model, ids).argmax(-1), ids[:, 1:])
    prompt = torch.where(torch.arange(ids.shape[1]) < 3, ids, model.mask_id)
    tokens = TokenSpec(vocab_size=model.mask_id + 1, length=ids.shape[1], mask_id=model.mask_id)
    decoder = build_decoder(DecodeConfig(order="left_to_right"), model, tokens)
    assert torch.equal(decoder.decode(prompt).tokens, ids)


# --- the vocabulary --------------------------------------------------------------------------------------------------

MATRICES = {"backbone.embedding.weight": "model.embed_tokens.weight", "backbone.head.weight": "lm_head.weight"}


@pytest.mark.parametrize(
    ("original_ids", "rows"),
    [
        (None, [*range(ROWS)]),
        (None, [0, 1, 2]),
        (None, [*range(ROWS), None]),
        ([7, 49, None, 0, 7], [7, 49, None, 0, 7]),
        ([*range(ROWS), None, None], [*range(ROWS), None, None]),
        ([0, ROWS, None, ROWS + 6], [0, None, None, None]),
        (None, [*range(ROWS), None, None]),
    ],
    ids=["all", "the padding dropped", "and a mask", "chosen", "two new ones", "behind the rows", "two behind them"],
)
def test_the_rows_of_the_vocabulary(original_ids: list | None, rows: list, tmp_path: Path) -> None:
    """Of embedding and head alike; a new token's is the mean."""
    folder = saved(tmp_path, "llama")
    given = load_file(folder / "model.safetensors")
    weights = read_weights(folder, original_ids=original_ids, vocab_size=len(rows))
    for our_name, their_name in MATRICES.items():
        matrix = given[their_name]
        expected = [matrix.mean(0) if row is None else matrix[row] for row in rows]
        assert torch.equal(weights[our_name], torch.stack(expected))


@pytest.mark.parametrize(
    ("original_ids", "vocab_size", "message"),
    [
        (None, ROWS + 20, r"model.safetensors: has 50 tokens, and none for 20 of this run's 70 .token 50 stands for"),
        ([0, *range(ROWS, ROWS + 17)], 18, r"token 1 stands for its 50.; prepare the data with the checkpoint's"),
        ([0, -1], 2, "token 1 stands for its -1"),
        ([0, 1, None], 4, "3 original ids for 4 tokens; give one for each"),
    ],
)
def test_tokens_that_a_checkpoint_does_not_have(
    original_ids: list | None, vocab_size: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_weights(saved(tmp_path), original_ids=original_ids, vocab_size=vocab_size)


# --- files -----------------------------------------------------------------------------------------------------------


def all_weights(folder: Path) -> dict[str, Tensor]:
    return read_weights(folder, original_ids=None, vocab_size=ROWS)


def test_several_files_are_one(tmp_path: Path) -> None:
    whole = all_weights(saved(tmp_path / "whole"))
    folder = saved(tmp_path / "parts", shards=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    parts = all_weights(folder)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_what_transformers_does_not_read_is_not_read(tmp_path: Path) -> None:
    """The copy of a tied head, and the angles in checkpoints of old."""
    folder = saved(tmp_path)
    before = all_weights(folder)
    angles = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}
    change_weights(folder, **angles, **{"lm_head.weight": torch.ones(ROWS, 32)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in all_weights(folder).items())


def change_weights(folder: Path, **changes: Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None}, "model.safetensors: lacks model.norm.weight; download"),
        ({"model.extra": torch.ones(2)}, "model.safetensors: model.extra is not part of the model in config.json"),
        ({UP: torch.ones(47, 32)}, rf"safetensors: {UP} has shape \(47, 32\), its config.json says \(48, 32\)"),
        ({"model.embed_tokens.weight": torch.ones(60, 32)}, r"\(60, 32\), its config.json says \(50, 32\)"),
    ],
)
def test_wrong_tensors(changes: dict, message: str, tmp_path: Path) -> None:
    change_weights(saved(tmp_path), **changes)
    with pytest.raises(UserError, match=message):
        all_weights(tmp_path)


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    change_weights(saved(tmp_path, "llama"), **{"lm_head.weight": None})
    with pytest.raises(UserError, match=r"lacks lm_head.weight"):
        all_weights(tmp_path)


@pytest.mark.parametrize("length", [0, 5, 1000])
def test_a_truncated_file(length: int, tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match=f"{file}: damaged: .*; download it again"):
        all_weights(tmp_path)


def test_an_absent_file(tmp_path: Path) -> None:
    (saved(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors: is missing; download it, or save"):
        all_weights(tmp_path)


def test_an_absent_part(tmp_path: Path) -> None:
    part = min(saved(tmp_path, shards=True).glob("*-of-*.safetensors"))
    part.unlink()
    with pytest.raises(UserError, match=f"{part}: is missing"):
        all_weights(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "index.json: cannot be read"),
        ("[]", "index.json: holds no JSON object"),
        ('{"weight_map": 3}', "index.json: has no weight_map of file names"),
        ('{"weight_map": {"a": 3}}', "index.json: has no weight_map of file names"),
        (
            '{"weight_map": {"a": "../model.safetensors"}}',
            "index.json: weight_map names .*no safetensors file beside it",
        ),
        ('{"weight_map": {"a": "/etc/hostname"}}', "index.json: weight_map names .*no safetensors file beside it"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "index.json: weight_map names .*no safetensors file beside it"),
        ("[" * 99_999, "index.json: cannot be read: is nested too deeply"),
        (f'{{"weight_map": {{"a": "{"a" * 300}.safetensors"}}}}', "weight_map names .*no safetensors file beside it"),
        ('{"weight_map": {}}', "index.json: lacks model.embed_tokens.weight"),
    ],
)
def test_a_damaged_index(text: str, message: str, tmp_path: Path) -> None:
    (saved(tmp_path, shards=True) / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=message):
        all_weights(tmp_path)


def test_an_export_is_not_one_of_theirs(tmp_path: Path) -> None:
    assert is_checkpoint(saved(tmp_path / "theirs"))
    assert is_checkpoint(saved(tmp_path / "parts", shards=True))
    run_cli("train", "debug", *SHORT, "--out", tmp_path / "run")
    unmask.export(tmp_path / "run", tmp_path / "export")
    for folder in ("export", "run", "nowhere"):
        assert not is_checkpoint(tmp_path / folder)
