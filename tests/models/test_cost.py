"""Sizes that no machine has the memory or time for are refused at once; what fits is not."""

from pathlib import Path

import pytest
import torch

from tests.helpers import SHORT, run_cli
from unmask.config import recipes
from unmask.config.settings import DTypeName
from unmask.decoding import windows
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.errors import UserError
from unmask.models import cost
from unmask.models.attention import KeyValueCache
from unmask.models.build import build_denoiser
from unmask.models.denoiser import Denoiser
from unmask.models.presets import PRESETS
from unmask.models.transformer import Transformer
from unmask.models.transformer_config import TransformerConfig
from unmask.tasks.task import build_task
from unmask.types import TokenSpec

TOKENS = TokenSpec(vocab_size=37, length=24, mask_id=36)
OPTIONS = {
    "biases": {"qkv_bias": True, "out_bias": True},
    "groups": {"num_kv_heads": 1, "qk_norm": True, "head_dim": 6},
    "tied": {"tied_head": True, "learned_positions": True, "rotary": False},
    "conditioned": {"self_conditioning": True},
}
SIZES = {"dim": 8, "ff_dim": 20, "num_layers": 3, "num_heads": 2}


@pytest.mark.parametrize("given", [*({"preset": name} for name in PRESETS), *(SIZES | own for own in OPTIONS.values())])
def test_parameters_are_counted_without_building_them(given: dict[str, object]) -> None:
    config = TransformerConfig.model_validate(given)
    with torch.device("meta"):
        model = Transformer(config, TOKENS)
    assert cost.count_parameters(config, TOKENS) == sum(p.numel() for p in model.parameters())


def test_a_model_that_fits_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TransformerConfig.model_validate(SIZES)
    needed = 4 * cost.count_parameters(config, TOKENS) + 4 * TOKENS.length * config.head_width
    monkeypatch.setattr("unmask.machine.memory", lambda: needed)
    build_denoiser(config, TOKENS)
    monkeypatch.setattr("unmask.machine.memory", lambda: needed - 1)
    with pytest.raises(UserError, match=r"a model of .* parameters .* needs .* GiB, this machine has"):
        build_denoiser(config, TOKENS)


LARGE = 10**12
TOO_LARGE = {
    "layers": ["train", "debug", f"model.num_layers={LARGE}"],
    "width": ["train", "debug", f"model.dim={LARGE}"],
    "inner width": ["train", "debug", f"model.ff_dim={2**62}"],
    "heads": ["train", "debug", "model.head_dim=2", f"model.num_heads={LARGE}"],
    "steps": ["train", "debug", f"train.steps={LARGE}"],
    "epochs": ["train", "debug", "train={steps: null, epochs: 1.0e+12}"],
    "batch": ["train", "debug", f"train.batch_size={LARGE}"],
    "batch in parts": ["train", "debug", f"train.batch_size={LARGE}", f"train.accumulate={LARGE}"],
    "puzzles": ["train", "debug", f"data.puzzles={LARGE}"],
    "draws": ["train", "debug", f"eval.nelbo_draws={LARGE}"],
    "threads": ["train", "debug", f"train.threads={LARGE}"],
    "timeout": ["train", "debug", "train.timeout=1e300"],
    "samples": ["train", "text/uniform_small", "eval.generative.model=x", f"eval.generative.samples={LARGE}"],
    "vocabulary": ["bench", "step", "tinygsm/uniform_small", f"data={{vocab_size: {LARGE}, mask_id: 1}}"],
    "length": [
        "bench",
        "step",
        "tinygsm/uniform_small",
        f"data={{vocab_size: 50, mask_id: 1, eos_id: 2, length: {LARGE}}}",
    ],
    "steps of a benchmark": ["bench", "step", "debug", "--count", LARGE],
    "rows": ["bench", "decode", "debug", "--rows", LARGE],
    "workers": ["prepare", "tinygsm", "x.jsonl", "--tokenizer", "bytes", "--out", "o", "--workers", 10**6],
    "a row": ["prepare", "tinygsm", "x.jsonl", "--tokenizer", "bytes", "--out", "o", "--length", 8 * LARGE],
    "answers": ["decode", "nowhere", "--n", LARGE],
    "steps of a decoder": ["train", "debug", f"decode.steps={LARGE}"],
    "seeds": ["compare", "debug", "sudoku/puma", "--seeds", LARGE, "--out", "o"],
    "stages": ["train", "debug", f"process.num_stages={2**62}"],
    "masks": ["diagnose", "nowhere", "--draws", LARGE],
}


@pytest.mark.parametrize("arguments", TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_too_much_is_refused_before_it_is_paid(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out = ["--out", "run"] if arguments[0] == "train" else []
    assert run_cli(*arguments, *out) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in message
    reasons = ("GiB", "must be at most", "less than or equal to", "not in the range", "years", "or other epochs")
    assert any(words in message for words in reasons), message
    assert [*tmp_path.iterdir()] == []


def test_toys_too_large_to_enumerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.machine.memory", lambda: 2**20)
    config = recipes.load("debug", [*SHORT, "task.name=toy", "data={values: 9, length: 8}"])
    with pytest.raises(UserError, match=r"data\.values=9 .*GiB"):
        build_task(config)


@pytest.mark.parametrize("option", ["train.max_seconds=1e-9", "train.max_examples=1"])
def test_any_number_of_steps_is_one_where_something_else_ends_the_run(option: str, tmp_path: Path) -> None:
    assert run_cli("train", "debug", *SHORT, f"train.steps={LARGE}", option, "--out", tmp_path / "run") == 0


def tiny_model(**settings: object) -> Denoiser:
    config = TransformerConfig.model_validate({**SIZES, "num_kv_heads": 1, "block_size": 6, **settings})
    return build_denoiser(config, TOKENS).eval()


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float64", 8)])
def test_a_cache_is_as_large_as_it_is_said_to_be(dtype: DTypeName, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.use_dtype(dtype)
    settings = DecodeConfig(cache="block", dtype=dtype, batch_size=3)
    xt = torch.full((3, TOKENS.length), TOKENS.mask_id)
    caches: list[KeyValueCache] = []
    make = KeyValueCache
    monkeypatch.setattr(
        windows, "KeyValueCache", lambda *given, **named: caches.append(make(*given, **named)) or caches[-1]
    )
    steps = build_decoder(settings, model, TOKENS, rows=3).steps(xt)
    next(steps), next(steps)
    (cache,) = caches
    made = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers.values())
    assert made == 3 * size * cost.count_cached(model.backbone.config, TOKENS)
    least = made + 3 * 17 * TOKENS.length
    monkeypatch.setattr("unmask.machine.memory", lambda: least)
    build_decoder(settings, model, TOKENS, rows=5)
    monkeypatch.setattr("unmask.machine.memory", lambda: least - 1)
    build_decoder(settings, model, TOKENS, rows=2)
    with pytest.raises(UserError, match=r"decode.batch_size=3: 3 canvases with the keys and values .* needs .* GiB"):
        build_decoder(settings, model, TOKENS, rows=3)


def test_canvases_that_cannot_fit_are_refused_by_the_command_before_any_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("train", "debug", *SHORT, "train.steps=1", "--out", tmp_path / "run") == 0
    (tmp_path / "prompts.txt").write_text(f"{'.' * 81}\n")
    monkeypatch.setattr("unmask.machine.memory", lambda: 2**20)
    out = tmp_path / "out.jsonl"
    arguments = [
        "decode",
        tmp_path / "run",
        tmp_path / "prompts.txt",
        "--decoder",
        "prob,temperature=1,batch_size=999999",
    ]
    capsys.readouterr()
    assert run_cli(*arguments, "--n", 10_000, "--out", out) == 2
    assert "decode.batch_size=999999: 10000 canvases, 81 tokens each, needs" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not out.exists()
