"""Hugging Face checkpoints in place of runs, and as exports: what is found, what is decoded, what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import unmask
from tests.helpers import run_cli
from tests.helpers.runs import decode_prompts
from tests.parity.hf_folders import EOS, MASK, ROWS, reference, reference_logits, write, write_tokenizer
from unmask.errors import UserError
from unmask.models.build import build_denoiser
from unmask.models.denoiser import Denoiser
from unmask.models.transformer_config import TransformerConfig
from unmask.training import sources
from unmask.training.importing import Import, Statements
from unmask.training.loading import LoadedRun
from unmask.types import Query, TokenSpec

PLAIN = {"mask_token_id": None, "is_causal": None}
"""Changes that make the folder of a masked Llama that of a causal one."""


def folder_of(path: Path, name: str, *, tokens: int = ROWS, **changes: object) -> Path:
    return write_tokenizer(write(path, name, **changes), size=tokens)


def assert_logits(model: Denoiser, name: str, rows: list[int], tolerance: float = 1e-5) -> None:
    """Compares the logits of all positions but the first, for tokens that are the checkpoint's `rows`."""
    ids = torch.randint(len(rows), (2, 16), generator=torch.Generator().manual_seed(1))
    at = torch.arange(ids.numel()).view(ids.shape)[:, 1:]
    with torch.no_grad():
        found = model.logits(ids, at.flatten()).unflatten(0, at.shape)
    index = torch.tensor(rows)
    expected = reference_logits(name, index[ids])[:, 1:, index]
    known = torch.arange(len(rows)) != model.mask_id
    assert torch.allclose(found[..., known], expected[..., known], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["sdar", "Dream", "llada", "a2d-qwen2"])
def test_a_checkpoint_is_a_model_and_so_is_its_export(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs", name)
    assert_logits(unmask.load(folder), name, [*range(ROWS)])
    tokens = LoadedRun.open(folder).tokens
    sources.find("hf", folder, {}).write(tmp_path / "ours")
    assert_logits(unmask.load(tmp_path / "ours"), name, [*range(ROWS)])
    for file in folder.iterdir():
        file.unlink()  # an export needs none of them
    again = LoadedRun.open(tmp_path / "ours")
    assert again.tokens == tokens
    assert again.task.vocabulary.encode("DE") == [3, 4]


def test_a_mask_behind_the_tokenizer_comes_after_its_tokens(tmp_path: Path) -> None:
    """SDAR's mask has a row of the padding, and no token: ours is the tokenizer's ids and that row."""
    found = LoadedRun.open(folder_of(tmp_path, "sdar", tokens=40))
    assert (found.tokens.vocab_size, found.tokens.mask_id, found.tokens.eos_id) == (41, 40, EOS)
    assert_logits(found.model, "sdar", [*range(40), MASK])


def test_a_folder_without_a_tokenizer_has_ids_alone(tmp_path: Path) -> None:
    found = LoadedRun.open(write(tmp_path, "Dream"))
    assert (found.config.task.name, found.tokens.vocab_size, found.tokens.mask_id) == ("tokens", ROWS, MASK)
    assert_logits(found.model, "Dream", [*range(ROWS)])


def test_a_causal_model_goes_on_greedily_as_transformers_does(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs", "llama", **PLAIN)
    (record,) = decode_prompts(folder, tmp_path, ["DEFG"])
    prompt = torch.tensor([[3, 4, 5, 6]])
    expected = reference("llama").generate(
        prompt, max_new_tokens=60, do_sample=False, eos_token_id=EOS, pad_token_id=EOS
    )
    answer = record["tokens"][: expected.shape[1]]
    assert answer == expected[0].tolist()
    assert record["prompt"].replace(" ", "") == "DEFG"


def test_a_prompt_with_nothing_before_it_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first batch would be decoded, and the second fail without its line."""
    folder, prompts = write(tmp_path / "theirs", "Dream"), tmp_path / "prompts"
    prompts.write_text("[3, 4]\n\n[5, null, 6]\n[null, 5]\n")
    options = ["--decoder", "batch_size=1,tokens_per_step=64", "--out", tmp_path / "out.jsonl"]
    assert run_cli("decode", folder, prompts, *options) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{prompts}, line 4: its first position is to be filled in" in said
    assert sorted(each.name for each in tmp_path.iterdir()) == ["prompts", "theirs"]
    same = write(tmp_path / "same", "llada")
    assert run_cli("decode", same, prompts, *options) == 0


TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] | upper }}{{ m.content }}<end>{% endfor %}{{ 'Z' if add_generation_prompt }}"
)


def test_messages_are_put_into_the_tokenizers_own_template(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs", "llada")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": TEMPLATE}))
    sources.find("hf", folder, {}).write(tmp_path / "ours")
    asked = json.dumps({"messages": [{"role": "user", "content": "DE"}]})
    for place in (folder, tmp_path / "ours"):
        task = LoadedRun.open(place).task
        assert task.has_turns
        assert task.prompts([asked], "x")[0, :6].tolist() == [20, 3, 4, EOS, 25, MASK]
        assert task.prompts(["DE"], "x")[0, :3].tolist() == [3, 4, MASK]
    plain = LoadedRun.open(folder_of(tmp_path / "plain", "llada")).task
    assert not plain.has_turns
    with pytest.raises(UserError, match="came without a chat template"):
        plain.prompts([asked], "x")


# --- what is found ---------------------------------------------------------------------------------------------------


def test_where_the_mask_is_found(tmp_path: Path) -> None:
    """In this order; a causal model's tokenizer may name one that it was never trained with."""
    folder = folder_of(tmp_path, "a2d-qwen3", mask_token_id=None)
    assert (Import(folder).mask.ids, Import(folder).mask.source) == ((MASK,), "tokenizer.json")
    named = {"eos_token": "<end>", "mask_token": {"content": "E"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    assert (Import(folder).mask.ids, Import(folder).mask.source) == ((4,), "tokenizer_config.json")
    (folder / "generation_config.json").write_text(json.dumps({"mask_token_id": 5, "eos_token_id": [6, EOS]}))
    found = Import(folder)
    assert (found.mask.ids, found.mask.source) == ((5,), "generation_config.json")
    assert (found.ends.ids, found.tokens.eos_id) == ((6, EOS), 6)
    folder_of(tmp_path, "a2d-qwen3", mask_token_id=7)
    assert (Import(folder).mask.ids, Import(folder).mask.source) == ((7,), "config.json")
    folder_of(tmp_path / "coder", "stable-diffcoder")
    assert (Import(tmp_path / "coder").mask.ids, Import(tmp_path / "coder").mask.source) == ((5,), "its family")
    folder_of(tmp_path / "causal", "llama", **PLAIN)
    assert Import(tmp_path / "causal").mask is None
    assert Import(tmp_path / "causal").is_causal


def test_a_mask_that_is_an_ordinary_token_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _ = Import(folder_of(tmp_path, "a2d-llama", mask_token_id=7)).tokens
    assert "the mask, 7 (from config.json), is 'H', an ordinary token" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "changes", "stated", "message"),
    [
        ("sdar", {}, {"mask_id": 5}, f"--mask-id 5: .*config.json says that the mask is {MASK}; leave the option out"),
        ("sdar", {}, {"mask_token": "F"}, f"--mask-token F: .*config.json says that the mask is {MASK}"),
        ("sdar", {}, {"mask_token": "F", "mask_id": 4}, "that token is 5; give one of them"),
        ("sdar", {}, {"mask_token": "FF"}, "--mask-token: .*its tokenizer has no token 'FF'"),
        ("sdar", {}, {"alignment": "next"}, "--alignment next: .* is of a model with same; leave it out"),
        ("sdar, b8", {}, {"block_size": 4}, "--block-size 4: .*config.json says 8; leave the option out"),
        ("sdar", {}, {"length": 20}, "--length 20: must be a multiple of 8; use 16 or 24"),
        ("sdar", {"mask_token_id": None}, {}, "mask id 151669 .from its family. lies beyond the 50 rows .*, 0 to 49"),
        ("a2d-llama", {"mask_token_id": ROWS}, {}, "mask id 50 .from config.json. lies beyond the 50 rows"),
        ("qwen2", {**PLAIN, "alignment": None}, {"mask_id": MASK}, "does not say where .* --alignment next"),
        (
            "a2d-llama",
            {"mask_token_id": None, "tokens": 40},
            {},
            "names a mask; say which token it is, with --mask-token",
        ),
        ("sdar", {"eos_token_id": MASK}, {}, "the end token 48 .from config.json. is the mask, or beyond"),
        ("sdar", {"eos_token_id": 99}, {}, "the end token 99 .from config.json. is the mask, or beyond its 50 tokens"),
    ],
)
def test_what_contradicts_or_is_not_said(name: str, changes: dict, stated: dict, message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, name, **changes)
    with pytest.raises(UserError, match=message):
        _ = Import(folder, Statements(**stated)).config


def test_what_a_user_says_is_kept(tmp_path: Path) -> None:
    """As of Open-dCoder, a Qwen2 whose files say nothing of masks."""
    folder = folder_of(tmp_path / "theirs", "qwen2", **PLAIN, alignment=None)
    said = {"mask_token": "<|mask|>", "alignment": "next", "block_size": 8, "length": 32}
    sources.find("hf", folder, said).write(tmp_path / "ours")
    found = LoadedRun.open(tmp_path / "ours")
    assert (found.model.alignment, found.model.block_size, found.tokens.mask_id) == ("next", 8, MASK)
    assert (found.tokens.length, found.config.process.block_size) == (32, 8)


# --- bfloat16 --------------------------------------------------------------------------------------------------------


def test_bfloat16_stays_so_unless_it_is_computed_in_another_format(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs", "a2d-qwen3", dtype=torch.bfloat16)
    sources.find("hf", folder, {}).write(tmp_path / "ours")
    assert {each.dtype for each in load_file(tmp_path / "ours" / "model.safetensors").values()} == {torch.bfloat16}
    model = unmask.load(tmp_path / "ours")
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert model.backbone.cos.dtype == torch.float32
    assert_logits(model, "a2d-qwen3", [*range(ROWS)], tolerance=0.15)  # 2^-8 of values of 3, over two layers
    assert {each.dtype for each in model.use_dtype("float32").parameters()} == {torch.float32}
    assert {each.dtype for each in model.use_dtype("bfloat16").parameters()} == {torch.bfloat16}


def test_bfloat16_weights_predict_a_large_vocabulary_too() -> None:
    config = TransformerConfig(preset="tiny")
    model = build_denoiser(config, TokenSpec(vocab_size=9000, length=16, mask_id=8999)).eval()
    xt, at = torch.full((2, 16), 8999), torch.arange(32)
    query = Query()
    with torch.no_grad():
        exact = model.logits(xt, at)
        found = model.hold_bfloat16().predict(xt, at, query)
    assert (exact.gather(1, found.values.unsqueeze(1)).squeeze(1) > exact.max(-1).values - 0.1).all()


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_found_and_writes_it_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = folder_of(tmp_path / "theirs", "Dream")
    assert run_cli("import", folder, "--out", tmp_path / "ours") == 0
    said = capsys.readouterr()
    for line in (r"family +Dream", r"alignment +next", r"mask +48 <\|mask\|> .from config.json.", "numbers +F32"):
        assert re.search(line, said.out)
    assert f"unmask decode {tmp_path / 'ours'}" in said.err
    assert "model.alignment=next" in said.err
    assert run_cli("import", folder, "--out", tmp_path / "ours") == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert run_cli("import", tmp_path / "ours") == 2
    assert "is a model of this package already; give it to decode" in capsys.readouterr().err
    (text := tmp_path / "text.txt").write_text("DEFG\n" * 20)
    assert run_cli("eval", tmp_path / "ours", "--data", text) == 0
    capsys.readouterr()
    assert run_cli("eval", folder) == 2
    assert "this model came without data; give text" in capsys.readouterr().err
    assert run_cli("decode", folder, "--step", "best") == 2
    assert "holds one set of weights" in capsys.readouterr().err
