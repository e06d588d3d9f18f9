"""Checkpoints of every family: logits of an independent implementation, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from tests.parity.hf_folders import KINDS, MASK, ROWS, reference_logits, write
from unmask.errors import UserError
from unmask.models.build import build_denoiser
from unmask.models.families import FAMILIES, REFUSED
from unmask.models.hf import check_settings, read_checkpoint
from unmask.models.hf_weights import read_weights
from unmask.models.transformer_config import TransformerConfig
from unmask.training.hf_tokens import with_own_mask
from unmask.types import TokenSpec

IDS = torch.randint(ROWS, (2, 16), generator=torch.Generator().manual_seed(1))


def test_every_family_is_tried() -> None:
    assert {name.partition(",")[0] for name in KINDS} == set(FAMILIES)


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Its classes are given the family's attention as a mask. Sums of fp32 in another order: rounding of 1e-6."""
    folder, kind = write(tmp_path, name), KINDS[name]
    found = read_checkpoint(folder)
    assert (found.num_rows, found.block_size, found.alignment) == (ROWS, kind.block_size, kind.alignment)
    settings = found.settings | {"block_size": found.block_size, "alignment": found.alignment}
    model = build_denoiser(TransformerConfig(**settings), TokenSpec(vocab_size=ROWS, length=16, mask_id=MASK)).eval()
    model.load_state_dict(read_weights(folder, original_ids=None, vocab_size=ROWS))
    start = int(kind.alignment == "next")
    at = torch.arange(IDS.numel()).view(IDS.shape)[:, start:]
    with torch.no_grad():
        ours = model.logits(IDS, at.flatten()).unflatten(0, at.shape)
    expected = reference_logits(name, IDS)[:, start:]
    known = torch.arange(ROWS) != MASK  # whose probability is 0 in ours
    assert expected.std() > 0.3
    assert torch.allclose(ours[..., known], expected[..., known], rtol=1e-5, atol=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED_KEYS = [
    ("llada", "block_type", "sequential"),
    ("llada", "block_group_size", 4),
    ("llada", "layer_norm_type", "low_precision"),
    ("llada", "rope", False),
    ("llada", "alibi", True),
    ("llada", "attention_layer_norm", True),
    ("llada", "input_emb_norm", True),
    ("llada", "scale_logits", True),
    ("llada", "include_bias", True),
    ("llada", "include_qkv_bias", True),
    ("llada", "bias_for_layer_norm", True),
    ("llada", "activation_type", "swiglu"),
    ("sdar", "num_experts", 8),
    ("Dream", "num_local_experts", 8),
    ("a2d-qwen3", "n_routed_experts", 8),
    ("Dream", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("sdar", "partial_rotary_factor", 0.5),
    ("Fast_dLLM_Qwen", "quantization_config", {"bits": 4}),
    ("a2d-llama", "attention_bias", True),
]


@pytest.mark.parametrize(("name", "key", "value"), REFUSED_KEYS, ids=lambda value: str(value)[:20])
def test_what_our_transformer_is_not(name: str, key: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**KINDS[name].config, key: value}))
    with pytest.raises(UserError) as caught:
        read_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {key}={value!r} is not supported; ")


def test_every_key_that_a_family_guards_is_tried() -> None:
    guarded = {(family.model_type, key) for family in FAMILIES.values() for key in family.only}
    assert guarded <= {(name, key) for name, key, _ in REFUSED_KEYS}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_architectures_are_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**KINDS["llama"].config, "model_type": kind}))
    with pytest.raises(UserError, match=f"model_type='{kind}' is an? .*; use a checkpoint of llama"):
        read_checkpoint(tmp_path)


def test_a_missing_size_has_the_familys_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**KINDS["llada"].config, "mlp_hidden_size": None}))
    with pytest.raises(UserError, match=r"config.json: mlp_hidden_size: is missing"):
        read_checkpoint(tmp_path)


def test_a_fused_layout(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = write(tmp_path, "llada") / "model.safetensors"
    save_file({**load_file(file), "model.transformer.blocks.0.att_proj.weight": torch.ones(96, 32)}, file)
    with pytest.raises(UserError, match=r"blocks.0.att_proj.weight is of a fused layout"):
        read_weights(tmp_path, original_ids=None, vocab_size=ROWS)


# --- starting from one -----------------------------------------------------------------------------------------------


def test_the_alignment_is_the_checkpoints(tmp_path: Path) -> None:
    settings = read_checkpoint(write(tmp_path, "Dream")).settings
    with pytest.raises(UserError, match=r"model.alignment='same', the checkpoint has 'next'; set it so"):
        check_settings(tmp_path, TransformerConfig(**(settings | {"alignment": "same"})))


TOKENS = TokenSpec(vocab_size=4, length=8, mask_id=3)


def test_a_new_mask_is_the_one_that_the_checkpoint_was_trained_with(tmp_path: Path) -> None:
    sdar = read_checkpoint(write(tmp_path / "sdar", "sdar"))
    llama = read_checkpoint(write(tmp_path / "llama", "llama", mask_token_id=None, is_causal=None))
    assert with_own_mask(sdar, [7, 8, 9, None], TOKENS) == [7, 8, 9, MASK]
    assert with_own_mask(sdar, [7, 8, 9, MASK], TOKENS) == [7, 8, 9, MASK]
    assert with_own_mask(llama, [7, 8, 9, None], TOKENS) == [7, 8, 9, None]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            [7, 8, 9, 10],
            f"its mask is {MASK} .from config.json., that of the data is its token 10; prepare the data with",
        ),
        (None, f"its mask is {MASK} .from config.json., that of the data is its token 3"),
        ([7, MASK, 9, None], f"its mask, {MASK} .from config.json., is token 1 of the data, which may hold it"),
    ],
)
def test_another_mask_is_refused(ids: list | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        with_own_mask(read_checkpoint(write(tmp_path, "sdar")), ids, TOKENS)
