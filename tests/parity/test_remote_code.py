"""The code beside an export, in transformers: our logits, our greedy tokens, and the arguments that people give."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

import unmask
from tests.helpers import SHORT, run_cli
from tests.helpers.runs import tiny_run
from tests.helpers.text import byte_level, save_tokenizer, write_lines
from tests.parity.test_hf_writing import SIZES, chat_run, model_of, our_logits
from unmask.data.prepare import PrepareSettings, prepare
from unmask.decoding.config import DecodeConfig
from unmask.decoding.truncation import truncated
from unmask.models.transformer_config import TransformerConfig
from unmask.training.hf_card import not_in_our_code
from unmask.training.loading import LoadedRun

transformers = pytest.importorskip("transformers", reason="needs transformers >= 4.57: pip install 'unmask[hf]'")

LENGTH = 8
MODELS = {
    "learned positions, biases": ["model.rotary=false", "model.learned_positions=true", "model.out_bias=true"],
    "biases, norms, tied, next": [
        *("model.qkv_bias=true", "model.qk_norm=true", "model.tied_head=true", "model.alignment=next"),
        "model.head_dim=6",
    ],
    "blocks": ["process={name: uniform, block_size: 4}", "model.norm_eps=1e-3"],
    "blocks, next": ["process={name: uniform, block_size: 2}", "model.alignment=next"],
    "two angles in a pair": ["model.rotary_layout=reference", "model.out_bias=true"],
    "loops": ["model.loops={layers: [0, 1], times: 2}"],
    "causal": [
        *("process={name: ar}", "model.causal=true", "model.alignment=next", "decode.order=left_to_right"),
        *("eval.orders=[left_to_right]", "eval.tokens_per_step=[1]"),
    ],
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps transformers' copies of the code out of the user's home."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def export(folder: Path, *settings: str) -> tuple[LoadedRun, Any]:
    """Writes a model whose weights all matter; returns it as ours, and as transformers loads it."""
    written = model_of(folder, *settings)
    return LoadedRun.open(written), theirs(written)


def theirs(folder: Path, auto: str = "AutoModel") -> Any:
    found = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    return found.eval() if isinstance(found, torch.nn.Module) else found


def prompts(source: LoadedRun, count: int = 3) -> Tensor:
    """Canvases whose first `n` positions are given, n = 1, 2, .."""
    given = torch.randint(source.tokens.vocab_size, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    given[given == source.tokens.mask_id] = (source.tokens.mask_id + 1) % source.tokens.vocab_size
    return torch.where(torch.arange(LENGTH) <= torch.arange(count)[:, None], given, source.tokens.mask_id)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_ours(name: str, tmp_path: Path) -> None:
    source, model = export(tmp_path, *MODELS[name])
    canvas = prompts(source)
    expected = our_logits(source.model, canvas)
    with torch.no_grad():
        logits = model(canvas).logits[:, 1:]
    assert expected[expected > -torch.inf].std() > 0.1
    assert torch.equal(logits == -torch.inf, expected == -torch.inf)
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)

    pairs: list[tuple[str, dict[str, Any]]] = [("prob", {"tokens_per_step": 2}), ("margin", {"threshold": 0.3})]
    if source.model.is_causal:
        pairs = [("left_to_right", {"tokens_per_step": 1})]
    elif name == "loops":
        pairs += [("neg_entropy", {"tokens_per_step": 1}), ("right_to_left", {"threshold": 0.4})]
    for order, rule in pairs:
        settings = source.config.decode.model_copy(update={"order": order, **rule})
        ours = source.decoder(settings).decode(canvas).tokens
        assert torch.equal(model.generate(canvas, max_new_tokens=0, order=order, **rule), ours), (order, rule)


def test_every_setting_of_the_network_is_known_to_the_code() -> None:
    """A new one that decides the logits would be ignored there without a word: add it to the code and to `MODELS`."""
    code = Path("unmask/training/modeling_unmask.py")
    read = {*re.findall(r"model\.([a-z_]+)", (Path(__file__).parents[2] / code).read_text())}
    of_training = {"name", "preset", "dropout", "init", "embedding_std", "checkpointing", "attention", "lora"}
    assert {*TransformerConfig.model_fields} - of_training - {"self_conditioning"} <= read


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModelForMaskedLM"])
def test_every_auto_class_and_what_the_run_decodes_with(auto: str, tmp_path: Path) -> None:
    settings = ["decode.order=margin", "decode.tokens_per_step=3", "decode.block_size=4"]
    written = model_of(tmp_path, *settings)
    source, model = LoadedRun.open(written), theirs(written, auto)
    canvas = prompts(source)
    ours = source.decoder(source.config.decode).decode(canvas).tokens
    assert torch.equal(model.generate(canvas[:1, :1])[0], ours[0])  # as many new ones as the canvas has room for
    assert torch.equal(model.generate(canvas, max_new_tokens=0), ours)
    (code,) = re.findall(r"```python\n(.*?)```", (written / "README.md").read_text(), flags=re.DOTALL)
    exec(code, {"FOLDER": written})


def test_an_amount_that_is_given_replaces_that_of_the_run(tmp_path: Path) -> None:
    source, model = export(tmp_path, "decode.threshold=0.3")
    canvas, steps, step = prompts(source), [], model._step
    model._step = lambda *given: (steps.append(1), step(*given))
    eight, none = (transformers.GenerationConfig(**each) for each in ({"tokens_per_step": 8}, {"threshold": None}))
    for options, amount in (
        ({}, {"threshold": 0.3}),
        ({"tokens_per_step": 2}, {"tokens_per_step": 2}),
        ({"tokens_per_step": 2, "threshold": None}, {"tokens_per_step": 2}),
        ({"threshold": None}, {"tokens_per_step": 1}),
        ({"threshold": 0.9}, {"threshold": 0.9}),
        ({"generation_config": eight}, {"tokens_per_step": 8}),
        ({"generation_config": none}, {"tokens_per_step": 1}),
        ({"generation_config": eight, "threshold": 0.9}, {"threshold": 0.9}),
    ):
        settings = DecodeConfig(order=source.config.decode.order, **amount)
        ours = source.decoder(settings).decode(canvas)
        steps.clear()
        assert torch.equal(model.generate(canvas, max_new_tokens=0, **options), ours.tokens), options
        assert len(steps) == int(ours.nfe.max()), options


def test_what_follows_a_block_is_left_unread_as_in_the_run(tmp_path: Path) -> None:
    source, model = export(tmp_path, "decode.block_size=2", "decode.reads_ahead=false")
    canvas = prompts(source)
    ours = source.decoder(source.config.decode).decode(canvas).tokens
    assert torch.equal(model.generate(canvas, max_new_tokens=0), ours)
    assert not torch.equal(model.generate(canvas, max_new_tokens=0, reads_ahead=True), ours)


def test_what_generate_does_not_know_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else it would write other tokens than the run without a word."""
    written = model_of(tmp_path, "decode.steps=3", "decode.forbid=[1]", "decode.stop_early=false")
    assert json.loads((written / "generation_config.json").read_text())["stop_early"] is False
    assert "does not know decode.steps=3, decode.forbid=[1]," in " ".join(capsys.readouterr().err.split())
    card = " ".join((written / "README.md").read_text().split())
    assert "but for `decode.steps=3`, `decode.forbid=[1]`: `generate` does not know that" in card
    known = {"threshold": 0.5, "block_size": 4, "reads_ahead": False, "temperature": 0.5, "top_k": 2, "seed": 3}
    assert not not_in_our_code(DecodeConfig(**known, stop_early=False))


@pytest.mark.parametrize("name", ["biases, norms, tied, next", "blocks", "learned positions, biases"])
def test_prompts_of_unequal_lengths_are_what_each_is_alone(name: str, tmp_path: Path) -> None:
    """Padding on either side; equal but for the rounding of sums over other widths, which here changes no token."""
    source, model = export(tmp_path, *MODELS[name])
    canvas = prompts(source)
    alone = [model.generate(canvas[i : i + 1, : i + 1], max_new_tokens=4)[0, i + 1 :] for i in range(3)]
    is_given = torch.arange(3) <= torch.arange(3)[:, None]
    for side in ("left", "right"):
        ids, seen = canvas[:, :3] * is_given, is_given.long()
        if side == "left":
            ids, seen = (torch.stack([row.roll(2 - i) for i, row in enumerate(each)]) for each in (ids, seen))
        together = model.generate(input_ids=ids, attention_mask=seen, max_new_tokens=4)
        assert torch.equal(together[:, 3:], torch.stack(alone)), side


def test_values_are_drawn_from_the_models_distribution(tmp_path: Path) -> None:
    """4,000 draws of one position: each share within 5 standard errors; top_k=1 takes the likeliest."""
    source, model = export(tmp_path, "data.length=8")
    canvas = prompts(source, 1)
    canvas[:, 1:-1] = canvas[0, 0]
    with torch.no_grad():
        p = (model(canvas).logits[0, -1] / 2).softmax(-1)
    torch.manual_seed(0)
    drawn = model.generate(canvas.repeat(4000, 1), max_new_tokens=0, do_sample=True, temperature=2.0, top_k=0)[:, -1]
    share = torch.bincount(drawn, minlength=len(p)) / 4000
    assert bool(((share - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt()).all())
    assert torch.equal(
        model.generate(canvas, max_new_tokens=0, do_sample=True, top_k=1), model.generate(canvas, max_new_tokens=0)
    )


@pytest.mark.parametrize(("top_k", "top_p"), [(2, 0.65), (4, 0.65), (2, 0.95), (3, 1.0), (0, 0.65)])
def test_both_limits_keep_what_ours_keep(top_k: int, top_p: float, tmp_path: Path) -> None:
    """1,200 draws, of tokens of at least 8 %: one that is kept is missed once in e^100 times."""
    _, model = export(tmp_path)
    chosen = {"do_sample": True, "temperature": 0.5, "top_k": top_k, "top_p": top_p}
    logits = torch.tensor([[0.1, 0.5, 0.2, 0.12, 0.08]]).log() / 2
    torch.manual_seed(0)
    drawn = model._values(logits.repeat(1200, 1), model._warpers(lambda name, default: chosen[name]))
    kept = truncated(logits.double() / 0.5, top_k or None, top_p if top_p < 1 else None) > -torch.inf
    assert drawn.unique().tolist() == kept[0].nonzero().flatten().tolist()


def test_what_transformers_saves_is_still_ours(tmp_path: Path) -> None:
    """As after a training there; the code goes along, and gradients reach every weight."""
    source, model = export(tmp_path, *MODELS["biases, norms, tied, next"])
    canvas = prompts(source)
    labels = torch.where(canvas == source.tokens.mask_id, 0, -100)
    model(canvas, labels=labels).loss.backward()
    assert all(bool(value.grad.any()) for value in model.parameters())
    with torch.no_grad():
        model.backbone.norm.weight *= 1.5
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_unmask.py").exists()
    again = our_logits(unmask.load(tmp_path / "saved"), canvas)
    assert torch.allclose(again, theirs(tmp_path / "saved")(canvas).logits[:, 1:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(again, our_logits(source.model, canvas), rtol=1e-2)


def test_a_conversation_from_the_tokenizer_to_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`generate(**inputs)` takes what the tokenizer gives, and ignores what it has no use for, with a warning."""
    run, target = chat_run(tmp_path, "full"), tmp_path / "out"
    assert run_cli("export", run, target) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "transformers reads it too" in said
    assert f"config.json names places on this machine: data.path={tmp_path / 'data'};" in said
    described = json.loads((target / "config.json").read_text())
    described["run"]["data"]["path"] = None
    (target / "config.json").write_text(json.dumps(described))
    assert not [file for file in target.rglob("*.*") if str(tmp_path).encode() in file.read_bytes()]
    tokenizer, model, source = theirs(target, "AutoTokenizer"), theirs(target), LoadedRun.open(run)
    messages = [{"role": "user", "content": "Why 3?"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", tokenize=True
    )
    answer = model.generate(**inputs, use_cache=True, num_beams=1, tokens_per_step=4)
    canvas = source.task.prompts([json.dumps({"messages": messages})], "here")
    settings = source.config.decode.model_copy(update={"tokens_per_step": 4, "dtype": "float32"})
    assert torch.equal(answer, LoadedRun.open(target).decoder(settings).decode(canvas).tokens)
    end = int(answer[0, inputs["input_ids"].shape[1] + 2])
    model.config.tokens |= {"eos_id": end, "pad_id": end}
    assert not torch.equal(model.generate(**inputs, tokens_per_step=4), answer)  # what follows is end tokens
    model.generation_config.stop_early = False  # as an export has it
    assert torch.equal(model.generate(**inputs, tokens_per_step=4), answer)
    assert set(tokenizer(["Why?", "So what?"], padding=True)) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("has_own", [False, True])
def test_a_text_starts_as_the_rows_do(has_own: bool, tmp_path: Path) -> None:
    """As for `unmask decode`, whatever the tokenizer put around a text; and once, also where it is exported again."""
    tokenizer = byte_level()
    if has_own:
        around = [(name, tokenizer.token_to_id(name)) for name in ("<|im_start|>", "<|im_end|>")]
        tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=around)
    save_tokenizer(tmp_path / "tokenizer", tokenizer)
    rows = write_lines(tmp_path / "rows.jsonl", [{"text": f"row {i} of a text that is short"} for i in range(40)])
    prepare(PrepareSettings("text", str(tmp_path / "tokenizer"), tmp_path / "data", (str(rows),), 16))
    settings = [f"data.path={tmp_path / 'data'}", "model.preset=tiny", "model.rotary=true", "train.batch_size=4"]
    settings += ["model.learned_positions=false", "optim.warmup_steps=1", "train.compile=false", "eval.examples=2"]
    machine = ["train.threads=1", "train.device=cpu", *SHORT]
    assert run_cli("train", "text/uniform_small", *settings, *machine, "--out", tmp_path / "run") == 0
    source = unmask.export(tmp_path / "run", tmp_path / "ours")
    unmask.export(tmp_path / "run", tmp_path / "plain", layout="plain")
    unmask.export(tmp_path / "plain", tmp_path / "twice", layout="plain")
    canvas = source.task.prompts(["a row"], "here")
    given = canvas[canvas != source.tokens.mask_id].tolist()
    for folder in ("ours", "plain", "twice"):
        inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)("a row", return_tensors="pt")
        assert inputs["input_ids"].tolist() == [given], folder
        assert torch.equal(LoadedRun.open(tmp_path / folder).task.prompts(["a row"], "here"), canvas), folder
        assert f"| start | {given[0]}, before every text |" in (tmp_path / folder / "README.md").read_text()
    decoder = LoadedRun.open(tmp_path / "ours").decoder(source.config.decode.model_copy(update={"dtype": "float32"}))
    assert torch.equal(theirs(tmp_path / "ours").generate(**inputs), decoder.decode(canvas).tokens)


def test_a_model_that_the_code_cannot_run_is_for_this_package_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run(tmp_path / "run", *SIZES, "model.self_conditioning=true").train()
    assert run_cli("export", tmp_path / "run", tmp_path / "out") == 0
    assert "this package alone reads it: model.self_conditioning=true" in capsys.readouterr().err
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
