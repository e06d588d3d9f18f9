"""`alignment=next` reads position i at i - 1, in the loss, in the pool and in the decoder: all three, or none agrees.

(The reference implementation shifts its loss and not its reveals: position i is revealed by what is said of i + 1.)
"""

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import RandomStream
from unmask.decoding.decoder import Decoder
from unmask.decoding.sampling import Sampling
from unmask.errors import UserError
from unmask.masking.process import MaskingProcess, RowShard
from unmask.masking.puma import PumaPool
from unmask.masking.puma_variable import VariablePumaPool
from unmask.masking.uniform import RandomMasking
from unmask.models.denoiser import Denoiser
from unmask.models.transformer import Transformer
from unmask.models.transformer_config import TransformerConfig
from unmask.reveal import Fixed
from unmask.types import TokenSpec

TOKENS = TokenSpec(vocab_size=7, length=12, mask_id=6)
WHOLE = RowShard.whole(8)
POOLS = {
    "puma": lambda: PumaPool(mask_id=6, shard=WHOLE, num_stages=6),
    "puma with threshold": lambda: PumaPool(mask_id=6, shard=WHOLE, num_stages=6, threshold=0.3),
    "puma by margin": lambda: PumaPool(mask_id=6, shard=WHOLE, num_stages=6, confidence="margin"),
    "puma_variable": lambda: VariablePumaPool(mask_id=6, shard=WHOLE, tokens_per_step=2, threshold=0.3),
    "uniform": lambda: RandomMasking(mask_id=6, shard=WHOLE),
}


class Shifted(nn.Module):
    """A backbone whose hidden state of position i is another's of i - 1, so that `same` reads what `next` reads."""

    def __init__(self, backbone: Transformer) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def head_weight(self) -> Tensor:
        return self.backbone.head_weight

    def forward(self, xt: Tensor, at: Tensor) -> Tensor:
        everywhere = self.backbone(xt, torch.arange(xt.numel())).view(*xt.shape, -1)
        return everywhere.roll(1, dims=1).flatten(0, 1)[at]


def models(*, causal: bool = False, confidence: str = "prob") -> tuple[Denoiser, Denoiser]:
    config = TransformerConfig(dim=16, ff_dim=24, num_layers=2, num_heads=2, alignment="next", causal=causal)
    backbone = Transformer(config, TOKENS).double()
    backbone.init_weights(0)
    return (
        Denoiser(backbone, mask_id=6, alignment="next", confidence=confidence),
        Denoiser(Shifted(backbone), mask_id=6, confidence=confidence),
    )


def stream() -> RandomStream:
    """Every row has a prompt of at least one token."""

    class Prompted(RandomStream):
        def __getitem__(self, number: Tensor):
            return super().__getitem__(number * 6 + 1 + number % 5)

    return Prompted(length=12, vocab_size=7)


@pytest.mark.parametrize("kind", POOLS)
def test_loss_and_pool_are_those_of_a_model_that_is_shifted_by_hand(kind: str) -> None:
    runs = []
    for number in range(2):
        process: MaskingProcess = POOLS[kind]()
        model = models(confidence=process.requirements.confidence or "prob")[number]
        steps = []
        for _ in range(8):
            batch = process.next_batch(stream())
            stats = model(batch)
            process.observe(batch, stats)
            steps.append((batch.xt, batch.scored, stats.nll, stats.confidence))
        runs.append(steps)
    for next_step, same_step in zip(*runs, strict=True):
        for ours, theirs in zip(next_step, same_step, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ["prob", "margin", "neg_entropy", "random", "left_to_right"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoded_tokens_are_those_of_a_model_that_is_shifted_by_hand(order: str, temperature: float) -> None:
    xt = stream()[torch.arange(8)].masked(6)
    ours, theirs = (
        Decoder(model.predict, 6, order=order, rule=Fixed(2), sampling=Sampling(temperature)).decode(xt)
        for model in models()
    )
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.reveal_step, theirs.reveal_step)


def test_gradients_are_those_of_a_model_that_is_shifted_by_hand() -> None:
    gradients = []
    for model in models():
        batch = RandomMasking(mask_id=6, shard=WHOLE).next_batch(stream())
        (model(batch).nll * batch.weight).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_position_0_cannot_be_predicted() -> None:
    model, _ = models()
    with pytest.raises(UserError, match="position 0 of an example is to be predicted"):
        model.predict(torch.full((2, 12), 6), torch.tensor([3, 12]))


def test_a_first_position_without_anything_before_it_is_named() -> None:
    model, _ = models()
    batch = RandomMasking(mask_id=6, shard=WHOLE).next_batch(RandomStream(length=12, vocab_size=7))
    with pytest.raises(UserError, match=r"position 0 of an example is to be predicted; use alignment=same"):
        model(batch)
