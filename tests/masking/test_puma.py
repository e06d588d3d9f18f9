"""The pool against a row-by-row reading of the method in plain Python, and what must hold whatever the model says."""

import math
from collections import defaultdict
from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.helpers import RandomStream, random_stats
from unmask import noise
from unmask.errors import UserError
from unmask.masking.pool_rows import PoolRows
from unmask.masking.process import RowShard
from unmask.masking.puma import PumaPool
from unmask.noise import Purpose
from unmask.types import MaskedBatch, TokenStats

MASK = 6
SETTINGS = [
    {"num_stages": 4},
    {"num_stages": 4, "threshold": 0.8},
    {"num_stages": 1},
    {"num_stages": 30, "threshold": 0.9},  # more stages than positions
    {"num_stages": 3, "stage_schedule": [(5, 6), (11, 2)], "threshold": 0.95},
    {"num_stages": 4, "confidence": "random"},
    {"num_stages": 4, "confidence": "margin", "threshold": 0.5},
    {"num_stages": 4, "factor": 1.2},
    {"num_stages": 4, "confidence": "neg_entropy", "entropy_bound": 0.5},
    {"num_stages": 4, "budget": 0.5},
    {"num_stages": 3, "block_size": 4},
    {"num_stages": 30, "block_size": 3, "threshold": 0.9},
    {"num_stages": 3, "stage_schedule": [(5, 6), (11, 2)], "block_size": 6, "factor": 1.0},
    {"num_stages": 4, "confidence": "random", "block_size": 2},
]
LENGTH, ROWS = 12, 10


def make(batch_size: int = 10, shard: RowShard | None = None, **settings: object) -> PumaPool:
    return PumaPool(mask_id=MASK, shard=shard or RowShard.whole(batch_size), seed=5, **settings)


def pool_of(puma: PumaPool) -> PoolRows:
    assert puma.rows is not None
    return puma.rows


def say(batch: MaskedBatch, step: int, settings: dict) -> TokenStats:
    """Random statistics; as a confidence, entropies from 0 to 1 nat where they are asked for."""
    stats = random_stats(batch, step)
    return replace(stats, confidence=stats.confidence - 1) if settings.get("confidence") == "neg_entropy" else stats


def beyond_the_count(ranked: list[int], top1: list[float], confidence: list[float], settings: dict) -> set[int]:
    """The rules in plain Python, on masked positions, the surest first."""
    if "threshold" in settings:
        return {i for i in ranked if top1[i] > settings["threshold"]}
    n = len(ranked)
    if "factor" in settings:
        while n > 1 and (n + 1) * (1 - min(top1[i] for i in ranked[:n])) >= settings["factor"]:
            n -= 1
        return set(ranked[:n])
    if "entropy_bound" in settings:
        entropies = [-confidence[i] for i in ranked]
        while n > 1 and sum(entropies[:n]) - max(entropies[:n]) > settings["entropy_bound"]:
            n -= 1
        return set(ranked[:n])
    if "budget" in settings:
        while n > 1 and sum(1 - top1[i] for i in ranked[:n]) >= settings["budget"]:
            n -= 1
        return set(ranked[:n])
    return set()


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_step_is_the_method_block_by_block(settings: dict, stream: RandomStream) -> None:
    puma = make(**settings)
    size = settings.get("block_size", LENGTH)
    num_blocks = LENGTH // size
    jumps = not settings.keys().isdisjoint(("threshold", "factor", "entropy_bound", "budget"))
    for step in range(25):
        num_stages = puma.num_stages
        batch = puma.next_batch(stream)
        before = PoolRows(**{name: value.clone() for name, value in vars(pool_of(puma)).items()})
        stats = say(batch, step, settings)
        puma.observe(batch, stats)
        confidence, top1 = batch.scatter(stats.confidence, -math.inf), batch.scatter(stats.top1, 0.0)
        for row, n in product(range(ROWS), range(num_blocks)):
            own = range(n * size, (n + 1) * size)
            example, visit = before.example[row], before.visit[row]
            masked = [i for i in own if before.is_masked[row, i]]
            length = sum(not before.prompt_mask[row, i] for i in own)
            revealed = length - len(masked)
            stage = int(before.stage[row, n]) + 1
            score = confidence[row].tolist()
            if settings.get("confidence") == "random":
                score = noise.uniform(5, Purpose.ORDER, example, visit, torch.arange(LENGTH)).tolist()
            r = (stage + noise.uniform(5, Purpose.TARGET, example, visit * num_blocks + n).item()) / num_stages
            target = max(revealed + 1, min(round(r * length), length - 1))
            ranked = sorted(masked, key=lambda i: -score[i])
            now = set(ranked[: target - revealed])
            now |= beyond_the_count(ranked, top1[row].tolist(), confidence[row].tolist(), settings)
            after = [i for i in masked if i not in now]
            if jumps and length:
                stage = max(stage, num_stages * (length - len(after)) // length)
            left = after if stage < num_stages else []  # a block that is done is visible, and out of the loss
            assert [i for i in own if pool_of(puma).is_masked[row, i]] == left
        assert torch.equal(pool_of(puma).is_done, ~pool_of(puma).is_masked.any(dim=1))


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_prompt_is_kept_and_no_row_is_ever_empty(settings: dict, stream: RandomStream) -> None:
    puma = make(**settings)
    for step in range(40):
        batch = puma.next_batch(stream)
        pool, is_masked = pool_of(puma), batch.xt == MASK
        assert not (is_masked & pool.prompt_mask).any()
        assert torch.equal(batch.xt[~is_masked], batch.x0[~is_masked])
        assert is_masked.any(dim=1).all()
        is_live = pool.masked.any(dim=-1)
        share = (pool.num_maskable * is_live).sum(dim=1) / pool.num_maskable.sum(dim=1)
        assert torch.allclose(batch.scatter(batch.weight, 0.0).sum(1), share.double())
        assert torch.equal(batch.scored[: int(is_masked.sum())], is_masked.flatten().nonzero().squeeze(1))
        assert (pool.stage < puma.num_stages)[is_live].all()
        puma.observe(batch, say(batch, step, settings))


def test_row_r_takes_examples_r_plus_jb_and_drops_none(stream: RandomStream) -> None:
    puma = make(num_stages=3, threshold=0.9)
    visits = defaultdict(list)
    for step in range(30):
        batch = puma.next_batch(stream)
        for row, example in enumerate(pool_of(puma).example.tolist()):
            if example not in visits[row]:
                visits[row].append(example)
        puma.observe(batch, random_stats(batch, step))
    for row, examples in visits.items():
        assert examples == [row + 10 * j for j in range(len(examples))]
    entered = [example for examples in visits.values() for example in examples]
    ready = [examples[-1] + 10 for examples in visits.values()]  # one for every row, which it will take next
    assert len(set(stream.fetched)) == len(stream.fetched)
    assert set(entered) <= set(stream.fetched) <= {*entered, *ready}
    assert puma.examples_seen == len(entered)


@pytest.mark.parametrize(
    ("num_stages", "batch_size", "block_size"),
    [(4, 16, 12), (8, 8, 12), (40, 16, 12), (7, 100, 12), (7, 5, 4), (80, 16, 4)],
)
def test_first_stages_are_spread_evenly(
    num_stages: int, batch_size: int, block_size: int, stream: RandomStream
) -> None:
    puma = make(batch_size, num_stages=num_stages, block_size=block_size)
    puma.next_batch(stream)
    stage = pool_of(puma).stage.flatten()
    if num_stages <= len(stage):
        counts = torch.bincount(stage, minlength=num_stages)
        assert counts.max() - counts.min() <= 1
    else:
        assert len(stage.unique()) == len(stage) == batch_size * 12 // block_size
        gaps = stage.sort().values.diff()
        assert gaps.max() - gaps.min() <= 1


def test_revealed_share_follows_the_stage() -> None:
    stream = RandomStream(length=400, vocab_size=7)
    puma = make(20, num_stages=8)
    for step in range(20):
        batch = puma.next_batch(stream)
        pool = pool_of(puma)
        share = pool.num_revealed / pool.num_maskable
        half_a_token = 0.5 / pool.num_maskable  # what rounding may add
        assert (share >= pool.stage / 8 - half_a_token).all()
        assert (share <= (pool.stage + 1) / 8 + half_a_token).all()
        puma.observe(batch, random_stats(batch, step))


def test_without_threshold_a_row_lives_k_steps() -> None:
    stream = RandomStream(length=40, vocab_size=7)
    puma = make(8, num_stages=5)
    for step in range(50):
        batch = puma.next_batch(stream)
        puma.observe(batch, random_stats(batch, step))
    # 8 rows at first, spread over the stages, and one refill per 5 row-steps
    assert abs(puma.examples_seen - (8 + 50 * 8 / 5)) <= 8
    assert puma.metrics()["puma/steps_per_example"] == 50 * 8 / puma.examples_seen


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 0.9},
        {"factor": 1.0},
        {"entropy_bound": 0.0, "confidence": "neg_entropy"},
        {"threshold": 0.9, "block_size": 4},
    ],
)
def test_a_sure_model_finishes_rows_in_one_step(settings: dict, stream: RandomStream) -> None:
    puma = make(num_stages=8, **settings)
    batch = puma.next_batch(stream)
    sure = torch.ones(len(batch.scored), dtype=torch.float64)
    confidence = sure - 1 if "entropy_bound" in settings else sure
    puma.observe(batch, TokenStats(nll=1 - sure, confidence=confidence, top1=sure))
    assert pool_of(puma).is_done.all()
    assert (puma.next_batch(stream).xt == MASK).any(dim=1).all()
    assert pool_of(puma).example.tolist() == list(range(10, 20))


def test_a_threshold_of_one_reveals_nothing_extra(stream: RandomStream) -> None:
    """Top-1 must *exceed* the threshold."""
    without, with_one = make(num_stages=4), make(num_stages=4, threshold=1.0)
    batch, same = without.next_batch(stream), with_one.next_batch(stream)
    sure = torch.ones(len(batch.scored), dtype=torch.float64)
    without.observe(batch, TokenStats(nll=sure, confidence=sure, top1=sure))
    with_one.observe(same, TokenStats(nll=sure, confidence=sure, top1=sure))
    assert torch.equal(pool_of(without).is_masked, pool_of(with_one).is_masked)


def test_a_change_of_k_discards_no_row(stream: RandomStream) -> None:
    changing, constant = make(num_stages=4, stage_schedule=[(3, 9)]), make(num_stages=4)
    for step in range(3):
        for puma in (changing, constant):
            batch = puma.next_batch(stream)
            puma.observe(batch, random_stats(batch, step))
    assert changing.num_stages == 9
    assert torch.equal(pool_of(changing).is_masked, pool_of(constant).is_masked)
    assert torch.equal(pool_of(changing).example, pool_of(constant).example)
    pool = pool_of(changing)
    assert torch.equal(pool.stage, (9 * pool.num_revealed / pool.num_maskable).long().clamp(max=8))


def test_reveals_do_not_depend_on_hidden_truth(stream: RandomStream) -> None:
    """Other hidden tokens, and any NLL, lead to the same reveals: only what the model says of them counts."""
    one, other = make(num_stages=4, threshold=0.9), make(num_stages=4, threshold=0.9)
    for step in range(4):
        batch, same = one.next_batch(stream), other.next_batch(stream)
        pool = pool_of(other)
        pool.x0 = torch.where(pool.is_masked, (pool.x0 + 1) % 6, pool.x0)
        stats = random_stats(batch, step)
        one.observe(batch, stats)
        other.observe(same, TokenStats(nll=stats.nll * -3, confidence=stats.confidence, top1=stats.top1))
        assert torch.equal(pool_of(one).is_masked, pool_of(other).is_masked)


def test_a_restarted_pool_takes_examples_that_no_row_has_reached(stream: RandomStream) -> None:
    puma, restarted = make(num_stages=3), make(num_stages=3)
    for step in range(9):
        puma.observe(batch := puma.next_batch(stream), random_stats(batch, step))
    restarted.load_state_dict(puma.drop_rows(puma.state_dict()))
    fresh = restarted.next_batch(stream)
    reached = int(pool_of(puma).example.max())
    assert reached < ROWS * 6
    first = -(-(reached + 1) // ROWS) * ROWS
    assert torch.equal(pool_of(restarted).example, torch.arange(first, first + ROWS))
    assert sorted(pool_of(restarted).stage.flatten().tolist()) == sorted(r * 3 // ROWS for r in range(ROWS))
    assert restarted.examples_seen == puma.examples_seen + ROWS
    again = make(num_stages=3)
    again.load_state_dict(restarted.state_dict())
    assert torch.equal(again.next_batch(stream).xt, fresh.xt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.9, "factor": 1.0}, r"process.threshold=0.9 and process.factor=1.0: give one of them"),
        ({"entropy_bound": 0.1}, r"process.entropy_bound=0.1 needs the entropy.*set process.order=neg_entropy"),
    ],
)
def test_rules_that_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "low"}, "process.order='low': unknown order; use one of prob"),
        ({"stage_schedule": [(9, 2), (5, 3)]}, "steps must increase, but 5 follows 9"),
        ({"num_stages": 0}, "process.num_stages=0: Input should be greater than or equal to 1"),
        ({"threshold": 90.0}, "process.threshold=90.0: Input should be less than or equal to 1"),
        ({"factor": 0.0}, "process.factor=0.0: Input should be greater than 0"),
        (
            {"entropy_bound": -1.0, "confidence": "neg_entropy"},
            "process.entropy_bound=-1.0: Input should be greater than or equal to 0",
        ),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_probability_is_not_taken_for_an_entropy(stream: RandomStream) -> None:
    puma = make(confidence="neg_entropy", entropy_bound=0.5)
    batch = puma.next_batch(stream)
    stats = TokenStats.from_logits(batch.gather(torch.randn(*batch.x0.shape, MASK + 1)), batch.gather(batch.x0))
    with pytest.raises(UserError, match=r"orders by neg_entropy, but is given prob; .*requirements.confidence"):
        puma.observe(batch, stats)


def test_the_state_of_another_batch_size_is_refused(stream: RandomStream) -> None:
    puma = make(batch_size=10)
    puma.next_batch(stream)
    with pytest.raises(UserError, match="a pool of 10 rows does not fit one of 8"):
        make(batch_size=8).load_state_dict(puma.state_dict())


def test_nothing_that_is_not_finite_is_kept_for_the_next_step(stream: RandomStream) -> None:
    puma = make()
    batch = puma.next_batch(stream)
    estimate = torch.full((*batch.x0.shape, 2), torch.nan)
    puma.observe(batch, replace(random_stats(batch, 0), estimate=estimate))
    told = puma.next_batch(stream).estimate
    assert told is not None
    assert (told == 0).all()


def test_a_device_may_be_named(stream: RandomStream) -> None:
    assert make(device="cpu").next_batch(stream).x0.device.type == "cpu"


@pytest.mark.parametrize("rows", [slice(0, 4), slice(4, 10)])
def test_a_shard_that_knows_no_others_goes_on_from_its_own_state(rows: slice, stream: RandomStream) -> None:
    """In a loop of one's own, each process saves what it has."""

    def part() -> PumaPool:
        return make(shard=RowShard(total=10, start=rows.start, stop=rows.stop), threshold=0.8)

    whole, other = part(), part()
    for step in range(12):
        batch = whole.next_batch(stream)
        whole.observe(batch, random_stats(batch, step))
        if step == 5:
            other.load_state_dict(whole.state_dict())
    for step in range(6, 12):
        batch = other.next_batch(stream)
        other.observe(batch, random_stats(batch, step))
    assert all(torch.equal(value, vars(pool_of(whole))[name]) for name, value in vars(pool_of(other)).items())
    assert other.examples_seen == whole.examples_seen
    assert other.metrics() == whole.metrics()
    done = 12 * (rows.stop - rows.start) / whole.examples_seen
    assert whole.metrics()["puma/steps_per_example"] == pytest.approx(done)  # of its own rows


@pytest.mark.parametrize(("total", "start", "stop"), [(8, 6, 12), (8, 5, 2), (0, 0, 0), (8, -1, 4)])
def test_a_shard_lies_within_its_batch(total: int, start: int, stop: int) -> None:
    with pytest.raises(UserError, match=r"give 0 <= start <= stop <= total"):
        RowShard(total=total, start=start, stop=stop)


@pytest.mark.parametrize("settings", [settings for settings in SETTINGS if not settings.get("stage_schedule")])
def test_a_run_of_all_stages_changes_nothing_and_is_said_to(settings: dict) -> None:
    most = settings["num_stages"]
    plain, pool = make(ROWS, **settings), make(ROWS, **settings, run=most)
    stream = RandomStream(length=LENGTH, vocab_size=MASK)
    for step in range(20):
        expected, batch = plain.next_batch(stream), pool.next_batch(stream)
        for name in ("x0", "xt", "scored", "weight"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)), name
        for process in (plain, pool):
            process.observe(batch, say(batch, step, settings))
    assert f"without effect: process.run={most} " in (pool.about_unused() or "")
    assert plain.about_unused() is None
    assert most == 1 or make(ROWS, **settings, run=most - 1).about_unused() is None
