"""The first mistakes of decoding: by hand, by brute force, and as many as examples that come out wrong."""

import pytest
import torch
from torch import Tensor

from tests.helpers import exact, toy
from tests.lab.diagnostics.untrained import toy_settings, untrained_run
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.lab.diagnostics.measures import NotApplicable
from unmask.lab.diagnostics.mistakes import NUM_BINS, count_first_mistakes, measure_mistakes
from unmask.tasks.toy import Toy
from unmask.types import CleanBatch

MASK = 9


def test_only_the_first_mistake_of_an_example_counts() -> None:
    """Eight are asked for, so each step has its bin. One example errs with 6 masked and then with 3, which counts no
    more; of the other, two are revealed at first, and nothing is wrong."""
    x0 = torch.full((2, 9), 1)
    given = torch.zeros(2, 9, dtype=torch.bool)
    given[:, 0] = True
    answer = torch.tensor([[1, 1, 1, 2, 1, 1, 2, 1, 1], [1] * 9])
    step = torch.tensor([[-1, 0, 1, 2, 3, 4, 5, 6, 7], [-1, 0, 0, 1, 2, 3, 4, 5, 6]])
    canvases = [torch.where(step < now, answer, MASK) for now in range(9)]
    steps, mistakes = count_first_mistakes(canvases, CleanBatch(x0=x0, prompt_mask=given), MASK).tolist()
    assert steps == [1, 1, 1, 1, 1, 2, 1, 2]  # 1 to 8 masked
    assert mistakes == [0, 0, 0, 0, 0, 1, 0, 0]


def brute_force(canvases: list[Tensor], examples: CleanBatch) -> list[list[int]]:
    found = [[0] * NUM_BINS, [0] * NUM_BINS]
    for row, x0 in enumerate(examples.x0.tolist()):
        num_asked = int((~examples.prompt_mask[row]).sum())
        for k in range(1, len(canvases)):
            before, after = canvases[k - 1][row].tolist(), canvases[k][row].tolist()
            new = [i for i in range(len(x0)) if before[i] == MASK and after[i] != MASK]
            if not new:
                continue
            own = next(b for b in range(NUM_BINS) if before.count(MASK) * NUM_BINS <= (b + 1) * num_asked)
            found[0][own] += 1
            if any(after[i] != x0[i] for i in new):
                found[1][own] += 1
                break
    return found


def test_it_is_brute_force_where_tokens_are_masked_again() -> None:
    """Random steps, in the decoder's way: one tensor that every step changes."""
    draw = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 3, (40, 12), generator=draw)
    given = torch.rand(40, 12, generator=draw) < 0.3
    examples = CleanBatch(x0=x0, prompt_mask=given)
    kept = [examples.masked(MASK)]

    def steps(canvas: Tensor) -> Tensor:
        """Reveals a few, of which one in twenty is wrong, and masks a few again."""
        is_masked = canvas == MASK
        tokens = torch.where(torch.rand(40, 12, generator=draw) < 0.05, (x0 + 1) % 3, x0)
        is_new = is_masked & (torch.rand(40, 12, generator=draw) < 0.3)
        is_again = ~is_masked & ~given & (torch.rand(40, 12, generator=draw) < 0.1)
        return torch.where(is_new, tokens, canvas).masked_fill(is_again, MASK)

    for _ in range(10):
        kept.append(steps(kept[-1]))
    shared = kept[0].clone()
    found = count_first_mistakes((shared.copy_(canvas) for canvas in kept), examples, MASK)
    assert found.tolist() == brute_force(kept, examples)
    assert found[1].sum() > 5


DECODERS = {
    "one at a time": DecodeConfig(order="prob", tokens_per_step=1),
    "nine at a time": DecodeConfig(order="margin", tokens_per_step=9),
    "with noise, a few examples at once": DecodeConfig(order="random", temperature=1.0, batch_size=9),
}


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS.keys())
def test_as_many_as_examples_that_come_out_wrong(decoder: DecodeConfig) -> None:
    run = untrained_run(*toy_settings("data.prompt_length=3", values=2), model=exact(toy(values=2, length=6)))
    held_out = run.task.validation(70)  # more than are decoded at once
    done: list[float] = []
    found = measure_mistakes(run, held_out, decoder, on_progress=done.append)
    filled = build_decoder(decoder, run.trainer().model, run.tokens).decode(held_out.masked(run.tokens.mask_id))
    wrong = int((filled.tokens != held_out.x0).any(dim=1).sum())
    assert 0 < wrong < 70
    assert (found.wrong, found.examples, sum(own.mistakes for own in found.bins)) == (wrong, 70, wrong)
    assert found.decoder == decoder.label
    assert all(0 <= own.mistakes <= own.steps for own in found.bins)
    assert done == sorted(done)
    assert done[-1] == 1


def test_without_right_answers_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    run = untrained_run(*toy_settings())
    held_out, decoder = run.task.validation(4), DECODERS["one at a time"]
    unknown = CleanBatch(x0=held_out.masked(run.tokens.mask_id), prompt_mask=held_out.prompt_mask)
    with pytest.raises(NotApplicable, match="no right answers that are known"):
        measure_mistakes(run, unknown, decoder, on_progress=lambda share: None)
    monkeypatch.delattr(Toy, "grade")
    with pytest.raises(NotApplicable, match="no right answers that are known"):
        measure_mistakes(run, held_out, decoder, on_progress=lambda share: None)
