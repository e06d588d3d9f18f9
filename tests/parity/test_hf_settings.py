"""Settings of Hugging Face's Llama and Qwen checkpoints: what a config.json says, and what is refused."""

import json
from pathlib import Path

import pytest

from tests.helpers import SHORT, metrics_of, run_cli
from tests.helpers.checkpoints import write_llama
from tests.parity.hf_folders import SIZES
from unmask.config import recipes
from unmask.errors import UserError
from unmask.models.hf import check_settings, is_checkpoint, read_model_settings
from unmask.models.transformer_config import TransformerConfig

LLAMA = {"model_type": "llama", **{name: value for name, value in SIZES.items() if not name.endswith("_id")}}
QWEN2 = {**LLAMA, "model_type": "qwen2"}


def described(folder: Path, config: dict) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (LLAMA, {"dim": 32, "num_kv_heads": 2, "head_dim": 8, "qkv_bias": False, "qk_norm": False, "tied_head": False}),
        ({**LLAMA, "num_key_value_heads": None, "tie_word_embeddings": True}, {"num_kv_heads": 4, "tied_head": True}),
        (QWEN2, {"qkv_bias": True, "qk_norm": False, "head_dim": 8}),
        ({**LLAMA, "model_type": "qwen3"}, {"qkv_bias": False, "qk_norm": True, "head_dim": 128}),
        (LLAMA, {"rope_theta": 10_000.0, "norm_eps": 1e-6, "rotary": True, "learned_positions": False}),
        ({**LLAMA, "rope_theta": 5e5, "rms_norm_eps": 1e-5}, {"rope_theta": 5e5, "norm_eps": 1e-5}),
        ({**LLAMA, "rope_theta": 500_000, "rope_scaling": None}, {"rope_theta": 5e5}),
        ({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 1.0}}, {"rope_theta": 5e5}),
        ({**LLAMA, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, {"rope_theta": 1e6}),
        ({**QWEN2, "use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}, {"num_layers": 3}),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 3}, {"num_layers": 3}),
        ({**QWEN2, "layer_types": ["full_attention"] * 3}, {"num_layers": 3}),
    ],
)
def test_settings_of_a_checkpoint(given: dict, expected: dict, tmp_path: Path) -> None:
    settings = read_model_settings(described(tmp_path, given))
    assert {name: settings[name] for name in expected} == expected
    assert TransformerConfig(**settings).model_dump().items() >= settings.items()
    assert TransformerConfig(preset="tiny", **settings).model_dump().items() >= settings.items()


LLAMA3 = {"rope_type": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral' is unknown; use a checkpoint of llama, qwen2, qwen3"),
        ({"model_type": ["llama"]}, "is unknown; use a checkpoint of"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; use a checkpoint with silu"),
        ({"attention_bias": True}, "attention_bias=True is not supported; its output projection has a bias as well"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"rope_scaling": LLAMA3}, "rope_scaling=.*'llama3'.* is not supported; use a checkpoint whose rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.*'linear'"),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 1e4}}, "rope_parameters=.*'llama3'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters=.*full_attention"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters=.*partial"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.* is not supported"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, "use_sliding_window=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported; use the checkpoint that"),
        ({"hidden_size": "32"}, "hidden_size: '32': Input should be a valid integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0: Input should be greater than 0"),
        ({"num_key_value_heads": 3}, "model.num_kv_heads=3 does not divide model.num_heads=4"),
        ({"head_dim": 5}, "even head width, not 5"),
        ({"rope_parameters": {"rope_theta": -1}}, "model.rope_theta=-1: Input should be greater than 0"),
    ],
)
def test_what_the_native_transformer_cannot_be(given: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path / 'config.json'}: .*{message}"):
        read_model_settings(described(tmp_path, {**LLAMA, **given}))


def test_a_size_that_is_not_said(tmp_path: Path) -> None:
    described(tmp_path, {name: value for name, value in LLAMA.items() if name != "hidden_size"})
    with pytest.raises(UserError, match=r"config.json: hidden_size: is missing; download it again"):
        read_model_settings(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read"), ("3", "no JSON object"), (None, "No such file")]
)
def test_a_damaged_config(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path / 'config.json'}: .*{message}"):
        read_model_settings(tmp_path)
    assert not is_checkpoint(tmp_path)


def test_settings_that_agree(tmp_path: Path) -> None:
    """Said outright, or left to what null stands for."""
    described(tmp_path, {**LLAMA, "num_key_value_heads": 4})
    settings = read_model_settings(tmp_path)
    check_settings(tmp_path, TransformerConfig(**settings, dropout=0.1))
    check_settings(tmp_path, TransformerConfig(**(settings | {"num_kv_heads": None, "head_dim": None})))


def test_a_start_from_a_checkpoint_has_its_shape(tmp_path: Path) -> None:
    """In place of the recipe's preset, and beside what the recipe and the user say themselves."""
    settings = read_model_settings(described(tmp_path, QWEN2))
    start = [f"train.init={tmp_path}", "model.dropout=0.1", "model.alignment=next"]
    model = recipes.load("chat/uniform", start).model.model_dump()
    own = {"dropout": 0.1, "alignment": "next"}
    assert model == TransformerConfig(**(settings | own)).model_dump()
    contradicted = recipes.load("chat/uniform", [*start, "model.ff_dim=100"]).model
    with pytest.raises(UserError, match=r"model.ff_dim=100, the checkpoint has \d+; set it so"):
        check_settings(tmp_path, contradicted)


def test_a_run_goes_on_without_the_checkpoint_that_it_started_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run keeps the shape, so what is said of it must be the run's; the weights were read once."""
    base, out = write_llama(tmp_path / "base", rows=11, mask_token_id=10), tmp_path / "run"
    start = ["debug", *SHORT, f"train.init={base}", "eval.tokens_per_step=[3]", "--out", out]
    assert run_cli("train", *start) == 0
    base.rename(tmp_path / "elsewhere")
    assert run_cli("train", *start, "train.steps=6", "--resume") == 0
    assert metrics_of(out)[-1]["step"] == 6
    assert run_cli("train", *start, "model.dim=64", "--resume") == 2
    assert "model.dim: 32 in" in capsys.readouterr().err
    assert run_cli("train", *start[:-1], tmp_path / "another") == 2  # a new run needs it


def test_every_setting_that_differs_is_named(tmp_path: Path) -> None:
    settings = read_model_settings(described(tmp_path, QWEN2))
    with pytest.raises(UserError) as caught:
        check_settings(tmp_path, TransformerConfig(**(settings | {"qkv_bias": False})))
    expected = f"train.init={tmp_path}: model.qkv_bias=False, the checkpoint has True; set it so"
    assert str(caught.value) == expected
    with pytest.raises(UserError) as caught:
        check_settings(tmp_path, TransformerConfig(preset="tiny", norm_eps=1e-5))
    wrong = ("ff_dim=64, the checkpoint has 48", "num_layers=2,", "num_heads=2,", "norm_eps=1e-05,", "rotary=False,")
    assert all(f"model.{part}" in str(caught.value) for part in wrong)
    assert "model.dim" not in str(caught.value)
    assert str(caught.value).endswith("; set them so")
