"""The quality of samples of text: their likelihood under another model, and their diversity.

Neither is enough alone: repetition is likely under any model, and noise is as diverse as can be. Real text, measured
the same way, gives the value to expect of both.

Dimensions: N samples, L positions.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.errors import UserError
from unmask.evaluation.judge import Passage, Scored, Scorer
from unmask.evaluation.nelbo import Estimate, RowLikelihoods
from unmask.models.denoiser import Denoiser
from unmask.tasks.task import TextTask
from unmask.types import CleanBatch

Ids = Sequence[int]


def unigram_entropy(samples: Sequence[Ids]) -> float:
    """Computes `-sum_v p(v) log p(v)` in nats, p the shares of the tokens within a sample; the mean over samples.

    As for masked diffusion models since Zheng et al. 2024 (2409.02908). A sample without tokens has entropy 0.
    """
    return sum(map(_entropy, samples), 0.0) / max(1, len(samples))


def distinct(documents: Iterable[Ids], n: int) -> float:
    """Computes the share of different n-grams among the n-grams of all documents (Li et al. 2016, 1510.03055).

    It falls as more text is taken: compare equal amounts. 0 if no document is as long as n.
    """
    grams = Counter(tuple(ids[i : i + n]) for ids in documents for i in range(len(ids) - n + 1))
    return len(grams) / max(1, grams.total())


def _entropy(ids: Ids) -> float:
    counts = Counter(ids).values()
    return sum((-count / len(ids) * math.log(count / len(ids)) for count in counts), 0.0)


NGRAM_SIZES = (1, 2, 3)
"""The n of `distinct`."""


@dataclass(frozen=True)
class Quality:
    """The quality of N rows of text; tokens that were given do not count."""

    ppl: float | None
    """exp(sum of the NLL / sum of the tokens) under the other model, in its tokens; None without any text."""
    ppl_stderr: float | None
    """The standard error of `ppl`, for independent rows; None for a single one."""
    unigram_entropy: float
    distinct: dict[int, float]
    counts: dict[str, int]
    """`rows`; their `tokens`; `scored_tokens` and `unknown_tokens` of the other model's tokenizer; `cut_rows`, whose
    end does not fit its context and is not scored; `empty_rows`, without any text."""
    records: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """One for each row: texts of its `documents`, text `given` before the first, `nll` and `scored_tokens`."""

    def values(self) -> dict[str, float]:
        """Returns the figures by name, without those that are None."""
        scored = {"gen_ppl": self.ppl, "gen_ppl_stderr": self.ppl_stderr}
        varied = {f"distinct_{n}": share for n, share in self.distinct.items()}
        return {key: value for key, value in scored.items() if value is not None} | {
            "unigram_entropy": self.unigram_entropy,
            **varied,
        }


@dataclass(frozen=True)
class Samples:
    """The canvases that samples start from."""

    canvases: Int[Tensor, "N L"]
    keys: Int[Tensor, "N"]
    """One for each sample; keys its noise."""

    @staticmethod
    def from_nothing(blank: CleanBatch, mask_id: int, number: int) -> "Samples":
        """Repeats the canvas of a row of text at t = 1, the first row's: all rows of text are given the same."""
        return Samples(blank[:1].masked(mask_id).expand(number, -1).clone(), torch.arange(number))


def sampling_config(base: DecodeConfig, *, is_causal: bool) -> DecodeConfig:
    """Returns `base` with temperature and random order: with one token a step these are samples of the model.

    A causal model has its own order, and some remaskings look at none.
    """
    order = {} if is_causal or base.ranks_by_token else {"order": "random"}
    return base.model_copy(update=order | {"temperature": base.temperature or 1.0})


def check_random(config: DecodeConfig, number: int, option: str) -> None:
    """Raises `UserError` if several samples of one prompt would all be the same."""
    if number > 1 and not config.is_random:
        raise UserError(f"{option}: with temperature=0 all {number} samples are the same; draw them with temperature=1")


def sample(
    model: Denoiser,
    task: TextTask,
    samples: Samples,
    config: DecodeConfig,
    *,
    update: Callable[[int], None] | None = None,
) -> Int[Tensor, "N L"]:
    """Returns finished canvases, on the CPU; calls `update` with their number. The model keeps its mode."""
    device = next(model.parameters()).device
    decoder = build_decoder(config, model, task.tokens, rows=len(samples.keys))
    was_training = model.training
    model.eval()
    finished: list[Tensor] = []
    try:
        for start in range(0, len(samples.keys), config.batch_size):
            rows = slice(start, start + config.batch_size)
            decoded = decoder.decode(samples.canvases[rows].to(device), samples.keys[rows].to(device))
            finished += decoded.tokens.cpu()
            if update is not None:
                update(len(finished))
    finally:
        model.train(was_training)
    return torch.stack(finished)


def measure_reference(task: TextTask, scorer: Scorer, real: CleanBatch) -> Quality:
    """Measures real text as samples are measured.

    Raises:
        UserError: the rows hold no text, or the other model's tokenizer knows nothing of it.
    """
    found = measure_quality(task, scorer, real.x0, real.prompt_mask)
    if not found.counts["scored_tokens"]:
        raise UserError(f"{scorer.name}: the held-out rows have no text to hold samples against")
    if found.counts["unknown_tokens"] == found.counts["scored_tokens"]:
        raise UserError(
            f"{scorer.name}: its tokenizer knows nothing of the held-out text (all of its tokens are unknown); give a "
            "model of this language"
        )
    return found


def measure_samples(task: TextTask, scorer: Scorer, samples: Samples, tokens: Int[Tensor, "N L"]) -> Quality:
    """Measures finished samples from their first masked position on."""
    is_given = (samples.canvases != task.tokens.mask_id).cumprod(dim=-1).bool()
    return measure_quality(task, scorer, tokens, is_given)


def measure_quality(
    task: TextTask, scorer: Scorer, tokens: Int[Tensor, "N L"], is_given: Bool[Tensor, "N L"]
) -> Quality:
    """Measures rows whose first positions are given (`is_given`): these are context, and do not count.

    A row is cut into documents at its end tokens, and each is scored by itself.
    """
    rows = [_Row.of(task, *row) for row in zip(tokens, is_given, strict=True)]
    scored = iter(scorer.score([passage for row in rows for passage in row.passages]))
    costs = [_total([next(scored) for _ in row.passages]) for row in rows]
    nll = _mean([(cost.nll, cost.tokens) for cost in costs if cost.tokens])
    ppl = None if nll is None else math.exp(min(700.0, nll.value))
    return Quality(
        ppl=ppl,
        ppl_stderr=None if ppl is None or nll is None or nll.stderr is None else ppl * nll.stderr,
        unigram_entropy=unigram_entropy([row.tokens for row in rows]),
        distinct={n: distinct((ids for row in rows for ids in row.documents), n) for n in NGRAM_SIZES},
        counts=_counts(rows, costs),
        records=[row.record(cost) for row, cost in zip(rows, costs, strict=True)],
    )


@dataclass(frozen=True)
class _Row:
    """The documents of a row, as ids and as text."""

    documents: list[list[int]]
    passages: list[Passage]

    @staticmethod
    def of(task: TextTask, tokens: Int[Tensor, "L"], is_given: Bool[Tensor, "L"]) -> "_Row":
        documents, decode = task.documents(tokens, ~is_given), task.vocabulary.decode
        passages = [Passage(decode(ids)) for ids in documents]
        given = _last_document(tokens[is_given].tolist(), task.vocabulary.eos_id)
        goes_on = documents and int(tokens[~is_given][0]) != task.vocabulary.eos_id
        if given and goes_on:
            passages[0] = Passage(passages[0].text, decode(given))
        return _Row(documents, passages)

    @property
    def tokens(self) -> list[int]:
        return [i for ids in self.documents for i in ids]

    def record(self, cost: Scored) -> dict[str, Any]:
        given = self.passages[0].given if self.passages else ""
        texts = [passage.text for passage in self.passages]
        return {"given": given, "documents": texts, "nll": cost.nll, "scored_tokens": cost.tokens}


def _last_document(ids: list[int], eos_id: int) -> list[int]:
    return ids[len(ids) - ids[::-1].index(eos_id) :] if eos_id in ids else ids


def _total(parts: Sequence[Scored]) -> Scored:
    return Scored(
        nll=sum(part.nll for part in parts),
        tokens=sum(part.tokens for part in parts),
        is_cut=any(part.is_cut for part in parts),
        unknown=sum(part.unknown for part in parts),
    )


def _mean(costs: Sequence[tuple[float, int]]) -> Estimate | None:
    """Returns the nats per token of all rows; None without any."""
    if not costs:
        return None
    nll, length = torch.tensor(costs, dtype=torch.float64).unbind(dim=-1)
    return RowLikelihoods(nll / length, length).over_corpus()


def _counts(rows: Sequence[_Row], costs: Sequence[Scored]) -> dict[str, int]:
    total = _total(costs)
    return {
        "rows": len(rows),
        "tokens": sum(len(row.tokens) for row in rows),
        "scored_tokens": total.tokens,
        "unknown_tokens": total.unknown,
        "cut_rows": sum(cost.is_cut for cost in costs),
        "empty_rows": sum(not row.documents for row in rows),
    }
