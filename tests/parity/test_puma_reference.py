"""The PUMA paper's code itself beside ours: logits and decoded tokens of its own module (needs `UNMASK_REFERENCE`)."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unmask
from tests.helpers import run_cli
from tests.helpers.runs import decode_prompts
from tests.parity.puma_files import EOS, LENGTH, MASK, MODEL, VOCAB, settings
from unmask.models.denoiser import Denoiser

HALF, ROWS = LENGTH // 2, 100
PARTS = ("model", "model.utils", "model.transformer", "model.ema", "progressive", "sampling")


@pytest.fixture(scope="module")
def reference() -> Iterator[dict[str, ModuleType]]:
    """Its modules, whose names are as general as `model`, and are forgotten afterwards."""
    if not (folder := os.environ.get("UNMASK_REFERENCE")):
        pytest.skip("UNMASK_REFERENCE names no clone of the reference implementation (JaeyeonKim01/PUMA)")
    before = {name: sys.modules.pop(name, None) for name in (*PARTS, "omegaconf")}
    stand_in = SimpleNamespace(OmegaConf=SimpleNamespace(to_container=lambda tree, resolve: tree))
    sys.modules["omegaconf"] = stand_in  # type: ignore[assignment]
    sys.path.insert(0, folder)
    try:
        yield {name.rpartition(".")[2]: importlib.import_module(name) for name in PARTS[2:]}
    finally:
        sys.path.remove(folder)
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def build(reference: dict[str, ModuleType], model: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    parts = reference["transformer"]
    return parts.MDMTransformer(parts.MDMConfig(**model))


def rows(number: int, seed: int) -> Tensor:
    """Half a row of digits, and the same sorted."""
    digits = torch.randint(EOS, (number, HALF), generator=torch.Generator().manual_seed(seed))
    return torch.cat([digits, digits.sort(dim=1).values], dim=1)


def train(reference: dict[str, ModuleType], module: nn.Module, steps: int = 60) -> Any:
    """Trains with its own pool and loss; returns its average."""
    prompt_mask = (torch.arange(LENGTH) < HALF).expand(32, LENGTH)
    loader = [{"labels": rows(32, seed), "prompt_mask": prompt_mask} for seed in range(40)]
    parts = reference["progressive"]
    pool = parts.PhasedMasking(loader, 32, MASK, 4, torch.device("cpu"), LENGTH)
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    average = reference["ema"].ExponentialMovingAverage(module.parameters(), 0.9)
    for _ in range(steps):
        log_probs = module(pool.current_batch()).log_softmax(-1)
        loss = parts.mdm_loss_fn(log_probs, pool.x0, pool.xt, MASK, prompt_mask=pool.state["prompt_mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(module.parameters())
        pool.update_with_logits(log_probs)
    return average


def brought(path: str, out: Path) -> Denoiser:
    assert run_cli("import", "--from", "puma", path, "--out", out) == 0
    return unmask.load(out)


def assert_logits(ours: Denoiser, theirs: nn.Module) -> None:
    ids = torch.randint(VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    at = torch.arange(ids.numel()).view(ids.shape)[:, 1:]
    with torch.no_grad():
        found, expected = ours.logits(ids, at.flatten()).unflatten(0, at.shape), theirs(ids)
    expected = expected[:, :-1] if ours.alignment == "next" else expected[:, 1:]
    known = torch.arange(VOCAB) != MASK
    assert torch.allclose(found[..., known], expected[..., known], rtol=1e-5, atol=1e-5)


def decode(out: Path, folder: Path, *settings: str) -> list[list[int]]:
    prompts = [str(row[:HALF].tolist()) for row in rows(ROWS, 99)]
    decoder = ",".join(("dtype=float32", *settings))  # as its code computes on a CPU
    return [record["tokens"] for record in decode_prompts(out, folder, prompts, "--decoder", decoder)]


def masked_rows() -> Tensor:
    canvas = rows(ROWS, 99)
    canvas[:, HALF:] = MASK
    return canvas


def test_a_model_of_blocks_decodes_to_its_tokens(reference: dict[str, ModuleType], tmp_path: Path) -> None:
    module = build(reference, MODEL)
    train(reference, module, steps=20)
    config = settings(MODEL, "block", block_size=8)
    path = reference["ema"].save_model_snapshot(str(tmp_path), module.eval(), config, 0, 7)
    assert_logits(brought(path, tmp_path / "ours"), module)
    options = SimpleNamespace(temperature=0.0, confidence="top_k", unmasking_num=2)
    expected = reference["sampling"].mdm_sampling_block(WithoutMaskToken(module), masked_rows(), 8, MASK, options)
    assert decode(tmp_path / "ours", tmp_path) == expected.tolist()


class WithoutMaskToken(nn.Module):
    """Its module, the mask forbidden, as ours never predicts it.

    As it is, its sampler shares out probability to the mask too: 0.8 % after these 60 steps, which changes the order in
    up to 14 of 100 rows; 0.007 % after 1000, which changes none.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, xt: Tensor) -> Tensor:
        return self.module(xt).index_fill(-1, torch.tensor([MASK]), -torch.inf)


def test_its_checkpoints_decode_to_its_tokens(reference: dict[str, ModuleType], tmp_path: Path) -> None:
    module = build(reference, MODEL)
    average = train(reference, module)
    config = settings(MODEL, "progressive")
    files = reference["ema"]
    raw = files.save_model_snapshot(str(tmp_path), module, config, 0, 150, val_loss=1.0, extra={"top_k": 0.5})
    mean = files.save_ema_snapshot(str(tmp_path), module, average, config, 0, 150, val_loss=1.0)
    assert_logits(brought(raw, tmp_path / "raw"), module.eval())
    average.copy_to(module.parameters())
    assert_logits(brought(mean, tmp_path / "mean"), module)
    for theirs, ours in (("top_k", "prob"), ("top_k_margin", "margin")):
        for number in (1, 3):
            options = SimpleNamespace(temperature=0.0, confidence=theirs, unmasking_num=number)
            expected = reference["sampling"].mdm_sampling(WithoutMaskToken(module), masked_rows(), MASK, options)
            found = decode(tmp_path / "mean", tmp_path, f"order={ours}", f"tokens_per_step={number}")
            assert found == expected.tolist(), (theirs, number)


@pytest.mark.parametrize("name", ["causal", "from an autoregressive one"])
def test_shifted_ones_decode_to_its_tokens(reference: dict[str, ModuleType], name: str, tmp_path: Path) -> None:
    is_causal = name == "causal"
    model = {**MODEL, "tie_lm_head": True, **({"causal": True} if is_causal else {"arm_init": "ckpts/step=1.pt"})}
    module = build(reference, model).eval()
    module.emb.weight.data.mul_(0.3)  # N(0, 1) makes all probabilities 1, and no order
    config = settings(model, "arm" if is_causal else "progressive")
    path = reference["ema"].save_model_snapshot(str(tmp_path), module, config, 0, 7, val_loss=1.0)
    assert_logits(brought(path, tmp_path / "ours"), module)
    options = SimpleNamespace(temperature=0.0, confidence="top_k", unmasking_num=2, eos_id=EOS)
    sampling, wrapped = reference["sampling"], WithoutMaskToken(module)
    if is_causal:
        expected = sampling.arm_sampling(wrapped, masked_rows(), MASK, options)
    else:
        expected = sampling.mdm_sampling(wrapped, masked_rows(), MASK, options, arm_init=True)
    assert decode(tmp_path / "ours", tmp_path, *(() if is_causal else ("tokens_per_step=2",))) == expected.tolist()
