"""Memory at the peak, counted tensor by tensor: what the estimates say, and what decoding never holds."""

import gc
from typing import Any

import pytest
import torch

from tests.helpers import RandomStream
from tests.helpers.memory import LiveBytes, size_of
from unmask.config import recipes
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.models import cost, lora
from unmask.models.build import build_denoiser
from unmask.models.transformer_config import TransformerConfig
from unmask.training.trainer import Trainer
from unmask.types import TokenSpec

ROWS, LENGTH = 4, 64
VOCABULARY = 8200  # large: the head computes chunks of it


def tokens(vocab_size: int = VOCABULARY) -> TokenSpec:
    return TokenSpec(vocab_size=vocab_size, length=LENGTH, mask_id=vocab_size - 1, eos_id=1)


def decode(
    *, held: str = "float32", dtype: str = "float32", vocab_size: int = VOCABULARY, cache: str = "none", **sizes: Any
) -> tuple[int, cost.Memory]:
    """Returns the bytes that decoding holds at the peak beside the weights that were there, and the estimate of all."""
    settings = {"dim": 32, "ff_dim": 96, "num_layers": 2, "num_heads": 4, "attention": "sdpa", **sizes}
    config = TransformerConfig.model_validate(settings)
    model = build_denoiser(config, tokens(vocab_size)).eval()
    if held == "bfloat16":
        model.hold_bfloat16()
    model.use_dtype(dtype)
    xt = torch.full((ROWS, LENGTH), vocab_size - 1)
    xt[:, :4] = 5
    window = {} if cache == "none" else {"block_size": 16}
    decoder = build_decoder(
        DecodeConfig(cache=cache, tokens_per_step=30, **window), model, tokens(vocab_size), rows=ROWS
    )
    gc.collect()
    with torch.no_grad(), LiveBytes() as counted:  # type checks hide from `no_grad` that `steps` is a generator
        decoder.decode(xt)
    memory = cost.decoding_memory(
        config, tokens(vocab_size), rows=ROWS, is_cached=cache != "none", dtype=dtype, held=held
    )
    return counted.peak, memory


@pytest.mark.parametrize(("dtype", "cache"), [("float32", "none"), ("bfloat16", "dual")])
def test_decoding_holds_one_layer_whatever_their_number(dtype: str, cache: str) -> None:
    """Weights in bfloat16 are computed with as they are; those in fp32 would have rounded copies beside them."""
    shallow, deep = (decode(held=dtype, dtype=dtype, cache=cache, num_layers=number) for number in (2, 6))
    assert deep[0] - deep[1].cache == shallow[0] - shallow[1].cache
    assert deep[1].cache == 3 * shallow[1].cache
    assert (deep[1].cache > 0) == (cache != "none")


def test_decoding_never_holds_the_logits_of_a_canvas() -> None:
    narrow, wide = (decode(vocab_size=size)[0] for size in (VOCABULARY, 2 * VOCABULARY))
    assert wide - narrow < 4 * ROWS * LENGTH * VOCABULARY / 20


@pytest.mark.parametrize(
    "given",
    [
        {"dim": 256, "ff_dim": 1536},
        {"dim": 512, "ff_dim": 512, "num_kv_heads": 2, "num_layers": 1},
        {"dim": 256, "ff_dim": 1536, "dtype": "bfloat16"},
        pytest.param({"dim": 256, "ff_dim": 1536, "held": "bfloat16", "dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
    ids=["fp32", "groups", "fp32 in bf16", "bf16"],
)
def test_the_estimate_for_decoding(given: dict[str, Any]) -> None:
    peak, memory = decode(**given)
    config = TransformerConfig(
        dim=given["dim"], ff_dim=given["ff_dim"], num_layers=given.get("num_layers", 2), num_heads=4
    )
    config = config.model_copy(update={"num_kv_heads": given.get("num_kv_heads")})
    weights = cost.count_parameters(config, tokens()) * (2 if given.get("held") == "bfloat16" else 4)
    assert memory.total - weights == pytest.approx(peak, rel=0.03)  # what is small is left out


@pytest.mark.parametrize(
    ("dtype", "base", "checkpointing"),
    [
        ("bfloat16", None, True),
        ("bfloat16", "bfloat16", True),
        pytest.param("float32", None, False, marks=pytest.mark.slow),
        pytest.param("bfloat16", "bfloat16", False, marks=pytest.mark.slow),
        pytest.param("bfloat16", "nf4", True, marks=pytest.mark.slow),
    ],
)
def test_the_estimate_for_training(dtype: str, base: str | None, checkpointing: bool) -> None:
    """Casts of weights are freed as the backward pass goes on, and not all is kept to its end: up to a tenth less."""
    sizes = "dim: 192, ff_dim: 480, num_layers: 3, num_heads: 4, attention: sdpa"
    settings = [f"model={{preset: null, {sizes}, learned_positions: false, rotary: true}}"]
    settings += [f"model.checkpointing={checkpointing}", f"train.dtype={dtype}", "train.compile=false"]
    settings += [f"train.batch_size={2 * ROWS}", "train.accumulate=2", "ema.decay=0.9"]
    settings += ["process={name: puma_variable, tokens_per_step: 8}"]
    if base is not None:
        pytest.importorskip("peft" if base != "nf4" else "bitsandbytes", reason="needs unmask[peft] or unmask[qlora]")
        settings += [f"model.lora={{rank: 2, base: {base}}}", "train.init=given"]
    config = recipes.load("debug", settings)
    gc.collect()
    with LiveBytes() as counted:
        trainer = Trainer(config, tokens(), RandomStream(LENGTH, VOCABULARY - 2))
        if base is not None:
            lora.draw_base(trainer.model, 0)
        counted.forget_peak()
        scored = max(len(part.scored) for _ in range(2) for part in trainer.step().batch.split(2))
    assert isinstance(config.model, TransformerConfig)
    memory = cost.training_memory(config.model, tokens(), rows=ROWS, dtype=dtype, copies=5, scored=scored)
    assert 0.97 * counted.peak < memory.total < 1.11 * counted.peak
    assert memory.updates == 4 * size_of(trainer.model.parameters())


def test_what_7_and_8_billion_parameters_take() -> None:
    """The figures of docs/guides/large_models.md, in GiB: canvases of 1024 tokens, bfloat16, checkpoints of blocks."""
    found: dict[str, list[float]] = {}
    for preset, rows in (("llada-8b", 126464), ("dream-7b", 152064)):
        of_model = TokenSpec(vocab_size=rows, length=1024, mask_id=rows - 1)
        config = TransformerConfig.model_validate({"preset": preset, "checkpointing": True})
        parts = [
            cost.decoding_memory(config, of_model, rows=1, is_cached=False),
            cost.decoding_memory(config, of_model, rows=1, is_cached=True),
            cost.decoding_memory(config, of_model, rows=1, is_cached=False, held="float32"),
        ]
        for base in ("nf4", "bfloat16"):
            adapted = config.model_copy(update={"lora": lora.LoraConfig(rank=32, base=base)})
            parts += [cost.training_memory(adapted, of_model, rows=number) for number in (1, 8)]
        parts += [cost.training_memory(config, of_model, rows=1)]
        found[preset] = [round(part.total / 2**30, 1) for part in parts]
    assert found == {
        "llada-8b": [15.1, 15.6, 43.0, 7.7, 13.5, 17.3, 23.1, 164.8],
        "dream-7b": [14.3, 14.4, 40.7, 7.4, 12.8, 16.5, 21.8, 156.5],
    }
