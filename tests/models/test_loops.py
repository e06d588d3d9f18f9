"""Loops: the same as a deeper network whose layers share weights, in training, with caches and in decoding."""

import re

import pytest
import torch

from tests.helpers.decoding import TOKENS, decode, denoiser, prompts, same
from tests.helpers.runs import assert_goes_on_exactly, toy_trainer
from unmask.config import recipes
from unmask.errors import UserError
from unmask.models.attention import KeyValueCache
from unmask.models.build import build_denoiser
from unmask.models.cost import count_cached, count_parameters
from unmask.models.denoiser import Denoiser
from unmask.models.loops import draw
from unmask.models.transformer_config import TransformerConfig

KINDS = {  # settings of a network, and of a decoder that keeps what it can
    "full": ({}, {"cache": "prefix", "block_size": 8, "tokens_per_step": 8}),
    "causal": ({"causal": True, "alignment": "next"}, {"order": "left_to_right"}),
    "blocks": ({"block_size": 8}, {"cache": "block", "tokens_per_step": 8}),
    "tied, conditioned": ({"tied_head": True, "self_conditioning": True}, {"tokens_per_step": 8}),
}


def looped(layers: tuple[int, int], times: int | tuple[int, int], **settings: object) -> Denoiser:
    return denoiser(num_layers=3, loops={"layers": layers, "times": times}, **settings)


def unrolled(model: Denoiser, order: list[int], **settings: object) -> Denoiser:
    """A network without loops that has the layers of `model` in this order."""
    deeper = denoiser(num_layers=len(order), **settings)
    state = model.backbone.state_dict()
    for place, number in enumerate(order):
        prefix = f"blocks.{number}."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        deeper.backbone.blocks[place].load_state_dict(own)
    rest = {name: value for name, value in state.items() if not name.startswith("blocks.")}
    deeper.backbone.load_state_dict(rest, strict=False)
    return deeper


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_is_a_deeper_network(kind: str) -> None:
    """With keys and values of its own for every run of a layer."""
    network, decoder = KINDS[kind]
    model, xt = looped((1, 2), (1, 2), **network), prompts()[:2]
    deeper = unrolled(model, [0, 1, 2, 1, 2], **network)
    assert same(decode(model, xt, **decoder), decode(deeper, xt, **decoder))


@pytest.mark.parametrize(
    ("layers", "times", "order"),
    [((0, 1), 1, [0, 1, 2]), ((1, 1), 3, [0, 1, 1, 1, 2]), ((0, 0), 2, [0, 0, 1, 2]), ((2, 2), 2, [0, 1, 2, 2])],
)
def test_which_layers_run(layers: tuple[int, int], times: int, order: list[int]) -> None:
    model, xt, at = looped(layers, times), prompts(), torch.arange(1, 20)
    loops = model.backbone.config.loops
    assert loops.order(3) == order
    assert [loops.count(3), loops.count(3, 7)] == [len(order), len(loops.order(3, 7))]
    assert torch.equal(model.logits(xt, at), unrolled(model, order).logits(xt, at))


def test_decoding_chooses_how_often() -> None:
    network, decoder = KINDS["blocks"]
    model, xt = looped((1, 1), (1, 2), **network), prompts()[:2]
    for settings in (decoder, {"tokens_per_step": 8}):
        expected = decode(unrolled(model, [0, 1, 1, 1, 2], **network), xt, **settings)
        assert same(decode(model, xt, loops=3, **settings), expected)
    assert model.backbone.times is None  # as it was
    with pytest.raises(UserError, match=r"decode.loops=2: this model has no model.loops; set decode.loops=null"):
        decode(denoiser(), xt, loops=2)


LOOPS = "model.loops={layers: [0, 0], times: [1, 3]}"


def test_training_draws_how_often() -> None:
    backbone = toy_trainer(LOOPS).model.backbone
    drawn = [draw(backbone, 0, step) for step in range(900)]
    assert drawn == [draw(backbone, 0, step) for step in range(900)]
    assert drawn != [draw(backbone, 1, step) for step in range(900)]
    for times in (1, 2, 3):  # five standard deviations of a share of 1/3
        assert abs(drawn.count(times) / 900 - 1 / 3) < 5 * (2 / 9 / 900) ** 0.5
    assert draw(backbone, 0, None) is None
    assert draw(toy_trainer().model.backbone, 0, 1) is None


def test_a_training_step_runs_as_many_as_it_draws() -> None:
    for step in range(2):
        ours = toy_trainer(LOOPS)
        times = draw(ours.model.backbone, ours.config.train.seed, step)
        fixed = toy_trainer(f"model.loops={{layers: [0, 0], times: {times}}}")
        losses = []
        for trainer in (ours, fixed):
            trainer.step_number = step
            losses.append(trainer.step().loss)
        assert torch.equal(*losses)


def test_run_once_they_change_nothing() -> None:
    plain, once = toy_trainer(), toy_trainer("model.loops={layers: [0, 1], times: 1}")
    assert [plain.step().loss.item() for _ in range(3)] == [once.step().loss.item() for _ in range(3)]


def test_a_run_with_loops_goes_on_exactly() -> None:
    settings = (LOOPS, "model.checkpointing=true")
    assert_goes_on_exactly(toy_trainer(*settings), toy_trainer(*settings))


@pytest.mark.parametrize(
    ("loops", "message"),
    [
        ("{layers: [1, 2], times: 2}", "model.loops.layers=[1, 2]: model.num_layers=2 layers are 0 to 1"),
        ("{layers: [1, 0], times: 2}", "model.loops: layers=[1, 0]: give the smaller one first"),
        ("{layers: [0, 1], times: [3, 2]}", "model.loops: times=[3, 2]: give the smaller one first"),
        ("{layers: [0, 1], times: 0}", "model.loops.times.0=0: Input should be greater than or equal to 1"),
        (
            "{layers: [0, 1], times: true}",
            "model.loops.times=True: give a whole number, or two of them, as [low, high]",
        ),
        ("{layers: [0, 1], times: 1.5}", "model.loops.times=1.5: give a whole number, or two of them"),
        ("{layers: [0, 1]}", "model.loops.times is missing"),
        ("{layers: [0, 1], time: 2}", "unknown key model.loops.time; did you mean model.loops.times?"),
        ("3", "model.loops=3: is a section; give its settings, such as model.loops.layers=.."),
    ],
)
def test_wrong_loops(loops: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        toy_trainer(f"model.loops={loops}")


def test_loops_in_decoding_need_loops_of_the_model() -> None:
    """It is said before a training, not after it."""
    with pytest.raises(UserError, match=r"decode.loops=2: this model has no model.loops; set decode.loops=null"):
        recipes.load("debug", ["decode.loops=2"])
    assert recipes.load("debug", ["decode.loops=2", LOOPS]).decode.loops == 2


def test_loops_have_no_weights_of_their_own() -> None:
    config = TransformerConfig(preset="tiny", loops={"layers": [0, 1], "times": [2, 5]})
    model = build_denoiser(config, TOKENS)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config, TOKENS)


def test_every_run_of_a_layer_counts_in_memory() -> None:
    model = looped((0, 1), 4, causal=True, alignment="next")
    cache, xt = KeyValueCache(TOKENS.length, 1), prompts()[:1]
    model.hidden_within(xt, torch.arange(1, 8), start=torch.zeros(1, dtype=torch.long), width=8, cache=cache)
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers.values())
    assert kept == count_cached(model.backbone.config, TOKENS)
