"""Decoding block by block, and ending early, without a cache."""

import pytest
import torch

from tests.helpers.decoding import partly_given
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.decoding.decoder import Decoder
from unmask.errors import UserError
from unmask.models.build import build_denoiser
from unmask.models.transformer_config import TransformerConfig
from unmask.reveal import CosineSteps, Fixed, NumSteps, Threshold
from unmask.types import Prediction, Query, TokenSpec

TOKENS = TokenSpec(vocab_size=8, length=14, mask_id=7, eos_id=6, pad_id=6)


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    model = build_denoiser(TransformerConfig(preset="tiny"), TOKENS, seed=1, dtype="float64").eval()
    for parameter in model.parameters():
        parameter.data *= 4
    return model


@pytest.mark.parametrize("size", [1, 4, 7, 14, 20])
@pytest.mark.parametrize("rule", [Fixed(2), NumSteps(5), CosineSteps(6), Threshold(0.4)])
def test_a_block_is_done_before_the_next_begins(model, size: int, rule) -> None:  # type: ignore[no-untyped-def]
    xt = partly_given(15)
    decoded = Decoder(model.predict, 7, rule=rule, block_size=size).decode(xt)
    assert (decoded.tokens != 7).all()
    for row in range(15):
        at = (xt[row] == 7).nonzero().squeeze(1)
        step, block = decoded.reveal_step[row, at], at // size
        for later in range(1, 14):
            if (block == later).any() and (block < later).any():
                assert step[block == later].min() > step[block < later].max()
        assert len(at) == 0 or decoded.nfe[row] == step.max() + 1


def test_one_block_is_no_blocks(model) -> None:  # type: ignore[no-untyped-def]
    whole, block = (Decoder(model.predict, 7, block_size=size).decode(partly_given(9)) for size in (None, 14))
    for name in vars(whole):
        assert torch.equal(getattr(whole, name), getattr(block, name))


@pytest.mark.parametrize("settings", [{}, {"self_conditioning": True}])
def test_what_follows_a_block_may_be_left_unread(settings: dict) -> None:
    """Whatever stands there: as if the canvas ended with the block. Rows are in different blocks at a time."""
    model = build_denoiser(TransformerConfig(preset="tiny", **settings), TOKENS, seed=1, dtype="float64").eval()
    for parameter in model.parameters():
        parameter.data *= 4
    xt = torch.randint(6, (8, 14), generator=torch.Generator().manual_seed(3))
    for row in range(8):
        xt[row, row:] = 7
    short = DecodeConfig(block_size=4, tokens_per_step=2, reads_ahead=False, stop_early=False)
    found = build_decoder(short, model, TOKENS).decode(xt).tokens
    expected = xt.clone()
    for start in range(0, 14, 4):
        prefix = expected[:, : start + 4]
        whole = short.model_copy(update={"block_size": None, "reads_ahead": True})
        expected[:, : start + 4] = build_decoder(whole, model, TOKENS).decode(prefix).tokens
    assert torch.equal(found, expected)
    ahead = short.model_copy(update={"reads_ahead": True})
    assert not torch.equal(build_decoder(ahead, model, TOKENS).decode(xt).tokens, found)


def test_blocks_of_one_are_left_to_right(model) -> None:  # type: ignore[no-untyped-def]
    ordered = Decoder(model.predict, 7, order="left_to_right").decode(partly_given(9))
    block = Decoder(model.predict, 7, block_size=1).decode(partly_given(9))
    assert torch.equal(ordered.tokens, block.tokens)


def test_the_quota_of_steps_is_the_rows() -> None:
    """12 masked in 4 steps: 3, 6, 9 and 12 are revealed. Blocks of 4 end where they end, and the next catches up."""
    seen: list[int] = []

    def predict(xt: torch.Tensor, at: torch.Tensor, ask: Query) -> Prediction:
        seen.append(int((xt == 7).sum()))
        return Prediction.from_logits(torch.zeros(len(at), 8), ask, mask_id=7)

    Decoder(predict, 7, rule=NumSteps(4), block_size=4).decode(torch.full((1, 12), 7))
    assert seen == [12, 9, 8, 4]


def ends_at(position: int, length: int = 14):  # type: ignore[no-untyped-def]
    """A model that is surest of an end token at `position`, then of what is first."""

    def predict(xt: torch.Tensor, at: torch.Tensor, ask: Query) -> Prediction:
        place = at % length
        logits = torch.zeros(len(at), 8, dtype=torch.float64)
        logits[:, 1] = 3 - place / length
        logits[place == position, 6] = 9
        return Prediction.from_logits(logits, ask, mask_id=7)

    return predict


def test_what_follows_the_end_is_filled_in_at_once() -> None:
    xt = torch.full((2, 14), 7)
    xt[:, 0] = 6  # an end token in a prompt ends nothing
    xt[1, 13] = 2  # nor does one that something given follows
    decoded = Decoder(ends_at(5), 7, eos_id=6).decode(xt)
    assert decoded.tokens.tolist() == [[6, 1, 1, 1, 1] + [6] * 9, [6, 1, 1, 1, 1, 6, 1, 1, 1, 1, 1, 1, 1, 2]]
    assert decoded.reveal_step[0].tolist() == [-1, 1, 2, 3, 4] + [0] * 9
    assert decoded.nfe.tolist() == [5, 12]


def test_rows_that_have_ended_leave_the_batch() -> None:
    sizes = []

    def predict(xt: torch.Tensor, at: torch.Tensor, ask: Query) -> Prediction:
        sizes.append(len(xt))
        return ends_at(5)(xt, at, ask)

    xt = torch.full((2, 14), 7)
    xt[1, 13] = 2
    Decoder(predict, 7, eos_id=6, block_size=7).decode(xt)
    assert sizes == [2] * 6 + [1] * 7


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"block_size": 15}, "decode.block_size=15: longer than the 14 positions"),
        ({"cache": "block"}, "decode.cache=block: this model sees all positions"),
    ],
)
def test_what_a_model_cannot_do_is_said(model, asked: dict[str, object], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        build_decoder(DecodeConfig(**asked), model, TOKENS)


def test_rows_end_early_only_where_the_task_pads(model) -> None:  # type: ignore[no-untyped-def]
    unpadded = TokenSpec(vocab_size=8, length=14, mask_id=7, eos_id=6)
    assert build_decoder(DecodeConfig(), model, TOKENS).eos_id == 6
    assert build_decoder(DecodeConfig(), model, unpadded).eos_id is None
    assert build_decoder(DecodeConfig(stop_early=False), model, TOKENS).eos_id is None
    assert build_decoder(DecodeConfig(steps=3, remask="p2"), model, TOKENS).eos_id is None


def test_a_size_that_does_not_divide_is_said(model, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    """The last block is shorter, and everything is filled in, block after block; it is said once."""
    for _ in range(2):
        decoder = build_decoder(DecodeConfig(block_size=5, stop_early=False), model, TOKENS)
    said = capsys.readouterr().err
    assert said.count("decode.block_size=5 does not divide rows of 14 positions: the last block has 4") == 1
    steps = decoder.decode(torch.full((2, 14), TOKENS.mask_id)).reveal_step
    assert [steps[:, at].amax().item() for at in (slice(5), slice(5, 10), slice(10, 14))] == [4, 9, 13]
