"""A large model is never in memory twice, or in a wider format than it is used in: bytes counted, tensor by tensor."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import write_llama
from tests.helpers.memory import LiveBytes, size_of
from tests.helpers.runs import TOY
from unmask.cli.export import export
from unmask.config import recipes
from unmask.errors import UserError
from unmask.models import cost
from unmask.models.build import build_denoiser
from unmask.models.hf import check_settings, read_checkpoint
from unmask.models.transformer_config import TransformerConfig
from unmask.tasks.task import build_task
from unmask.training import exporting, sources
from unmask.training.loading import LoadedRun
from unmask.training.restoring import start_warm
from unmask.training.trainer import Trainer
from unmask.types import TokenSpec

LAYERS = 12
LARGEST = 4 * 32 * 48
"""Bytes of the largest tensor in fp32."""
FEW = 6 * LARGEST
"""A tensor as it is read, checked and converted, and what else is as large."""


def test_decoding_reads_each_tensor_of_a_checkpoint_once(tmp_path: Path) -> None:
    folder = write_llama(
        tmp_path / "llada", rows=64, dtype=torch.bfloat16, num_layers=LAYERS, tied=False, mask_token_id=63
    )
    with LiveBytes() as counted:
        model = LoadedRun.open(folder, device="cpu").model
        held = size_of([*model.parameters(), *model.buffers()])
        assert held <= counted.now < held + 2**10
    count = cost.count_parameters(model.backbone.config, LoadedRun.open(folder).tokens)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert held < 2 * count + 2**17  # and angles of 512 positions
    assert counted.peak < held + FEW
    assert held > 5 * FEW  # a second copy would show


@pytest.mark.parametrize("layout", ["unmask", "plain"])
@pytest.mark.parametrize("kind", ["checkpoint", "import", "export"])
def test_an_export_holds_one_tensor_at_a_time(kind: str, layout: str, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "base", rows=64, num_layers=LAYERS, tied=False, mask_token_id=63)
    if kind == "export":
        exporting.export(folder, tmp_path / "own")
        folder = tmp_path / "own"
    with LiveBytes() as counted:
        if kind == "import":
            sources.find("hf", folder, {}).write(tmp_path / "written")
        else:
            exporting.export(folder, tmp_path / "written", layout=layout)
    angles = 4 * 512 * 8 * 2  # of 512 positions
    assert counted.peak < FEW + angles
    assert (tmp_path / "written" / "model.safetensors").stat().st_size > 10 * FEW


@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
def test_adapters_start_without_a_wide_copy_of_their_base(base: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs PEFT: pip install 'unmask[peft]'")
    if base == "nf4":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'unmask[qlora]'")
    folder = write_llama(tmp_path / "base", rows=3, dtype=torch.bfloat16, num_layers=LAYERS)
    sizes = f"dim: 32, ff_dim: 48, num_layers: {LAYERS}, num_heads: 4, num_kv_heads: 2, tied_head: true"
    settings = [f"model={{preset: null, {sizes}}}", f"model.lora={{rank: 1, base: {base}}}", f"train.init={folder}"]
    config = recipes.load("debug", [*TOY, *settings, "train.compile=false", "train.dtype=float32"])
    task = build_task(config)
    stream = task.train_stream(0)
    with LiveBytes() as counted:
        trainer = Trainer(config, task.tokens, stream)
        start_warm(trainer, task)
    held = cost.count_held_bytes(config.model, task.tokens)
    weights = sum(parameter.numel() for parameter in trainer.model.parameters())
    tables = 7 * LAYERS * 1200 * (base == "nf4")  # of each matrix, whatever its size
    assert counted.now < held * 1.1 + tables + 12 * weights + FEW  # adapters, their average, what is small
    assert counted.peak < counted.now + FEW
    assert counted.peak < 4 * cost.count_parameters(config.model, task.tokens)


def test_an_export_in_bfloat16_is_half_as_large(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "wide", rows=64, tied=False, mask_token_id=63)
    exporting.export(folder, tmp_path / "own")
    exporting.export(folder, tmp_path / "narrow", dtype="bfloat16")
    own, narrow = (LoadedRun.open(tmp_path / name) for name in ("own", "narrow"))
    for name, value in own.tensors.items():
        assert torch.equal(narrow.tensors[name], value.bfloat16())
    assert {parameter.dtype for parameter in narrow.model.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match="--dtype bfloat16: adapters stay in fp32"):
        export(str(folder), str(tmp_path / "adapter"), adapter=True, dtype="bfloat16")


# --- recipes ---------------------------------------------------------------------------------------------------------

LLADA = {
    "model_type": "llada",
    "d_model": 4096,
    "mlp_hidden_size": 12288,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "embedding_size": 126464,
    "vocab_size": 126464,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "weight_tying": False,
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
}
DREAM = {
    "model_type": "Dream",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
    "mask_token_id": 151666,
}
RECIPES = {
    "chat/llada_8b_lora_puma": (LLADA, 8_015_581_184, 2_621_440),
    "chat/dream_7b_lora_puma": (DREAM, 7_615_616_512, 2_523_136),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_for_the_models_as_they_are_published(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described, count, for_each_rank = RECIPES[recipe]
    (tmp_path / "config.json").write_text(json.dumps(described))
    config = recipes.load(recipe, ["model.lora.rank=1", "model.lora.alpha=2"])
    assert isinstance(config.model, TransformerConfig)
    check_settings(tmp_path, config.model)
    rows = read_checkpoint(tmp_path).num_rows
    tokens = TokenSpec(vocab_size=rows, length=1024, mask_id=rows - 1)
    plain = config.model.model_copy(update={"lora": None})
    model = build_denoiser(plain, tokens, is_empty=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == count == cost.count_parameters(plain, tokens)
    assert all(parameter.is_meta for parameter in model.parameters())
    pytest.importorskip("peft", reason="needs PEFT: pip install 'unmask[peft]'")
    monkeypatch.setattr("unmask.machine.memory", lambda: 2**40)
    adapted = build_denoiser(config.model, tokens)
    trained = sum(parameter.numel() for parameter in adapted.parameters())
    assert trained == for_each_rank + plain.dim == cost.count_trained(config.model, tokens)
    unread = sum(buffer.numel() for buffer in adapted.buffers() if buffer.is_meta)
    small = {"attention_norm", "mlp_norm", "norm"}
    norms = sum(b.numel() for name, b in adapted.named_buffers() if name.split(".")[-2] in small)
    assert unread == count - norms


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_leave_padding_out_and_bound_the_weight(recipe: str) -> None:
    config = recipes.load(recipe, ["train.init=here", "data.path=there"])
    assert (config.process.name, config.process.weight_cap, config.data.padding) == ("puma_variable", 5, "ignored")
    assert config.model.checkpointing
    assert config.ema.decay > 0
    assert (config.train.steps, config.train.init, config.data.path) == (4000, "here", "there")
