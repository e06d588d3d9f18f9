"""`benchmarks/against_reference.py`, with a stand-in for the reference, and with the reference where there is one."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "against_reference.py"
STAND_IN = {
    "progressive.py": """
import torch

def mdm_loss_fn(log_probs, x0, xt, mask_id, prompt_mask):
    return -log_probs.gather(-1, x0.unsqueeze(-1)).squeeze(-1)[xt == mask_id].mean()

class PhasedMasking:
    def __init__(self, loader, batch, mask_id, K, device, L, mode, confidence_threshold, eos_id):
        first = next(iter(loader))
        self.x0, self.state = first["labels"], {"prompt_mask": first["prompt_mask"]}
        self.xt = torch.where(first["prompt_mask"], self.x0, mask_id)

    def current_batch(self):
        return self.xt

    def update_with_logits(self, log_probs):
        assert log_probs.shape[:2] == self.xt.shape
""",
    "sampling.py": """
def mdm_sampling(model, xt, mask_id, options):
    xt = xt.clone()
    while (xt == mask_id).any():
        top = model(xt).softmax(-1).max(-1)
        for row in range(len(xt)):
            is_masked = xt[row] == mask_id
            number = min(options.unmasking_num, int(is_masked.sum()))
            place = top.values[row].masked_fill(~is_masked, -1).topk(number).indices
            xt[row, place] = top.indices[row, place]
    return xt
""",
    "model/transformer.py": """
from types import SimpleNamespace as MDMConfig
from torch import nn

class Layer(nn.Linear):
    def forward(self, x):  # what a position sees depends on where it is
        return x + super().forward(x.cumsum(1)).tanh()

class MDMTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.emb = nn.Embedding(config.vocab_size, 16)
        self.layers = nn.ModuleList([Layer(16, 16), Layer(16, 16)])
        self.final_norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, config.vocab_size, bias=False)

    def forward(self, xt):
        x = self.emb(xt)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.final_norm(x))
""",
    "model/ema.py": """
from omegaconf import OmegaConf

class ExponentialMovingAverage:
    def __init__(self, parameters, decay):
        self.updates = 0

    def update(self, parameters):
        self.updates += 1
""",
}
SETTINGS = """
model: {vocab_size: 11, max_position: 162, rms_norm_eps: 1e-6}
training: {learning_rate: 3e-4, weight_decay: 0.01, warmup_steps: 10, max_grad_norm: 1.0, ema: 0.99, K: 8,
  mode: standard, confidence_threshold: 0.9, eos_id: null}
data: {mask_id: 10}
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # as it is for a program
    spec = importlib.util.spec_from_file_location("against_reference", SCRIPT)
    module = sys.modules["against_reference"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stand_in(tmp_path: Path, script: ModuleType) -> Path:
    files = STAND_IN | dict.fromkeys((script.SUDOKU, script.TINYGSM), SETTINGS)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


SMALL = ["--rounds", 1, "--steps", 1, "--batch", 2, "--reference-steps", 3, "--levels", 1]


def run(script: ModuleType, *arguments: object) -> int:
    return script.main([str(argument) for argument in arguments])


def check_report(path: Path) -> None:
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["sudoku-step", "sudoku-decode-same"]
    for row in rows.values():
        assert all(ratio > 0 for pair in row["ratios"].values() for ratio in pair["seconds"] + pair["peak_bytes"])
    dtypes = {label: found[0]["dtype"] for label, found in rows["sudoku-step"]["measurements"].items()}
    assert dtypes["ours, bf16"] == dtypes["reference, with autocast"] == "bfloat16"
    assert dtypes["ours, fp32"] == dtypes["reference, as it runs"] == "float32"


def test_takes_turns_with_a_stand_in(
    script: ModuleType, stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows = tmp_path / "out.json", ["--only", "sudoku-step", "sudoku-decode-same"]
    small = [*SMALL, "--device", "cpu", "--json", out]
    code = run(script, "--reference", stand_in, *rows, *small, "--ours", "model.preset=tiny", "train.compile=false")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert printed.out.count("100.00% of the tokens") == 2
    check_report(out)


def test_takes_turns_with_the_reference(script: ModuleType, tmp_path: Path) -> None:
    if not (reference := os.environ.get("UNMASK_REFERENCE")):
        pytest.skip("UNMASK_REFERENCE names no clone of the reference implementation (JaeyeonKim01/PUMA)")
    out, rows = tmp_path / "out.json", ["--only", "sudoku-step", "sudoku-decode-same"]
    assert run(script, "--reference", reference, *rows, *SMALL, "--device", "cpu", "--json", out) == 0
    check_report(out)


def test_ratios_are_of_one_round(script: ModuleType) -> None:
    theirs = [{"seconds": 6.0, "peak_bytes": 4}, {"seconds": 8.0, "peak_bytes": 4}]
    ours = [{"seconds": 2.0, "peak_bytes": 2}, {"seconds": 4.0, "peak_bytes": 1}]
    row = script.ROWS["sudoku-step"]
    found = script.ratios({"reference, as it runs": theirs, "ours, bf16": ours}, row)
    assert found == {"reference, as it runs / ours, bf16": {"seconds": [3.0, 2.0], "peak_bytes": [2.0, 4.0]}}


def test_tokens_that_differ_fail(
    script: ModuleType, stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: dict, device: str) -> dict:
        last = 3 if request["job"] == "module-decode" else 4
        return {"seconds": 1.0, "peak_bytes": 1, "dtype": "float32", "tokens": [1, 2, 3, last]}

    monkeypatch.setattr(script, "run_worker", answer)
    assert run(script, "--reference", stand_in, "--only", "sudoku-decode-same", *SMALL) == 1
    printed = capsys.readouterr()
    assert "ours, any callable: 75.00% of the tokens" in printed.out
    assert printed.err.splitlines()[-1].startswith("error: tokens differ from the reference's: sudoku-decode-same")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has no sampling.py"),
        (["--only", "nonsense"], "no such row"),
        (["--rounds", 0], "--rounds 0"),
        (["--masked", 163], "has 162 positions"),
    ],
)
def test_wrong_arguments(
    script: ModuleType, stand_in: Path, capsys: pytest.CaptureFixture[str], arguments: list, message: str
) -> None:
    if not arguments:
        (stand_in / "sampling.py").unlink()
    assert run(script, "--reference", stand_in, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
