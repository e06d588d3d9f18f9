"""Models written in layouts of Hugging Face: transformers computes what we do, and we read them back."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import unmask
from tests.helpers import SHORT, lines, run_cli
from tests.helpers.runs import TWO_STEPS, tiny_run
from tests.helpers.text import byte_level, save_tokenizer, write_lines
from tests.parity.hf_folders import ROWS, write
from unmask.config import recipes
from unmask.data.prepare import PrepareSettings, prepare
from unmask.errors import UserError
from unmask.models.build import build_denoiser
from unmask.models.families import LAYOUTS
from unmask.models.hf_writing import choose_family
from unmask.tasks.task import build_task
from unmask.training.exporting import write_export
from unmask.training.importing import Import
from unmask.training.loading import LoadedRun

transformers = pytest.importorskip("transformers", reason="needs transformers >= 5.2: pip install 'unmask[hf]'")

SIZES = ["model.dim=16", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "data.length=8"]
SIZES += ["model.rotary=true", "model.learned_positions=false", "data.prompt_length=1"]
MODELS = {
    "llama": ["model.rope_theta=500"],
    "qwen2": ["model.qkv_bias=true", "model.tied_head=true", "model.alignment=next", "model.head_dim=6"],
    "qwen3": ["model.qk_norm=true", "model.head_dim=8", "model.norm_eps=1e-3"],
    "qwen3, blocks": ["model.qk_norm=true", "process={name: uniform, block_size: 4}", "decode.block_size=4"],
    "llama, ar": [
        "process={name: ar}",
        "model.causal=true",
        "model.alignment=next",
        "decode.order=left_to_right",
        "eval.orders=[left_to_right]",
        "eval.tokens_per_step=[1]",
    ],
}


def model_of(folder: Path, *settings: str, dtype: torch.dtype = torch.float32) -> Path:
    """Writes an export of a model of the task `toy`, as of step 1, with weights that all matter."""
    config = recipes.load("debug", [*TWO_STEPS, *SIZES, *settings])
    tokens = build_task(config).tokens
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str, value: Tensor) -> Tensor:
        scale = value.shape[-1] ** -0.5 if value.ndim > 1 else 0.3
        return torch.randn(value.shape, generator=generator) * scale + float(name.endswith("norm.weight"))

    state = build_denoiser(config.model, tokens).state_dict()
    tensors = {name: drawn(name, value).to(dtype) for name, value in state.items()}
    made = LoadedRun(folder, config, tensors, "raw", 1, torch.device("cpu"), kept_tokens=tokens)
    write_export(made, folder / "ours")
    return folder / "ours"


def their_logits(folder: Path, ids: Tensor, block_size: int | None = None, **options: Any) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    block = torch.arange(ids.shape[1]) // (block_size or ids.shape[1])
    hidden = torch.where(block[:, None] >= block, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        return model(ids, **({} if block_size is None else {"attention_mask": hidden[None, None]})).logits.float()


def our_logits(model: Any, ids: Tensor) -> Tensor:
    """Returns logits (B, L - 1, V) of the predictions of all positions but the first."""
    at = torch.arange(ids.numel()).view(ids.shape)[:, 1:]
    with torch.no_grad():
        return model.logits(ids, at.flatten()).unflatten(0, at.shape)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_and_we_read_it_back(name: str, tmp_path: Path) -> None:
    """Sums of fp32 in another order: rounding of 1e-6."""
    run, target = model_of(tmp_path, *MODELS[name]), tmp_path / "plain"
    source = unmask.export(run, target, layout="plain")
    assert Import(target).checkpoint.family_name == name.partition(",")[0]
    tokens, config = source.tokens, source.config.model
    known = torch.arange(tokens.vocab_size) != tokens.mask_id
    ids = known.nonzero().flatten()[torch.randint(int(known.sum()), (3, 8), generator=torch.Generator().manual_seed(1))]
    if not config.causal:
        ids[:, 3:6] = tokens.mask_id

    expected = our_logits(source.model, ids)[..., known]
    theirs = their_logits(target, ids, config.block_size)
    theirs = theirs[:, :-1] if config.alignment == "next" else theirs[:, 1:]
    assert expected.std() > 0.1
    assert torch.allclose(theirs[..., known[: theirs.shape[-1]]], expected, rtol=1e-5, atol=1e-5)

    again = Import(target)
    assert (again.tokens.vocab_size, again.tokens.mask_id) == (tokens.vocab_size, tokens.mask_id)
    assert (again.alignment, again.block_size, again.is_causal) == (config.alignment, config.block_size, config.causal)
    assert torch.equal(our_logits(unmask.load(target), ids)[..., known], expected)
    assert ("is_causal" in json.loads((target / "config.json").read_text())) is not config.causal


def test_bfloat16_stays_so(tmp_path: Path) -> None:
    target = tmp_path / "plain"
    unmask.export(model_of(tmp_path, *MODELS["qwen3"], dtype=torch.bfloat16), target, layout="plain")
    assert {value.dtype for value in load_file(target / "model.safetensors").values()} == {torch.bfloat16}
    assert transformers.AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3, blocks"])
def test_the_code_of_the_card_decodes_as_ours(name: str, tmp_path: Path) -> None:
    run, target = model_of(tmp_path, *MODELS[name]), tmp_path / "plain"
    tokens = unmask.export(run, target, layout="plain").tokens
    (code,) = re.findall(r"```python\n(.*?)```", (target / "README.md").read_text(), flags=re.DOTALL)
    scope: dict[str, Any] = {"FOLDER": target}
    exec(code, scope)
    first = next(i for i in range(tokens.vocab_size) if i != tokens.mask_id)
    canvas = torch.full((1, 8), tokens.mask_id)
    canvas[0, :2] = first
    source = LoadedRun.open(target)
    blocks = {} if source.config.model.block_size is None else {"block_size": 4, "cache": "block"}
    settings = source.config.decode.model_copy(update={"order": "prob", "tokens_per_step": 1, **blocks})
    expected = source.decoder(settings).decode(canvas).tokens
    assert torch.equal(scope["decode"](canvas), expected)


# --- other layouts ---------------------------------------------------------------------------------------------------

BLOCKS = ["process={name: uniform, block_size: 4}", "decode.block_size=4", "decode.cache=block"]
OTHERS = {
    "sdar": ["model.qk_norm=true", "model.head_dim=8", "decode.threshold=0.9", *BLOCKS],
    "sdar, tied": ["model.qk_norm=true", "model.tied_head=true", *BLOCKS],
    "dream": ["model.qkv_bias=true", "model.alignment=next", "decode.order=margin"],
    "llada": ["model.rope_theta=500", "model.norm_eps=1e-3"],
    "llada, tied": ["model.tied_head=true"],
}


def test_every_layout_is_tried() -> None:
    assert {"plain", *(name.partition(",")[0] for name in OTHERS)} == set(LAYOUTS)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_written_computes_and_decodes_the_same_when_read_back(name: str, tmp_path: Path) -> None:
    """To the last bit. That these tensors under these names are the family's is `test_hf_families.py`."""
    run, target, layout = model_of(tmp_path, *OTHERS[name]), tmp_path / "theirs", name.partition(",")[0]
    source = unmask.export(run, target, layout=layout)
    again, tokens = LoadedRun.open(target), source.tokens
    assert Import(target).checkpoint.family_name == LAYOUTS[layout].families[0]
    canvas = torch.full((2, 8), tokens.mask_id)
    canvas[:, 0] = torch.tensor([i for i in range(tokens.vocab_size) if i != tokens.mask_id][:2])
    assert torch.equal(our_logits(again.model, canvas), our_logits(source.model, canvas))
    settings = source.config.decode.model_copy(update={"tokens_per_step": 1, "threshold": None})
    assert torch.equal(*(each.decoder(settings).decode(canvas).tokens for each in (again, source)))
    unmask.export(target, tmp_path / "twice", layout=layout)
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        if file != "generation_config.json" or layout == "llada":  # decoding settings are those of the run
            assert (tmp_path / "twice" / file).read_bytes() == (target / file).read_bytes(), file


FOLDERS = {"sdar, b8": "sdar", "Dream": "dream", "llada": "llada", "llada, tied": "llada", "qwen3": "plain"}
DECISIVE = {"model_type", "block_size", "mask_token_id", "rope_theta", "rms_norm_eps", "is_causal", "alignment"}
DECISIVE |= {"hidden_size", "d_model", "embedding_size", "vocab_size", "weight_tying", "tie_word_embeddings", "n_heads"}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_published_model_goes_out_as_it_came_in(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "in", name)
    unmask.export(folder, tmp_path / "out", layout=FOLDERS[name])
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    given, written = (json.loads((tmp_path / each / "config.json").read_text()) for each in ("in", "out"))
    given = {**given, "vocab_size": ROWS}  # LLaDA counts tokens there, and we know rows alone without a tokenizer
    assert {key: written.get(key) for key in DECISIVE & given.keys()} == {
        key: given[key] for key in DECISIVE & given.keys()
    }
    assert written.get("n_kv_heads", 4) == given.get("n_kv_heads", 4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_mask_that_nothing_was_learned_about_cannot_win_elsewhere(tied: bool, tmp_path: Path) -> None:
    """Its logit is the mean of the others, so that its probability is at most 1 / V; a tied head is warned of."""
    run = model_of(tmp_path, *MODELS["llama"], f"model.tied_head={str(tied).lower()}")
    tokens = unmask.export(run, tmp_path / "plain", layout="plain").tokens
    card = (tmp_path / "plain" / "README.md").read_text()
    assert ("give the mask the logit -inf" in card) is tied
    if not tied:
        ids = torch.randint(tokens.vocab_size, (20, 8), generator=torch.Generator().manual_seed(3))
        share = their_logits(tmp_path / "plain", ids).softmax(-1)[..., tokens.mask_id]
        assert 0 < float(share.max()) <= 1 / tokens.vocab_size


def test_generation_settings_are_those_of_the_familys_decoding(tmp_path: Path) -> None:
    written = {}
    for layout in ("sdar", "dream"):
        unmask.export(model_of(tmp_path / layout, *OTHERS[layout]), tmp_path / layout / "out", layout=layout)
        written[layout] = json.loads((tmp_path / layout / "out" / "generation_config.json").read_text())
    assert written["dream"]["alg"] == "topk_margin"
    assert written["dream"]["steps"] == 8
    assert written["sdar"]["remasking_strategy"] == "low_confidence_dynamic"
    assert (written["sdar"]["block_length"], written["sdar"]["confidence_threshold"]) == (4, 0.9)


IMPOSSIBLE = [
    ("sdar", OTHERS["llada"], "model.qk_norm=false: queries and keys are always normalised"),
    ("sdar", OTHERS["llada"], "model.block_size=null: "),
    ("sdar", OTHERS["dream"], "model.qkv_bias=true: queries, keys and values have no biases there"),
    ("sdar", [*OTHERS["sdar"], "model.alignment=next"], "model.alignment=next: position i is read at i there"),
    ("sdar", MODELS["llama, ar"], "model.causal=true: SDAR fill in masks"),
    ("dream", OTHERS["llada"], "model.qkv_bias=false: queries, keys and values have biases always there"),
    ("dream", OTHERS["sdar"], "model.block_size=4: every position sees all others there"),
    ("dream", MODELS["qwen2"], "model.head_dim=6: a head has 4 there"),
    ("llada", OTHERS["dream"], "model.alignment=next: position i is read at i there"),
    ("llada", OTHERS["sdar"], "model.qk_norm=true: queries and keys are not normalised there"),
    ("llada", ["model.learned_positions=true"], "model.learned_positions=true: "),
]


@pytest.mark.parametrize(("layout", "settings", "message"), IMPOSSIBLE, ids=lambda value: str(value)[:24])
def test_what_a_layout_cannot_express(layout: str, settings: list[str], message: str) -> None:
    config = recipes.load("debug", [*TWO_STEPS, *SIZES, *settings]).model
    fix = "export it with --layout unmask" + (" or --layout plain" if "learned" not in message else "")
    with pytest.raises(UserError, match=rf"^here: .*{re.escape(message)}.*; {fix}$"):
        choose_family(config, layout, "here")


# --- text ------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TALKS = [
    {"messages": [{"role": "user", "content": f"Why {i}?"}, {"role": "assistant", "content": f"So {i}."}]}
    for i in range(20)
]


def chat_run(folder: Path, vocab: str) -> Path:
    save_tokenizer(folder / "tokenizer", byte_level())
    (folder / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    rows = write_lines(folder / "rows.jsonl", TALKS)
    prepare(PrepareSettings("chat", str(folder / "tokenizer"), folder / "data", (str(rows),), 64, "drop", vocab))
    small = "model={preset: tinygsm-small, dim: 16, ff_dim: 24, num_layers: 1, num_heads: 2}"
    settings = [small, f"data.path={folder / 'data'}", "data.validation_ratio=0.1", "optim.warmup_steps=1"]
    machine = ["train.compile=false", "train.batch_size=4", "train.threads=1", "train.device=cpu", "eval.examples=2"]
    assert run_cli("train", "chat/uniform", *settings, *machine, *SHORT, "--out", folder / "run") == 0
    return folder / "run"


def test_a_model_of_conversations_takes_its_tokenizer_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, target = chat_run(tmp_path, "full"), tmp_path / "plain"
    assert run_cli("export", run, target, "--layout", "plain") == 0
    assert "a model of type qwen2, with the" in capsys.readouterr().err
    source = LoadedRun.open(run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    assert tokenizer.mask_token_id == source.tokens.mask_id == len(tokenizer) - 1
    assert tokenizer.eos_token_id == source.tokens.eos_id
    canvas = source.task.prompts([json.dumps({"messages": TALKS[0]["messages"][:1]})], "here")[0]
    asked = canvas[canvas != source.tokens.mask_id].tolist()
    written = tokenizer.apply_chat_template(TALKS[0]["messages"][:1], add_generation_prompt=True, return_dict=True)
    assert written["input_ids"] == asked
    generation = transformers.GenerationConfig.from_pretrained(target)
    names = [tokenizer.convert_ids_to_tokens(i) for i in generation.eos_token_id]
    assert names == ["<|endoftext|>", "<|im_end|>"]

    again = LoadedRun.open(target)
    assert again.task.vocabulary.encode("Why 3?") == source.task.vocabulary.encode("Why 3?")
    is_known = torch.arange(source.tokens.vocab_size) != source.tokens.mask_id
    for name, value in source.tensors.items():
        rows = is_known if name == "backbone.head.weight" else ...  # the head's row of the mask was never learned
        assert torch.equal(again.tensors[name][rows], value[rows]), name
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"messages": TALKS[0]["messages"][:1]}])
    assert run_cli("decode", target, prompts, "--out", tmp_path / "out.jsonl") == 0
    assert lines(tmp_path / "out.jsonl")[0]["tokens"][: len(asked)] == asked


@pytest.mark.parametrize("recipe", ["uniform_small", "ar_small"])
def test_a_model_of_running_text_is_read_back(recipe: str, tmp_path: Path) -> None:
    """No answer ends there, but its tokenizer names the token that ends a document: rows of text need one."""
    write_lines(tmp_path / "rows.jsonl", [{"text": f"row {i} of a text that is short"} for i in range(40)])
    small = ["model.preset=tiny", "model.rotary=true", "model.learned_positions=false", "optim.warmup_steps=1"]
    settings = [f"data.path={tmp_path / 'rows.jsonl'}", "data.length=16", "data.validation_ratio=0.2", *small]
    machine = ["train.compile=false", "train.batch_size=4", "train.threads=1", "train.device=cpu", "eval.examples=2"]
    run, target = tmp_path / "run", tmp_path / "plain"
    assert run_cli("train", f"text/{recipe}", *settings, *machine, *SHORT, "--out", run) == 0
    assert run_cli("export", run, target, "--layout", "plain") == 0
    source, again = LoadedRun.open(run), LoadedRun.open(target)
    assert source.tokens.eos_id is None
    assert again.task.vocabulary.eos_id == source.task.vocabulary.eos_id
    assert f"{again.task.vocabulary.eos_id} ends a document" in (target / "README.md").read_text()
    assert run_cli("eval", target, "--data", tmp_path / "rows.jsonl", "--examples", 2) == 0


def test_ids_of_its_own_leave_the_tokenizer_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("export", chat_run(tmp_path, "used"), tmp_path / "plain", "--layout", "plain") == 0
    assert "the tokenizer is left out; for a model with the tokenizer's own ids" in capsys.readouterr().err
    assert not (tmp_path / "plain" / "tokenizer.json").exists()
    assert LoadedRun.open(tmp_path / "plain").config.task.name == "tokens"


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.learned_positions=true"], "model.learned_positions=true: "),
        (["model.learned_positions=true", "model.rotary=false"], "model.rotary=false: "),
        (["model.rotary_layout=reference"], "model.rotary_layout=reference: "),
        (["model.out_bias=true"], "model.out_bias=true: "),
        (["model.qkv_bias=true", "model.qk_norm=true"], "model.qkv_bias=true and model.qk_norm=true: "),
        (["model.self_conditioning=true"], "model.self_conditioning=true: "),
        (["model.loops={layers: [0, 0], times: 2}"], "model.loops: "),
    ],
)
def test_what_no_class_of_theirs_is(settings: list[str], message: str, tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", *settings).train()
    with pytest.raises(UserError, match=rf"{re.escape(message)}.*; export it with --layout unmask"):
        unmask.export(tmp_path / "run", tmp_path / "plain", layout="plain")
    assert not (tmp_path / "plain").exists()


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "mine").write_text("x")
    with pytest.raises(UserError, match="is not an empty folder"):
        unmask.export(tmp_path, tmp_path / "plain", layout="plain")


def test_adapters_have_a_layout_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("export", tmp_path, tmp_path / "out", "--adapter", "--layout", "plain") == 2
    assert "--adapter is in PEFT's format" in capsys.readouterr().err
