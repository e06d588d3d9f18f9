"""Adapters on a frozen base: all of them learn, the base is kept by digest alone, and PEFT reads what we write."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import unmask
from tests.helpers import SHORT, run_cli
from tests.helpers.checkpoints import write_llama
from unmask.errors import UserError
from unmask.masking.process import masked_batch
from unmask.models import cost, lora
from unmask.models.build import build_denoiser
from unmask.models.denoiser import Denoiser
from unmask.models.families import LLADA_NAMES, LLAMA_NAMES
from unmask.models.lora import LoraConfig
from unmask.models.on_demand import OnDemand
from unmask.models.transformer_config import TransformerConfig
from unmask.training import checkpoint
from unmask.training.digest import weights_digest
from unmask.training.initial import BaseTensors
from unmask.training.loading import LoadedRun
from unmask.types import TokenSpec

pytest.importorskip("peft", reason="needs PEFT: pip install 'unmask[peft]'")

MASK = 22
TOKENS = TokenSpec(vocab_size=MASK + 1, length=12, mask_id=MASK)
SIZES = {"dim": 64, "ff_dim": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True}
BASES = ["float32", "bfloat16", "nf4"]


def need(base: str) -> None:
    if base == "nf4":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'unmask[qlora]'")


def config(**settings: Any) -> TransformerConfig:
    given = {"lora": settings.pop("lora", None), **SIZES, **settings}
    return TransformerConfig(**given)


def canvas() -> tuple[Tensor, Tensor]:
    xt = torch.randint(0, MASK, (3, TOKENS.length), generator=torch.Generator().manual_seed(0))
    xt[:, 3:7] = MASK
    return xt, (xt.flatten() == MASK).nonzero().flatten()


def adapted(base: str = "float32", *, tied: bool = True, **settings: Any) -> tuple[Denoiser, dict[str, Tensor]]:
    """A model whose adapters and row of the mask are not 0, and the weights of its base."""
    weights = build_denoiser(config(tied_head=tied), TOKENS, seed=1).state_dict()
    model = build_denoiser(config(tied_head=tied, lora={"rank": 4, "base": base}, **settings), TOKENS)
    lora.load_base(model, weights, trains_mask_row=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model, weights


def nll(model: Denoiser) -> Tensor:
    xt, _ = canvas()
    x0 = torch.where(xt == MASK, 3, xt)
    return model(masked_batch(x0, xt, MASK, torch.zeros(len(xt)))).nll


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_every_adapter_learns_and_the_merged_model_computes_the_same(base: str, tied: bool) -> None:
    need(base)
    model, weights = adapted(base, tied=tied)
    assert {name for name, *_ in lora._base(model)} == set(weights)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    kept = [name.removeprefix("backbone.").removeprefix("blocks.0.") for name in model.state_dict()]
    assert len(kept) == 2 * 7 * 2 + 1
    assert all("lora_" in name or name == "embedding.mask_delta" for name in kept)
    nll(model).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-6, name
    plain = build_denoiser(config(tied_head=tied), TOKENS).eval()
    settings = LoraConfig(rank=4, base=base)
    plain.load_state_dict(lora.merge(weights, model.state_dict(), settings, MASK))
    # Products in another order, of values of about 1.
    assert torch.allclose(model.eval().logits(*canvas()), plain.logits(*canvas()), atol=1e-4)
    before = model.logits(*canvas())
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            old = parameter.clone()
            parameter.mul_(2)
            assert not torch.allclose(model.logits(*canvas()), before, atol=1e-6), name
            parameter.copy_(old)


def test_a_base_keeps_its_format_in_every_format_of_the_model() -> None:
    model, weights = adapted("bfloat16")
    for name in ("float64", "bfloat16", "float32"):
        model.use_dtype(name)
        assert model.backbone.embedding.weight.dtype == torch.bfloat16
        nll(model).sum().backward()
    rounded = weights["backbone.blocks.0.mlp.up.weight"].bfloat16()
    assert torch.equal(model.backbone.blocks[0].mlp.up.base_layer.weight, rounded)


def test_activation_checkpoints_change_no_gradient() -> None:
    plain, saving = (adapted(checkpointing=checkpointing)[0] for checkpointing in (False, True))
    for model in (plain, saving):
        nll(model.train()).sum().backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_row_of_the_mask_that_is_not_trained_has_no_gradient() -> None:
    model, weights = adapted()
    lora.load_base(model, weights, trains_mask_row=False)
    nll(model).sum().backward()
    assert model.backbone.embedding.mask_delta.grad.abs().max() == 0


@pytest.mark.parametrize("targets", [["q", "v"], ["down"], None])
def test_what_is_trained_is_counted(targets: list[str] | None) -> None:
    given = {"rank": 3, "base": "bfloat16"} | ({} if targets is None else {"targets": targets})
    settings = config(lora=given, tied_head=True)
    model = build_denoiser(settings, TOKENS)
    assert cost.count_trained(settings, TOKENS) == sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in build_denoiser(config(tied_head=True), TOKENS).parameters())
    assert cost.count_held_bytes(settings, TOKENS) == 2 * matrices


def test_the_base_of_a_model_that_would_not_fit_in_adamw_does(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [config(), config(lora={"rank": 1})]
    needed = []
    monkeypatch.setattr(cost, "require_memory", lambda number, *_, **__: needed.append(number))
    for each in settings:
        cost.require_memory_for_model(each, TOKENS, copies=4)
    assert needed[3] < needed[1] / 4


# --- from the command line -------------------------------------------------------------------------------------------

LAYERS = "{preset: null, dim: 32, ff_dim: 48, num_layers: 2, num_heads: 4, num_kv_heads: 2, tied_head: true}"
ADAPTERS = [f"model={LAYERS}", "model.lora={rank: 4, base: float32}", "ema.decay=0.5", "eval.examples=4", *SHORT]


def train(folder: Path, run: str, *more: str) -> int:
    settings = [*ADAPTERS, f"train.init={folder / 'base'}"]
    return run_cli("train", "debug", *settings, "--out", folder / run, *more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, which has no row for the mask, and a `run` of four steps on it."""
    folder = tmp_path_factory.mktemp("lora")
    write_llama(folder / "base", rows=SUDOKU_ROWS)
    assert train(folder, "run") == 0
    return folder


def state(folder: Path, step: int) -> dict[str, Tensor]:
    found = checkpoint.path_of(folder / "checkpoints", step)
    return {f"{part}/{key}": value for part in PARTS for key, value in checkpoint.load_part(found, part).items()}


SUDOKU_ROWS = 10  # digits, and 0; the mask comes after them
PARTS = ("model", "optimizer", "ema/shadow", "process")


def test_checkpoints_hold_adapters_alone_and_the_name_of_the_base(trained: Path) -> None:
    found = checkpoint.path_of(trained / "run" / "checkpoints", 4)
    for name in state(trained / "run", 4):
        assert name.startswith("process/") or "lora_" in name or "mask_delta" in name, name
    kept = checkpoint.load_rest(found)["base"]
    assert kept["source"] == str(trained / "base")
    delta = checkpoint.load_part(found, "model")["backbone.embedding.mask_delta"]
    assert delta.abs().max() > 0  # the base has no row for the mask, so it is trained


def test_a_resumed_run_is_the_same_to_the_bit(trained: Path) -> None:
    assert train(trained, "half", "train.max_examples=32") == 0
    assert train(trained, "half", "--resume") == 0
    whole, half = state(trained / "run", 4), state(trained / "half", 4)
    assert set(whole) == set(half)
    for name, value in whole.items():
        assert torch.equal(value, half[name]), name


def test_another_base_is_refused_and_the_same_elsewhere_is_taken(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trained / "base" / "model.safetensors"
    own, settings = file.read_bytes(), (trained / "run" / "config.yaml").read_bytes()
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, file, {"format": "pt"})
    try:
        assert train(trained, "run", "--resume", "train.steps=6") == 2
        assert "put back the weights" in " ".join(capsys.readouterr().err.split())
        assert (trained / "run" / "config.yaml").read_bytes() == settings
        found = LoadedRun.open(trained / "run")
        with pytest.raises(UserError, match="put back the weights"):
            _ = found.model
        with pytest.raises(UserError, match="put back the weights"):  # who goes on all the same
            _ = found.tensors["backbone.norm.weight"]
        for kind in ([], ["--layout", "plain"], ["--adapter"]):
            assert run_cli("export", trained / "run", trained / "of_another", *kind) == 2
            assert "put back the weights" in " ".join(capsys.readouterr().err.split())
            assert not (trained / "of_another").exists()
    finally:
        file.write_bytes(own)
    (trained / "base").rename(trained / "moved")
    try:
        assert train(trained, "run", "--resume", f"train.init={trained / 'moved'}") == 0
    finally:
        (trained / "moved").rename(trained / "base")
        assert train(trained, "run", "--resume") == 0


def test_a_base_is_read_once(trained: Path, tmp_path: Path) -> None:
    """Its digest is computed, and compared, while its weights are used."""
    (tmp_path / "count.py").write_text(COUNT)  # a process of its own: checks of types read tensors too
    command = [sys.executable, tmp_path / "count.py", trained / "run", tmp_path]
    counts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    names = load_file(trained / "base" / "model.safetensors")
    assert counts == {kind: dict.fromkeys(names, 1) for kind in ("model", "trainer", "unmask", "plain", "start")}


COUNT = """
import json
import sys
from collections import Counter
from pathlib import Path

from unmask.models import hf_weights
from unmask.tasks.task import build_task
from unmask.training import exporting
from unmask.training.folder import read_config
from unmask.training.loading import LoadedRun
from unmask.training.restoring import start_warm
from unmask.training.trainer import Trainer

run, folder = map(Path, sys.argv[1:])
real, read = hf_weights._read_tensor, Counter()


def counted(file, name):
    read[name] += 1
    return real(file, name)


def start():
    config = read_config(run)
    task = build_task(config)
    start_warm(Trainer(config, task.tokens, task.train_stream(0)), task)


hf_weights._read_tensor = counted
uses = {
    "model": lambda: LoadedRun.open(run).model,
    "trainer": lambda: LoadedRun.open(run).trainer(),
    "unmask": lambda: exporting.export(run, folder / "ours"),
    "plain": lambda: exporting.export(run, folder / "plain", layout="plain"),
    "start": start,
}
found = {}
for kind, use in uses.items():
    read.clear()
    use()
    found[kind] = dict(read)
print(json.dumps(found))
"""


def test_a_base_in_any_order_is_compared_before_it_is_used() -> None:
    weights = {name: torch.full((2,), float(i)) for i, name in enumerate("cab")}
    base = BaseTensors(OnDemand(weights, weights.__getitem__))
    seen: list[str] = []
    base.compare(None, seen.append)
    assert not seen
    assert torch.equal(base["b"], weights["b"])
    assert seen == [base.sha256] == [weights_digest(weights)]


def test_what_takes_a_run_takes_one_with_adapters(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "puzzles").write_text("123456789" + "0" * 72 + "\n")
    assert run_cli("decode", trained / "run", trained / "puzzles", "--out", trained / "answers") == 0
    assert run_cli("eval", trained / "run", "--examples", "2") == 0
    assert run_cli("diagnose", trained / "run", "--only", "nll", "--draws", 1, "--examples", 2) == 0
    assert run_cli("export", trained / "run", trained / "merged") == 0
    whole, merged = unmask.load(trained / "run"), unmask.load(trained / "merged")
    assert whole.state_dict().keys() == merged.state_dict().keys()
    assert not any("lora" in name for name in merged.state_dict())
    more = [*ADAPTERS, f"train.init={trained / 'run'}", "--out", trained / "second"]
    assert run_cli("train", "debug", *more) == 2
    assert "has adapters itself" in " ".join(capsys.readouterr().err.split())
    assert run_cli("export", trained / "merged", trained / "none", "--adapter") == 2


def test_peft_and_transformers_compute_the_same_from_the_adapters_and_from_the_merged(trained: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.2")
    import peft

    assert run_cli("export", trained / "run", trained / "adapter", "--adapter") == 0
    described = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert described["task_type"] is None
    assert "q_proj" in described["target_modules"]
    assert described["trainable_token_indices"] == [SUDOKU_ROWS]
    model = unmask.load(trained / "run")
    xt = torch.randint(0, SUDOKU_ROWS, (2, 81), generator=torch.Generator().manual_seed(0))
    xt[:, 5:60] = model.mask_id
    expected = model.logits(xt, torch.arange(xt.numel()))[:, :SUDOKU_ROWS].unflatten(0, xt.shape)
    base = transformers.LlamaForCausalLM.from_pretrained(trained / "base", attn_implementation="sdpa")
    base.resize_token_embeddings(SUDOKU_ROWS + 1, mean_resizing=False)
    found = peft.PeftModel.from_pretrained(base, trained / "adapter").eval()
    assert torch.allclose(found(xt).logits[..., :SUDOKU_ROWS], expected, atol=1e-5)
    merged = {LLAMA_NAMES.theirs(name): value for name, value in model.backbone.state_dict().items()}
    plain = transformers.LlamaForCausalLM(base.config).eval()
    plain.load_state_dict(merged | {"lm_head.weight": merged["model.embed_tokens.weight"]})
    assert torch.allclose(plain(xt).logits[..., :SUDOKU_ROWS], expected, atol=1e-5)


def llada_tree(layers: int) -> nn.Module:
    """The modules of LLaDA, as its code names them: the head has the name of a layer of every block."""
    width, ff = SIZES["dim"], SIZES["ff_dim"]
    shapes = dict.fromkeys(("q_proj", "attn_out"), (width, width)) | dict.fromkeys(("k_proj", "v_proj"), (width, 32))
    shapes |= dict.fromkeys(("ff_proj", "up_proj"), (width, ff)) | {"ff_out": (ff, width)}
    blocks = nn.ModuleList(
        nn.ModuleDict({key: nn.Linear(*shape) for key, shape in shapes.items()}) for _ in range(layers)
    )
    parts = {"wte": nn.Embedding(MASK + 1, width), "blocks": blocks, "ff_out": nn.Linear(width, MASK + 1)}
    return nn.ModuleDict({"model": nn.ModuleDict({"transformer": nn.ModuleDict(parts)})})


@pytest.mark.parametrize("targets", [{}, {"targets": ["up", "down"]}])
def test_peft_adapts_what_was_trained_of_a_llada_and_not_its_head(targets: dict[str, Any]) -> None:
    import peft

    weights = build_denoiser(config(tied_head=False), TOKENS).state_dict()
    settings = LoraConfig(rank=4, **targets)
    state = build_denoiser(config(tied_head=False, lora=settings.model_dump()), TOKENS).state_dict()
    tensors, described = lora.to_peft(
        weights, state, settings, their_name=LLADA_NAMES.theirs, source="llada", mask_row=None
    )
    model = peft.PeftModel(llada_tree(SIZES["num_layers"]), peft.LoraConfig(**described))
    made = {name.replace(".default", "") for name in model.state_dict() if "lora_" in name}
    assert made == tensors.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim.name=muon"], "optim.name=muon"),
        (["train.parallel=fsdp"], "train.parallel=fsdp"),
        (["train.init=null"], "train.init is missing"),
        (["model.lora.targets=[head]"], "model.lora.targets"),
        (["model.self_conditioning=true"], "self_conditioning"),
    ],
)
def test_what_adapters_cannot_be_trained_with_is_refused(
    settings: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("train", "debug", *ADAPTERS, "train.init=x", *settings, "--out", tmp_path / "run") == 2
    assert message in " ".join(capsys.readouterr().err.split())
