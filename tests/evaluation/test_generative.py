"""What samples are worth: from rows to documents, to a perplexity, and beside real text."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.evaluation.judges import Letters, Uniform, random_llama
from tests.helpers.text import save_tokenizer, word_piece, write_lines
from unmask.data.prepare import PrepareSettings, prepare
from unmask.decoding.config import DecodeConfig
from unmask.errors import UserError
from unmask.evaluation.generative import (
    Samples,
    measure_quality,
    measure_reference,
    measure_samples,
    sample,
    sampling_config,
)
from unmask.evaluation.judge import Passage, Scorer
from unmask.models.build import build_denoiser
from unmask.models.transformer_config import TransformerConfig
from unmask.tasks.text import Text
from unmask.types import CleanBatch

END, MASK, LENGTH = 256, 257, 16


def task(rows: str = "wrap") -> Text:
    return Text(Text.Config(rows=rows, length=LENGTH))


def row(*parts: str, fill: int = END) -> list[int]:
    """The start, then texts with an end between them, then `fill`."""
    ids = [END]
    for number, part in enumerate(parts):
        ids += [END] * (number > 0) + list(part.encode())
    return ids + [fill] * (LENGTH - len(ids))


def given(number: int, *, up_to: int = 1) -> torch.Tensor:
    return (torch.arange(LENGTH) < up_to).expand(number, -1)


# --- documents -------------------------------------------------------------------------------------------------------


def test_a_packed_row_is_its_documents() -> None:
    tokens = torch.tensor(row("one", "", "two", "three"))
    assert task().documents(tokens, ~given(1)[0]) == [list(b"one"), list(b"two"), list(b"three")]


def test_a_row_of_one_document_ends_with_it() -> None:
    tokens = torch.tensor(row("one", "", "two"))
    assert task("document").documents(tokens, ~given(1)[0]) == [list(b"one")]
    assert task("document").documents(torch.tensor(row("")), ~given(1)[0]) == []


# --- measures --------------------------------------------------------------------------------------------------------


def test_perplexity_is_of_all_tokens_together(scorer: Scorer) -> None:
    """exp of a sum over a sum, not a mean of perplexities; documents are scored by themselves."""
    tokens = torch.tensor([row("Ann has 3 pens"), row("a", "how many?"), row("")])
    found = measure_quality(task(), scorer, tokens, given(3))
    parts = scorer.score([Passage("Ann has 3 pens"), Passage("a"), Passage("how many?")])
    number = sum(part.tokens for part in parts)
    assert found.ppl == pytest.approx(math.exp(sum(part.nll for part in parts) / number), rel=1e-5)
    assert found.counts == {
        "rows": 3, "tokens": 14 + 1 + 9, "scored_tokens": number, "unknown_tokens": 0, "cut_rows": 0, "empty_rows": 1,
    }  # fmt: skip
    assert found.records[1]["documents"] == ["a", "how many?"]
    assert found.records[1]["nll"] == pytest.approx(parts[1].nll + parts[2].nll, rel=1e-5)
    assert found.records[2] == {"given": "", "documents": [], "nll": 0, "scored_tokens": 0}


def test_by_hand() -> None:
    """Under a model that finds all of 8 letters equally likely: a perplexity of 8, without any error."""
    rows = torch.tensor([row("abab"), row("aa", "b")])
    found = measure_quality(task(), Scorer(Uniform(), Letters(), ""), rows, given(2))
    assert (found.ppl, found.ppl_stderr) == (pytest.approx(8), pytest.approx(0, abs=1e-6))
    entropy = (math.log(2) + 2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3)) / 2
    expected = {"distinct_1": 2 / 7, "distinct_2": 3 / 4, "distinct_3": 1.0, "unigram_entropy": entropy}
    assert {key: found.values()[key] for key in expected} == pytest.approx(expected)
    assert found.values().keys() == {"gen_ppl", "gen_ppl_stderr", *expected}


def test_the_error_is_that_of_the_rows() -> None:
    """Delta method over rows, by hand: two rows of 2 and 4 tokens with NLL a and b."""

    class Told(Scorer):
        def score(self, passages: list[Passage]) -> list:
            return [
                own._replace(nll=3.0 if own.tokens == 2 else 10.0)
                for own in Scorer.score(self, passages)
            ]  # fmt: skip

    found = measure_quality(task(), Told(Uniform(), Letters(), ""), torch.tensor([row("ab"), row("abcd")]), given(2))
    mean = 13 / 6
    variance = ((3 - 2 * mean) ** 2 + (10 - 4 * mean) ** 2) * 2 / 1
    assert found.ppl == pytest.approx(math.exp(mean))
    assert found.ppl_stderr == pytest.approx(math.exp(mean) * math.sqrt(variance) / 6)


def test_without_any_text_there_is_no_perplexity(scorer: Scorer) -> None:
    found = measure_quality(task(), scorer, torch.tensor([row("")] * 2), given(2))
    assert found.ppl is None
    assert found.values() == {"unigram_entropy": 0, "distinct_1": 0, "distinct_2": 0, "distinct_3": 0}
    with pytest.raises(UserError, match="the held-out rows have no text"):
        measure_reference(task(), scorer, CleanBatch(x0=torch.tensor([row("")]), prompt_mask=given(1)))


def test_a_prompt_is_context_and_not_counted(scorer: Scorer) -> None:
    """Unless its document has ended."""
    canvas = torch.tensor([row("Ann has", fill=MASK), row("old", "Ann has", fill=MASK), row("Ann has", fill=MASK)])
    done = torch.tensor([row("Ann has 3 pens"), row("old", "Ann has 3 p"), row("Ann has", " 3 pens")])
    found = measure_samples(task(), scorer, Samples(canvas, torch.arange(3)), done)
    assert [(own["given"], own["documents"]) for own in found.records] == [
        ("Ann has", [" 3 pens"]),
        ("Ann has", [" 3 p"]),
        ("", [" 3 pens"]),
    ]
    (first, _, third) = scorer.score([Passage(" 3 pens", "Ann has"), Passage(""), Passage(" 3 pens")])
    assert found.records[0]["nll"] == pytest.approx(first.nll, rel=1e-5)
    assert found.records[2]["nll"] == pytest.approx(third.nll, rel=1e-5)
    assert found.counts["tokens"] == 7 + 4 + 7


def test_text_that_the_other_model_does_not_know(tmp_path: Path) -> None:
    folder = random_llama(tmp_path / "words", word_piece(), start="[SEP]")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": "[UNK]"}))
    scorer = Scorer.load(str(folder), torch.device("cpu"))
    real = CleanBatch(x0=torch.tensor([row("xyz zyx")]), prompt_mask=given(1))
    with pytest.raises(UserError, match="knows nothing of the held-out text"):
        measure_reference(task(), scorer, real)
    some = CleanBatch(x0=torch.tensor([row("how many xyz")]), prompt_mask=given(1))
    assert measure_reference(task(), scorer, some).counts["unknown_tokens"] == 1


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_samples_are_the_same_in_any_batch(causal: bool) -> None:
    """And differ from each other; they start from nothing but the given end token."""
    own = task()
    order = {"alignment": "next"} if causal else {}
    model = build_denoiser(TransformerConfig(preset="tiny", causal=causal, **order), own.tokens).train()
    blank = CleanBatch(x0=torch.tensor([row("real text")] * 2), prompt_mask=given(2))
    samples = Samples.from_nothing(blank, MASK, 3)
    assert (samples.canvases == torch.tensor([END] + [MASK] * (LENGTH - 1))).all()
    base = DecodeConfig(confidence="left_to_right") if causal else DecodeConfig(steps=4)
    at_once = sample(model, own, samples, sampling_config(base, is_causal=causal))
    counted: list[int] = []
    in_two = sampling_config(base.model_copy(update={"batch_size": 2}), is_causal=causal)
    assert torch.equal(sample(model, own, samples, in_two, update=counted.append), at_once)
    assert counted == [2, 3]
    assert len(at_once.unique(dim=0)) == 3
    assert not (at_once == MASK).any()
    assert model.training


def test_how_samples_are_drawn() -> None:
    base = DecodeConfig(confidence="margin", steps=7)
    assert sampling_config(base, is_causal=False).label == "random/steps7/T1"
    assert sampling_config(DecodeConfig(confidence="left_to_right"), is_causal=True).label == "left_to_right/1/T1"
    assert sampling_config(DecodeConfig(temperature=0.7), is_causal=False).temperature == 0.7
    for remask in ("p2", "rcr"):  # look at no order, so that a random one would be refused
        found = sampling_config(DecodeConfig(steps=8, remask=remask), is_causal=False)
        assert DecodeConfig.model_validate(found.model_dump()) == found


# --- real text -------------------------------------------------------------------------------------------------------


def test_real_text_is_measured_as_samples_are(scorer: Scorer, tmp_path: Path) -> None:
    """Samples that happen to be the held-out rows get their numbers."""
    path = write_lines(tmp_path / "c.jsonl", [{"text": f"document {i} of them" * (i % 3 + 1)} for i in range(20)])
    save_tokenizer(tmp_path / "tokenizer")
    asked = PrepareSettings(
        "text", str(tmp_path / "tokenizer"), tmp_path / "out", (str(path),), 32, validation_ratio=0.4
    )
    prepare(asked)
    own = Text(Text.Config(path=str(asked.out), validation_ratio=0.4))
    real = own.validation(4)
    samples = Samples.from_nothing(real, own.tokens.mask_id, len(real))
    assert measure_samples(own, scorer, samples, real.x0) == measure_reference(own, scorer, real)
