"""A device without float64, as a Mac's GPU: training and decoding with fp32 alone, on a CPU that forbids the rest."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.helpers import RandomStream
from unmask import noise
from unmask.config import recipes
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.errors import UserError
from unmask.evaluation.continuations import Pair, score_pairs
from unmask.evaluation.nelbo import row_nelbos
from unmask.lab.diagnostics.likelihood import masked_nll
from unmask.masking.process import IndependentBatches
from unmask.models import precision
from unmask.models.build import build_denoiser
from unmask.models.precision import resolve_device, resolve_dtype, should_compile
from unmask.models.transformer import TransformerConfig
from unmask.noise import Purpose
from unmask.peers import Peers
from unmask.training.distributed import device_of
from unmask.training.trainer import Trainer
from unmask.types import CleanBatch, TokenSpec

TOKENS = TokenSpec(vocab_size=12, length=16, mask_id=11, eos_id=1)


class NoFloat64(TorchDispatchMode):
    """Refuses what makes a float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(each, Tensor) and each.dtype == torch.float64 for each in tree_leaves(result)):
            raise TypeError(f"{func} makes a float64, which this device does not have")
        return result


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> NoFloat64:
    """The CPU has no float64."""
    monkeypatch.setattr(noise, "has_float64", lambda device: False)
    return NoFloat64()


def draws_on_a_cpu(process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a process have float64 where it makes its batches on a CPU, whatever the device."""
    own = process.draw_batch

    def drawn(stream: Any, step: int) -> Any:
        with _disable_current_modes(), monkeypatch.context() as wide:
            wide.setattr(noise, "has_float64", lambda device: True)
            return own(stream, step)

    monkeypatch.setattr(process, "draw_batch", drawn)


@pytest.mark.parametrize(
    "process",
    [
        "{name: uniform}",
        "{name: puma, num_stages: 4, threshold: 0.9}",
        "{name: puma, num_stages: 4, block_size: 8}",
        "{name: puma_variable, tokens_per_step: 4}",
    ],
)
def test_training(process: str, narrow: NoFloat64, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipes.load(
        "debug",
        [f"process={process}", "train.batch_size=4", "train.dtype=float32", "train.compile=false", "model.dropout=0.1"],
    )
    run = Trainer(config, TOKENS, RandomStream(TOKENS.length, 10))
    if isinstance(run.process, IndependentBatches):
        draws_on_a_cpu(run.process, monkeypatch)
    with narrow:
        for _ in range(3):
            report = run.step()
            assert all(isinstance(value, float) for value in report.metrics().values())
            assert report.loss.isfinite()
        run.load_state_dict(run.state_dict())


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens_per_step": 3},
        {"steps": 5, "schedule": "cosine"},
        {"order": "random", "temperature": 1.0},
        {"tokens_per_step": 3, "temperature": 1.0, "top_p": 0.9, "top_k": 5},
        {"tokens_per_step": 2, "confidence_noise": 0.5},
        {"steps": 8, "remask": "remdm_cap", "remask_eta": 0.1},
        {"steps": 8, "remask": "rcr"},
        {"budget": 0.2},
    ],
    ids=str,
)
def test_decoding(settings: dict[str, Any], narrow: NoFloat64) -> None:
    config = TransformerConfig(dim=16, ff_dim=24, num_layers=1, num_heads=2)
    model = build_denoiser(config, TOKENS).eval()
    xt = torch.full((2, TOKENS.length), TOKENS.mask_id)
    with narrow, torch.no_grad():
        decoded = build_decoder(DecodeConfig(**settings), model, TOKENS).decode(xt)
    assert not (decoded.tokens == TOKENS.mask_id).any()


class NoFloat64OnMeta(TorchDispatchMode):
    """Refuses a float64 on the device `meta` alone, so that what the host makes for it is seen to be converted."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(
            isinstance(each, Tensor) and each.is_meta and each.dtype == torch.float64 for each in tree_leaves(result)
        ):
            raise TypeError(f"{func} makes a float64 on a device that does not have it")
        return result


@pytest.mark.parametrize("measure", [row_nelbos, masked_nll, score_pairs])
def test_what_evaluations_send_to_a_device(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "has_float64", lambda device: torch.device(device).type != "meta")
    config = TransformerConfig(dim=16, ff_dim=24, num_layers=1, num_heads=2)
    model = build_denoiser(config, TOKENS).eval().to("meta")
    examples = CleanBatch(
        x0=torch.zeros(4, TOKENS.length, dtype=torch.int64), prompt_mask=torch.zeros(4, TOKENS.length) > 0
    )
    asked = (examples,) if measure is not score_pairs else ([Pair((2, 3), (4, 5), key=1)],)
    options = {"draws": 2} | ({"length": TOKENS.length} if measure is score_pairs else {})
    # What the batch holds is not known on this device, so that counting its masks is the end: after all that was sent.
    with NoFloat64OnMeta(), pytest.raises(NotImplementedError, match=r"nonzero|meta"):
        measure(model, *asked, **options)


def test_noise_in_fp32_is_that_in_float64_cut_or_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = torch.arange(100_000)
    u, gumbel = noise.uniform(3, Purpose.MASK, keys), noise.gumbel(3, Purpose.VALUE, keys)
    monkeypatch.setattr(noise, "has_float64", lambda device: False)
    narrow_u, narrow_gumbel = noise.uniform(3, Purpose.MASK, keys), noise.gumbel(3, Purpose.VALUE, keys)
    assert narrow_u.dtype == narrow_gumbel.dtype == torch.float32
    assert torch.equal(narrow_u.double(), (u * 2**24).floor() / 2**24)
    # A few roundings, relative to numbers of up to 12; near 0 to the logarithm's argument, which is near 1.
    assert torch.allclose(narrow_gumbel.double(), gumbel, rtol=1e-6, atol=1e-6)


def test_a_macs_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(precision.torch.backends.mps, "is_available", lambda: True)
    mps = torch.device("mps")
    assert resolve_device("auto") == resolve_device("mps") == mps
    assert not noise.has_float64(mps)
    assert should_compile("auto", mps) is False
    with pytest.raises(UserError, match="float64: mps has no such numbers; use float32"):
        resolve_dtype("float64", mps)
    monkeypatch.setattr(precision.torch.backends.mps, "is_macos_or_newer", lambda *version: True)
    assert resolve_dtype("auto", mps) == "bfloat16"
    monkeypatch.setattr(precision.torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match=r"train\.device=mps: not on this machine"):
        resolve_device("mps")


def test_several_processes_do_not_share_a_macs_gpu() -> None:
    class Two(Peers):
        size = 2
        local_rank = 0

    with pytest.raises(UserError, match=r"train.device=mps: .* start one process, or set train.device=cpu"):
        device_of(Two(), "mps")
    if not torch.cuda.is_available():
        assert device_of(Two(), "auto") == "cpu"
