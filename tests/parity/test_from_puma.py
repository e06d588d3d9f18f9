"""Checkpoints of the PUMA paper's code: the same logits and tokens, whatever is asked; and what is refused."""

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unmask
from tests.helpers import run_cli
from tests.helpers.runs import decode_prompts
from tests.parity.puma_files import (
    EOS,
    LENGTH,
    MASK,
    MODEL,
    VOCAB,
    averaged,
    content,
    logits,
    settings,
    weights,
    write_yaml,
)
from unmask.models.denoiser import Denoiser
from unmask.training.loading import LoadedRun

KINDS = {
    "plain": ({}, "standard"),
    "tied": ({"tie_lm_head": True}, "progressive"),
    "causal": ({"causal": True, "tie_lm_head": True}, "arm"),
    "from an autoregressive one": ({"arm_init": "ckpts/step=100.pt"}, "progressive"),
    "without biases, a key for each head": ({"bias_qkv": False, "num_kv_heads": 4}, "standard"),
}


def save(path: Path, given: Any) -> Path:
    torch.save(given, path)
    return path


def brought(path: Path, out: Path, *options: object) -> Denoiser:
    assert run_cli("import", "--from", "puma", path, "--out", out, *options) == 0
    return unmask.load(out)


def assert_logits(ours: Denoiser, made: dict[str, Tensor], model: dict) -> None:
    """Of all positions but the first, which a shifted model never predicts."""
    ids = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    at = torch.arange(ids.numel()).view(ids.shape)[:, 1:]
    with torch.no_grad():
        found = ours.logits(ids, at.flatten()).unflatten(0, at.shape)
    theirs = logits(made, model, ids)
    expected = theirs[:, :-1] if ours.alignment == "next" else theirs[:, 1:]
    known = torch.arange(VOCAB) != MASK  # ours never predicts the mask
    assert torch.allclose(found[..., known].double(), expected[..., known], rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.5


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_the_formula(name: str, tmp_path: Path) -> None:
    changes, strategy = KINDS[name]
    model = {**MODEL, **changes}
    made = weights(model)
    ours = brought(save(tmp_path / "step=20.pt", content(model, made, strategy)), tmp_path / "ours")
    assert ours.alignment == ("next" if name in ("causal", "from an autoregressive one") else "same")
    assert ours.is_causal == bool(model["causal"])
    assert_logits(ours, made, model)


@pytest.mark.parametrize("is_tied", [False, True])
def test_averaged_weights_are_taken_where_there_are_any(is_tied: bool, tmp_path: Path) -> None:
    model = {**MODEL, "tie_lm_head": is_tied}
    raw, mean = weights(model), weights(model, seed=1)
    both = save(tmp_path / "both.pt", content(model, raw, ema_state_dict=averaged(mean, model)))
    snapshot = content(model, mean, is_ema_snapshot=True, ema_state_dict=averaged(mean, model))
    theirs = save(tmp_path / "ema_step=20.pt", snapshot)
    assert_logits(brought(both, tmp_path / "mean"), mean, model)
    assert_logits(brought(theirs, tmp_path / "snapshot"), mean, model)
    assert_logits(brought(both, tmp_path / "raw", "--weights", "raw"), raw, model)
    assert [LoadedRun.open(tmp_path / name).weights for name in ("mean", "snapshot", "raw")] == ["ema", "ema", "raw"]
    assert LoadedRun.open(tmp_path / "mean").step == 20


def test_weights_alone_need_their_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = save(tmp_path / "weights.pt", weights(MODEL))
    assert run_cli("import", "--from", "puma", bare) == 2
    assert "holds no settings; give the file that it was trained with: --config FILE.yaml" in capsys.readouterr().err
    file = write_yaml(tmp_path / "mine.yaml", settings(MODEL))
    wrapped = save(tmp_path / "ddp.pt", {f"module.{name}": value for name, value in weights(MODEL).items()})
    assert_logits(brought(wrapped, tmp_path / "unwrapped", "--config", file), weights(MODEL), MODEL)
    assert_logits(brought(bare, tmp_path / "ours", "--config", file), weights(MODEL), MODEL)


def test_a_training_goes_on_from_it(tmp_path: Path) -> None:
    made = weights(MODEL)
    save(tmp_path / "step=20.pt", content(MODEL, made))
    brought(tmp_path / "step=20.pt", tmp_path / "ours")
    recipe = tmp_path / "mine.yaml"
    assert (
        run_cli("import", "--from", "puma", write_yaml(tmp_path / "theirs.yaml", settings(MODEL)), "--out", recipe) == 0
    )
    text = recipe.read_text().replace('name: "gsm8k"', 'name: "tokens"')
    recipe.write_text(re.sub(r"  tokenizer: .*\n", "", text))
    rows = tmp_path / "rows"
    write_store(rows, torch.randint(EOS, (40, LENGTH)))
    short = ["train.epochs=null", "train.steps=2", f"data.path={rows}", "log.to=[]", "train.device=cpu"]
    short += ["data.validation_ratio=0.2", "eval.every=2", "train.batch_size=4", "train.compile=false"]
    done = run_cli(
        "train", recipe, "--out", tmp_path / "run", f"train.init={tmp_path / 'ours'}", "optim.lr=1e-12", *short
    )
    assert done == 0
    for name, value in unmask.load(tmp_path / "run", weights="raw").state_dict().items():
        assert torch.allclose(value, unmask.load(tmp_path / "ours").state_dict()[name], atol=1e-6)
    other = run_cli(
        "train",
        recipe,
        "--out",
        tmp_path / "no",
        f"train.init={tmp_path / 'ours'}",
        *short,
        "model.rotary_layout=standard",
    )
    assert other == 2


def write_store(folder: Path, ids: Tensor) -> None:
    """Rows whose first half is the prompt, in three files as its preparation leaves them."""
    folder.mkdir()
    (folder / "labels.bin").write_bytes(ids.numpy().astype("<u4").tobytes())
    half = [0xFF] * (LENGTH // 16) + [0x0F] * (LENGTH // 8 % 2)
    (folder / "prompt_mask.bin").write_bytes(bytes(half + [0] * (LENGTH // 8 - len(half))) * len(ids))
    meta = {"dataset": "TinyGSM/TinyGSM", "tokenizer": "Qwen/Qwen2-0.5B", "sep": "\n", "labels_dtype": "uint32"}
    meta |= {"num_examples": len(ids), "max_len": LENGTH, "eos_id": EOS, "prompt_mask_bitorder": "little"}
    (folder / "meta.json").write_text(str(meta).replace("'", '"').replace("\n", "\\n"))


# --- decoding --------------------------------------------------------------------------------------------------------


def decode_by_formula(made: dict[str, Tensor], model: dict, canvas: Tensor, order: str, count: int) -> Tensor:
    """Greedy: in each step the `count` masked positions with the largest probability, or lead over the second."""
    xt = canvas.clone()
    while (xt == MASK).any():
        found = logits(made, model, xt)
        found[..., MASK] = -torch.inf
        best = found.softmax(-1).topk(2)
        lead = best.values[..., 0] - best.values[..., 1]
        score = (best.values[..., 0] if order == "top_k" else lead).masked_fill(xt != MASK, -1)
        for row in range(len(xt)):
            place = score[row].topk(min(count, int((xt[row] == MASK).sum()))).indices
            xt[row, place] = best.indices[row, place, 0]
    return xt


def test_a_model_of_blocks_reads_nothing_behind_them(tmp_path: Path) -> None:
    """`train_block.py` trains on prefixes, which end with the block that is predicted; it keeps no loss."""
    made, canvas = weights(MODEL), torch.randint(EOS, (9, LENGTH), generator=torch.Generator().manual_seed(2))
    for row in range(9):
        canvas[row, 4 + row % 9 :] = MASK
    given = content(MODEL, made, val_loss=None, config=settings(MODEL, "progressive", block_size=8))
    brought(save(tmp_path / "a.pt", given), tmp_path / "ours")
    prompts = [str([i for i in row.tolist() if i != MASK]) for row in canvas]
    found = [record["tokens"] for record in decode_prompts(tmp_path / "ours", tmp_path, prompts, *FP64)]
    for start in range(0, LENGTH, 8):
        canvas[:, : start + 8] = decode_by_formula(made, MODEL, canvas[:, : start + 8], "top_k", 2)
    assert found == canvas.tolist()


FP64 = ["--decoder", "dtype=float64"]  # else two scores that are nearly equal may round either way


@pytest.mark.parametrize(("order", "count"), [("top_k", 3), ("top_k_margin", 2)])
def test_tokens_are_those_of_its_decoding(order: str, count: int, tmp_path: Path) -> None:
    made = weights(MODEL)
    given = content(MODEL, made)
    given["config"]["validation"] = {"sampling": {"confidence": [order], "unmasking_num": [count], "temperature": 0.0}}
    brought(save(tmp_path / "a.pt", given), tmp_path / "ours")
    canvas = torch.randint(EOS, (30, LENGTH), generator=torch.Generator().manual_seed(2))
    canvas[:, LENGTH // 2 :] = MASK
    prompts = [str(row[: LENGTH // 2].tolist()) for row in canvas]
    found = [record["tokens"] for record in decode_prompts(tmp_path / "ours", tmp_path, prompts, *FP64)]
    assert found == decode_by_formula(made, MODEL, canvas, order, count).tolist()


# --- what is refused -------------------------------------------------------------------------------------------------


class RunsCode:
    """What, unpickled, makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def damaged(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-500])
    return path


def repacked(path: Path, out: Path) -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out


def refuse(path: Path, message: str, capsys: pytest.CaptureFixture[str], *options: object) -> None:
    capsys.readouterr()
    out = path.parent / "refused"
    assert run_cli("import", "--from", "puma", path, "--out", out, *options) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert path.name in error or "this machine has" in error
    assert "Traceback" not in error
    assert not out.exists()


def test_no_pickle_runs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "it-ran"
    hostile = content(MODEL, weights(MODEL), config=RunsCode(marker))
    refuse(save(tmp_path / "a.pt", hostile), "more than tensors and plain values.*so it is not read", capsys)
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps(RunsCode(marker)))
    refuse(plain, "is no complete archive of torch.save", capsys)
    assert not marker.exists()
    pickle.loads(plain.read_bytes())
    assert marker.exists()  # it would have


def test_files_that_are_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = save(tmp_path / "whole.pt", content(MODEL, weights(MODEL)))
    refuse(repacked(whole, tmp_path / "small.pt"), "is compressed, as torch.save never does", capsys)
    refuse(damaged(whole), "is no complete archive of torch.save", capsys)
    refuse(save(tmp_path / "list.pt", [1, 2]), "holds no dict with model_state_dict, but a list", capsys)
    refuse(
        save(tmp_path / "ints.pt", {"model_state_dict": {"emb.weight": torch.arange(3)}}),
        "emb.weight: is no tensor",
        capsys,
    )
    (tmp_path / "x.bin").write_bytes(b"")
    refuse(tmp_path / "x.bin", "neither a .yaml file of settings nor a .pt checkpoint", capsys)
    refuse(tmp_path / "none.pt", "no such file", capsys)


BIAS = "layers.1.attn.q_proj.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({BIAS: None}, f"lacks {BIAS}; .*: config is not what it was trained with"),
        ({BIAS: torch.zeros(23)}, rf"{BIAS} has shape \(23,\), not \(24,\)"),
        ({BIAS: torch.full((24,), torch.nan)}, f"{BIAS} holds nan"),
        ({BIAS: torch.zeros(24).to_sparse()}, f"{BIAS}: is no tensor of plain numbers"),
        ({BIAS: torch.empty(24, device="meta")}, f"{BIAS}: is no tensor of plain numbers|damaged"),
        ({"layers.2.mlp.w1.weight": torch.zeros(2)}, "layers.2.mlp.w1.weight is no part of the model"),
    ],
)
def test_tensors_that_do_not_fit(
    change: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {name: value for name, value in {**weights(MODEL), **change}.items() if value is not None}
    refuse(save(tmp_path / "a.pt", content(MODEL, made)), message, capsys)


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        ({"ema_state_dict": {"shadow_params": [torch.zeros(3)]}}, [], "holds 1 tensors, the model has"),
        ({"ema_state_dict": {}}, [], "shadow_params: is no list"),
        ({}, ["--weights", "ema"], "holds no averaged weights"),
        ({"is_ema_snapshot": True}, ["--weights", "raw"], "holds averaged weights alone"),
        ({"global_step": -1}, [], "global_step=-1"),
        ({"config": {"model": 3}}, [], "config: has no sections model, training and data"),
        (
            {"config": settings({**MODEL, "hidden_size": 2**23, "num_layers": 9999})},
            [],
            "a model of .* parameters .* needs .* this machine has",
        ),
        ({"config": settings({**MODEL, "rope_base": 5})}, [], "model.rope_base='5': the paper's code has no such part"),
        ({"config": settings({**MODEL, "num_kv_heads": 3})}, [], "num_kv_heads=3 does not divide"),
        (
            {"config": settings({**MODEL, "tie_lm_head": True})},
            [],
            "lm_head.weight is not emb.weight, as model.tie_lm_head",
        ),
        ({"config": settings({**MODEL, "causal": True})}, [], "model.causal=true with training.strategy=standard"),
    ],
)
def test_contents_that_contradict(
    more: dict, options: list, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(save(tmp_path / "a.pt", content(MODEL, weights(MODEL), **more)), message, capsys, *options)


def test_settings_beside_it_must_be_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_yaml(tmp_path / "other.yaml", settings({**MODEL, "num_layers": 3}))
    path = save(tmp_path / "a.pt", content(MODEL, weights(MODEL)))
    refuse(
        path, "other.yaml: model.num_layers=3, but .* was trained with 2; leave out --config", capsys, "--config", file
    )


def test_what_there_is_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "a.pt", content(MODEL, weights(MODEL)))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine").touch()
    assert run_cli("import", "--from", "puma", path, "--out", tmp_path / "ours") == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert run_cli("import", "--from", "puma", path, "--mask-id", 3) == 2
    assert "--mask-id: not for --from puma, which takes --config, --script" in capsys.readouterr().err
    assert run_cli("import", "--from", "pumba", path) == 2
    assert "--from 'pumba': unknown; use one of hf, puma" in capsys.readouterr().err
