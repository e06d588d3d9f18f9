"""The replay and the masks, on a distribution whose posterior is known exactly."""

import pytest
import torch

from unmask.config import recipes
from unmask.config.registry import resolve
from unmask.decoding.decoder import Decoder
from unmask.decoding.trace import traces
from unmask.lab.report.curves import MaskStatistics, measure_decoding_masks, measure_training_masks
from unmask.reveal import NumSteps
from unmask.tasks.toy import Toy, ToyData
from unmask.training.trainer import Trainer
from unmask.types import Prediction, Query

CPU = torch.device("cpu")
TOY = Toy(ToyData(values=3, length=5, prompt_length=1))
MASK = TOY.tokens.mask_id


def exact(xt: torch.Tensor, at: torch.Tensor, ask: Query) -> Prediction:
    return Prediction.from_logits(TOY.posterior(xt, at), ask, mask_id=TOY.tokens.mask_id)


def test_a_trace_is_what_the_decoder_did() -> None:
    examples = TOY.validation(3)
    for number, trace in enumerate(traces(Decoder(exact, MASK), TOY, examples, device=CPU)):
        xt = examples.masked(MASK)[number]
        for step in trace["steps"]:
            at = (xt == MASK).nonzero().squeeze(1)
            p = TOY.posterior(xt[None], at).exp()
            assert step["at"] == at.tolist()
            assert step["guess"] == p.argmax(-1).tolist()
            assert step["sure"] == (100 * p.amax(-1)).round().int().tolist()
            most_confident = at[p.amax(-1).argmax()].item()
            assert (step["revealed"], step["again"]) == ([most_confident], [])
            assert step["values"] == [step["guess"][step["at"].index(most_confident)]]
            xt[most_confident] = step["values"][0]
        assert trace["tokens"] == xt.tolist()
        assert trace["is_solved"] == TOY.grade(examples[:1], xt[None]).measures["accuracy"].item()


def test_masks_met_when_decoding() -> None:
    """One at a step: 4/5, 3/5, 2/5 and 1/5 of every canvas are masked, once each."""
    masks = measure_decoding_masks(Decoder(exact, MASK), TOY.validation(6), block_size=None, device=CPU)
    assert sorted(masks.share.tolist()) == pytest.approx([n / 5 for n in (1, 2, 3, 4) for _ in range(6)])
    first = TOY.posterior(TOY.validation(6).masked(MASK), torch.arange(30)[torch.arange(30) % 5 > 0])
    expected = first.exp().amax(-1).view(6, 4).mean(-1)
    assert torch.allclose(masks.top1[masks.share > 0.7].double(), expected)


def test_masks_of_blocks_count_block_by_block() -> None:
    """One entry for each block of which anything is asked: here of all three at once, the first half given."""
    toy = Toy(ToyData(values=2, length=6, prompt_length=1))

    def in_blocks(xt: torch.Tensor, at: torch.Tensor, ask: Query) -> Prediction:
        return Prediction.from_logits(toy.posterior(xt, at), ask, mask_id=2)

    decoder = Decoder(in_blocks, 2, rule=NumSteps(1))
    masks = measure_decoding_masks(decoder, toy.validation(4), block_size=2, device=CPU)
    assert masks.share.tolist() == [0.5, 1, 1] * 4


def test_bins() -> None:
    masks = MaskStatistics(share=torch.tensor([0.05, 0.1, 0.11, 1.0]), top1=torch.tensor([0.2, 0.4, 0.5, 0.9]))
    assert [y for _, y in masks.histogram()] == [0.5, 0.25, 0, 0, 0, 0, 0, 0, 0, 0.25]
    assert masks.confidence() == [(0.05, pytest.approx(0.3)), (0.15, 0.5), (0.95, pytest.approx(0.9))]


def test_what_comes_next_in_training_in_blocks() -> None:
    """Of each of three bands, in rows that are two grids, 1 to 27 cells are masked, each number equally often."""
    overrides = ["process={name: uniform, block_size: 27}", "data.layout=two_grid", "train.batch_size=9"]
    config = recipes.load("debug", overrides)
    task = resolve("task", config.task.name).from_config(config.data)
    masks = measure_training_masks(Trainer(config, task.tokens, task.synthetic_stream(0)), num_batches=3)
    assert len(masks.share) == 3 * 3 * 9  # the clues are no masks
    counts = (27 * masks.share).round().long()
    assert counts.min() >= 1
    assert 12 < counts.double().mean() < 16


def test_what_comes_next_in_training() -> None:
    """Uniform masks hide 1 to L of a board's blank cells equally often; looking ahead trains nothing."""
    config = recipes.load("debug", ["process.name=uniform", "data.givens=41", "train.batch_size=40"])
    task = resolve("task", config.task.name).from_config(config.data)
    trainer = Trainer(config, task.tokens, task.synthetic_stream(0))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    masks = measure_training_masks(trainer, num_batches=2)
    assert (81 * masks.share).round().long().sort().values.tolist() == sorted([*range(1, 41)] * 2)
    assert ((masks.top1 > 1 / 11) & (masks.top1 < 1)).all()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
