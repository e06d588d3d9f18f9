"""The truths that every masking process keeps, for all that the registry names. A new process is a row of `CASES`."""

from dataclasses import replace

import pytest
import torch

from tests.helpers import RandomStream, random_stats
from unmask.config.registry import COMPONENTS, resolve
from unmask.config.settings import check_section
from unmask.errors import UserError
from unmask.masking.process import PAD_MULTIPLE, MaskingProcess, ProcessContext, RowShard
from unmask.types import CleanBatch, MaskedBatch, TokenSpec, TokenStats

MASK, PROMPT, LENGTH, ROWS = 6, 5, 12, 10
TOKENS = TokenSpec(vocab_size=7, length=LENGTH, mask_id=MASK, eos_id=0, pad_id=0)
CASES: list[dict] = [
    {"name": "uniform"},
    {"name": "uniform", "time": {"name": "truncated_normal", "mean": 0.3}, "weight": "flat"},
    {"name": "uniform", "weight": "elbo", "masking": "independent"},
    {"name": "uniform", "time": "beta", "weight": "importance", "weight_cap": 4, "block_size": 4},
    {"name": "puma", "num_stages": 4},
    {"name": "puma", "num_stages": 4, "threshold": 0.8},
    {"name": "puma", "num_stages": 1},
    {"name": "puma", "num_stages": 30, "threshold": 0.9},  # more stages than positions
    {"name": "puma", "num_stages": 3, "stage_schedule": [[5, 6], [11, 2]], "threshold": 0.95},
    {"name": "puma", "num_stages": 4, "order": "random"},
    {"name": "puma", "num_stages": 4, "order": "margin", "threshold": 0.5},
    {"name": "puma", "num_stages": 4, "factor": 1.2, "time": "beta"},
    {"name": "puma", "num_stages": 4, "order": "neg_entropy", "entropy_bound": 0.5},
    {"name": "puma", "num_stages": 4, "budget": 0.4, "block_size": 4},
    {"name": "puma", "num_stages": 3, "block_size": 4},
    {"name": "puma", "num_stages": 3, "stage_schedule": [[5, 6], [11, 2]], "block_size": 6, "factor": 1.0},
    {"name": "puma", "num_stages": 4, "order": "random", "block_size": 2},
    {"name": "puma", "num_stages": 4, "run": 2},
    {"name": "puma", "num_stages": 8, "start": "uniform", "run": 3, "threshold": 0.8},
    {"name": "puma", "num_stages": 4, "start": "beta", "block_size": 4, "stage_schedule": [[5, 6], [11, 2]]},
    {"name": "puma_variable", "tokens_per_step": 1, "threshold": None},
    {"name": "puma_variable", "tokens_per_step": 50},  # more than there are
    {"name": "puma_variable", "tokens_per_step": 2, "factor": 1.0, "block_size": 3},
    {"name": "ar"},
]
SOME_EMPTY = {"masking": "independent"}
"""Settings under which a row may have nothing masked."""

STEPS = 14
"""By then the number of stages has changed twice and every pool has replaced nearly half of its rows or more."""

cases = pytest.mark.parametrize("settings", CASES, ids=lambda case: ",".join(f"{k}={v}" for k, v in case.items()))


def build(settings: dict, shard: RowShard | None = None) -> MaskingProcess:
    component = resolve("process", settings["name"])
    config = check_section(component.Config, settings, "process")
    context = ProcessContext(tokens=TOKENS, shard=shard or RowShard.whole(ROWS), seed=5)
    return component.from_config(config, context)


def statistics(process: MaskingProcess, batch: MaskedBatch, step: int) -> TokenStats:
    """Random ones of the kind that the process asks for; entropies lie between 0 and 1 nat."""
    stats = random_stats(batch, step)
    if process.requirements.confidence == "neg_entropy":
        stats = replace(stats, confidence=stats.confidence - 1)
    return replace(stats, statistic=process.requirements.confidence)


def test_every_process_is_here() -> None:
    assert {case["name"] for case in CASES} == {*COMPONENTS["process"]}


@cases
def test_it_is_a_process(settings: dict) -> None:
    assert isinstance(build(settings), MaskingProcess)


class Marked(RandomStream):
    """Prompts are made of the token 5 alone, answers of the others."""

    def __getitem__(self, number: torch.Tensor) -> CleanBatch:
        clean = super().__getitem__(number)
        return replace(clean, x0=torch.where(clean.prompt_mask, PROMPT, clean.x0 % PROMPT))


@cases
def test_the_prompt_is_kept_and_the_rest_is_clean_or_masked(settings: dict) -> None:
    process, stream = build(settings), Marked(length=LENGTH, vocab_size=7)
    for step in range(STEPS):
        batch = process.next_batch(stream)
        is_masked, is_prompt = batch.xt == MASK, batch.x0 == PROMPT
        is_scored = batch.scatter(torch.ones_like(batch.weight), 0.0).bool()
        assert torch.equal(batch.xt[~is_masked], batch.x0[~is_masked])
        assert not (is_prompt & (is_masked | is_scored)).any()
        assert (is_masked <= is_scored).all()
        assert is_prompt.any()
        process.observe(batch, statistics(process, batch, step))


class Conversations(Marked):
    """Every row has up to three answers, divided by prompts, each but the last ending with the end token 0."""

    def __getitem__(self, number: torch.Tensor) -> CleanBatch:
        clean = super().__getitem__(number)
        position = torch.arange(LENGTH)
        prompt_mask = (position + number.unsqueeze(1)) % 5 < 2
        prompt_mask[:, -1] = False
        x0 = torch.where(prompt_mask, PROMPT, 1 + clean.x0 % (PROMPT - 1))
        ends_answer = ~prompt_mask & prompt_mask.roll(-1, dims=1)
        padding = position >= 11 - (number % 2).unsqueeze(1)
        return CleanBatch(x0=torch.where(ends_answer | padding & ~prompt_mask, 0, x0), prompt_mask=prompt_mask)


@cases
def test_every_answer_of_a_conversation_is_learned(settings: dict) -> None:
    """Whichever answer a token is of, it is masked at some time, has a weight, and is shown at the end."""
    process, stream = build(settings), Conversations(length=LENGTH, vocab_size=7)
    weighed, seen, is_learned = torch.zeros(LENGTH), set(), torch.zeros(LENGTH)
    for step in range(40):
        batch = process.next_batch(stream)
        is_prompt = batch.x0 == PROMPT
        weight = batch.scatter(batch.weight, 0.0)
        clean = CleanBatch(x0=batch.x0, prompt_mask=is_prompt)
        assert torch.equal(batch.xt[batch.xt != MASK], batch.x0[batch.xt != MASK])
        assert not (is_prompt & ((batch.xt == MASK) | (weight > 0))).any()
        if settings["name"] in ("puma_variable", "ar"):  # which leave out the padding, and it alone
            assert not (weight[~clean.answer_mask(TOKENS.eos_id)] > 0).any()
        weighed += (weight > 0).sum(dim=0)
        is_learned += clean.answer_mask(TOKENS.eos_id).sum(dim=0)
        seen |= {tuple(row) for row in batch.x0.tolist()}
        process.observe(batch, statistics(process, batch, step))
    assert len(seen) > ROWS  # rows are done, and replaced
    assert (weighed[is_learned > 0] > 0).all()


@cases
def test_scores_are_in_order_and_padding_weighs_nothing(settings: dict, stream: RandomStream) -> None:
    process = build(settings)
    for step in range(10):
        batch = process.next_batch(stream)
        is_real = batch.scored < batch.x0.numel()
        assert len(batch.scored) % PAD_MULTIPLE == 0
        assert (batch.scored.diff()[is_real[1:]] > 0).all()
        assert (batch.scored[~is_real] == batch.x0.numel()).all()
        assert (batch.weight[~is_real] == 0).all()
        assert (batch.weight.isfinite() & (batch.weight >= 0)).all()
        if not SOME_EMPTY.items() <= settings.items():
            assert (batch.scatter(batch.weight, 0.0).sum(dim=1) > 0).all()  # no row is ever empty
        process.observe(batch, statistics(process, batch, step))


@cases
def test_a_batch_stays_until_it_is_observed(settings: dict, stream: RandomStream) -> None:
    process = build(settings)
    previous = None
    for step in range(6):
        batch, again = process.next_batch(stream), process.next_batch(stream)
        assert_equal(batch, again)
        if previous is not None:
            old, copy = previous
            assert_equal(old, copy)  # handed out, it does not change
            assert not (torch.equal(old.x0, batch.x0) and torch.equal(old.xt, batch.xt))
        previous = batch, replace(batch, x0=batch.x0.clone(), xt=batch.xt.clone(), weight=batch.weight.clone())
        process.observe(batch, statistics(process, batch, step))


def assert_equal(one: MaskedBatch, other: MaskedBatch) -> None:
    for name in ("x0", "xt", "scored", "weight"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@cases
def test_shards_make_up_the_whole(settings: dict, stream: RandomStream) -> None:
    whole = build(settings)
    parts = [build(settings, RowShard(total=ROWS, start=start, stop=stop)) for start, stop in ((0, 4), (4, ROWS))]
    for step in range(STEPS):
        batch, pieces = whole.next_batch(stream), [part.next_batch(stream) for part in parts]
        assert torch.equal(batch.x0, torch.cat([piece.x0 for piece in pieces]))
        assert torch.equal(batch.xt, torch.cat([piece.xt for piece in pieces]))
        is_scored, *own = (each.scatter(each.weight, 0.0) for each in (batch, *pieces))
        if settings["name"] == "ar":  # it divides by the tokens of all ranks, which these parts cannot ask
            is_scored, *own = (each > 0 for each in (is_scored, *own))
        assert torch.equal(is_scored, torch.cat(own))
        stats = statistics(whole, batch, step)
        whole.observe(batch, stats)
        dense = [batch.scatter(value, 0.0).split([4, ROWS - 4]) for value in (stats.confidence, stats.top1)]
        for part, piece, confidence, top1 in zip(parts, pieces, *dense, strict=True):
            own_stats = replace(stats, confidence=piece.gather(confidence), top1=piece.gather(top1))
            part.observe(piece, replace(own_stats, nll=1 - own_stats.top1))
        states = [each.state_dict().get("pool") for each in (whole, *parts)]
        for name in states[0] or ():
            assert torch.equal(states[0][name], torch.cat([state[name] for state in states[1:]])), name
    assert whole.examples_seen == sum(part.examples_seen for part in parts)


@cases
def test_its_state_goes_on_exactly(settings: dict, stream: RandomStream) -> None:
    process, restored = build(settings), build(settings)
    for step in range(STEPS):
        if step == 7:
            restored.load_state_dict(process.state_dict())
        batch = process.next_batch(stream)
        if step >= 7:
            again = restored.next_batch(stream)
            assert_equal(batch, again)
            restored.observe(again, statistics(restored, again, step))
        process.observe(batch, statistics(process, batch, step))
    assert restored.examples_seen == process.examples_seen
    assert restored.metrics() == process.metrics()


@pytest.mark.parametrize("settings", [case for case in CASES if case["name"] != "ar"], ids=str)
def test_answers_that_are_not_known_are_not_scored(settings: dict) -> None:
    """`x0` holds the mask there."""

    class Unknown(RandomStream):
        def __getitem__(self, number: torch.Tensor) -> CleanBatch:
            clean = super().__getitem__(number)
            return replace(clean, x0=clean.x0.index_fill(1, torch.tensor([LENGTH - 1]), MASK))

    process, stream = build(settings), Unknown(length=LENGTH, vocab_size=7)
    for step in range(STEPS):
        batch = process.next_batch(stream)
        is_scored = batch.scatter(torch.ones_like(batch.weight), 0.0).bool()
        assert not is_scored[:, -1].any()
        assert torch.equal(is_scored[:, :-1], (batch.xt == MASK)[:, :-1])
        process.observe(batch, statistics(process, batch, step))


@pytest.mark.parametrize(
    "settings",
    [case for case in CASES if case["name"] != "ar" and "block_size" not in case],
    ids=lambda case: ",".join(f"{k}={v}" for k, v in case.items()),
)
def test_one_block_is_no_blocks(settings: dict, stream: RandomStream) -> None:
    plain, one = build(settings), build(settings | {"block_size": LENGTH})
    for step in range(STEPS):
        batches = [process.next_batch(stream) for process in (plain, one)]
        assert_equal(*batches)
        for process, batch in zip((plain, one), batches, strict=True):
            process.observe(batch, statistics(process, batch, step))
    assert plain.metrics() == one.metrics()
    assert (plain.requirements.block_size, one.requirements.block_size) == (None, LENGTH)


@cases
def test_wrong_settings_are_named(settings: dict) -> None:
    key = next(iter(resolve("process", settings["name"]).Config.model_fields))
    with pytest.raises(UserError, match=rf"unknown key process\.{key}x; did you mean process\.{key}\?"):
        build(settings | {f"{key}x": 1})
    if "block_size" in resolve("process", settings["name"]).Config.model_fields:
        with pytest.raises(UserError, match=r"process.block_size=5 does not divide rows of 12 positions; use 4 or 6"):
            build(settings | {"block_size": 5})
