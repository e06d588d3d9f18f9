"""Training examples whose prompt is hidden: processes see the same examples, but for that."""

from pathlib import Path

import pytest
import torch

from tests.helpers import random_stats
from tests.helpers.stores import EOS, LENGTH, MASK, VOCAB, make_task, rows_with_prompts, write_store
from unmask.config import recipes
from unmask.config.registry import resolve
from unmask.decoding.config import DecodeConfig, check_guidance
from unmask.errors import UserError
from unmask.masking.process import ProcessContext, RowShard
from unmask.types import TokenSpec

PROCESSES = {
    "uniform": {},
    "puma": {"num_stages": 3, "threshold": 0.9},
    "puma_variable": {"tokens_per_step": 2},
    "ar": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("data") / "store", *rows_with_prompts())


def is_hidden(folder: Path, number: torch.Tensor, dropout: float) -> torch.Tensor:
    """Which of the training examples are without their prompt, after a look at each of them."""
    plain = make_task(path=str(folder), validation_ratio=0.25).train_stream(3)[number]
    dropped = make_task(path=str(folder), validation_ratio=0.25, prompt_dropout=dropout).train_stream(3)[number]
    assert torch.equal(plain.prompt_mask, dropped.prompt_mask)
    assert torch.equal(plain.x0[~plain.prompt_mask], dropped.x0[~plain.prompt_mask])
    hidden = (dropped.x0 == MASK).any(dim=-1)
    assert torch.equal(dropped.x0, torch.where(hidden.unsqueeze(1) & plain.prompt_mask, MASK, plain.x0))
    return hidden


def test_a_prompt_is_hidden_wholly_and_as_often_as_said(folder: Path) -> None:
    number = torch.arange(2000)
    assert not is_hidden(folder, number, 0.0).any()
    hidden = is_hidden(folder, number, 0.3)
    assert hidden.double().mean().item() == pytest.approx(0.3, abs=0.04)  # four standard errors
    assert torch.equal(is_hidden(folder, number[100:130], 0.3), hidden[100:130])
    epochs = hidden[: 48 * 40].view(40, 48)  # the same rows, hidden anew
    assert not (epochs == epochs[0]).all()


def test_held_out_examples_keep_theirs(folder: Path) -> None:
    task = make_task(path=str(folder), validation_ratio=0.25, prompt_dropout=0.9)
    assert not (task.validation(16).x0 == MASK).any()
    assert not (task.examples_from_file(folder).x0 == MASK).any()


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_scores_the_same_whether_prompts_are_hidden(folder: Path, name: str) -> None:
    """Neither are they scored nor do they count as masked, so that weights and reveals are the same, too."""
    tokens = TokenSpec(vocab_size=VOCAB, length=LENGTH, mask_id=MASK, eos_id=EOS, pad_id=EOS)
    context = ProcessContext(tokens=tokens, shard=RowShard.whole(8), seed=0)
    component = resolve("process", name)
    pairs = []
    for dropout in (0.0, 0.5):
        process = component.from_config(component.Config(name=name, **PROCESSES[name]), context)
        task = make_task(path=str(folder), prompt_dropout=dropout)
        pairs.append((process, task.train_stream(0)))
    num_hidden = 0
    for step in range(8):
        (plain, dropped) = (process.next_batch(stream) for process, stream in pairs)
        assert torch.equal(plain.scored, dropped.scored)
        assert torch.equal(plain.weight, dropped.weight)
        hidden = dropped.x0 == MASK
        num_hidden += int(hidden.sum())
        assert torch.equal(dropped.x0, plain.x0.masked_fill(hidden, MASK))
        assert torch.equal(dropped.xt, plain.xt.masked_fill(hidden, MASK))
        for (process, _), batch in zip(pairs, (plain, dropped), strict=True):
            process.observe(batch, random_stats(batch, step))
    assert num_hidden > 0


def test_guidance_needs_hidden_prompts(folder: Path) -> None:
    data = make_task(path=str(folder), prompt_dropout=0.1).config
    check_guidance(DecodeConfig(guidance=1.5), data)
    check_guidance(DecodeConfig(), make_task().config)
    with pytest.raises(UserError, match=r"decode\.guidance=1\.5 .*train one with data\.prompt_dropout=0\.1"):
        recipes.load("tinygsm/puma", ["decode.guidance=1.5"])
    with pytest.raises(
        UserError, match=r"decode\.guidance=1\.5 .*cannot hide them in training; set decode\.guidance=0"
    ):
        recipes.load("sudoku/puma", ["decode.guidance=1.5"])
