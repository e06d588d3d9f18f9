"""Compares two evaluations on the same examples, example by example."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from unmask.evaluation.evaluate import Cells, Evaluation
from unmask.evaluation.statistics import Difference, mcnemar, paired_difference, share_text


@dataclass(frozen=True)
class Paired:
    """One measure of two models on the same examples."""

    measure: str
    """A decoder's label, or NELBO or NLL."""
    value: float
    against: float
    difference: Difference
    """`value - against`, with its paired interval."""
    only: int | None = None
    """Examples that the model alone has right; None for a likelihood."""
    only_against: int | None = None
    """Examples that the other alone has right."""
    p: float | None = None
    """McNemar's exact two-sided p-value."""
    n: int | None = None
    """The number of examples of a share."""

    def cells(self) -> list[str]:
        """Formats the measure as a row of a table, each interval under its value, as terminals are narrow."""
        scale, form = (1, "+.3f") if self.only is None else (100, "+.1f")
        ends = ", ".join(f"{scale * end:{form}}" for end in self.difference.interval or ())
        shown = f"{scale * self.difference.value:{form}}" + (f"\n[{ends}]" if ends else "")
        if self.only is None:
            return [self.measure, f"{self.value:.4f}", f"{self.against:.4f}", shown, "", ""]
        alone = f"{self.only} / {self.only_against}"
        assert self.n is not None, "a share is of some number"
        both = (share_text(value * self.n, self.n).replace(" [", "\n[") for value in (self.value, self.against))
        return [self.measure, *both, shown, alone, f"{self.p:.2g}"]


@dataclass(frozen=True)
class PairedComparison:
    """All measures that two evaluations have in common."""

    measures: list[Paired]

    @staticmethod
    def of(own: Evaluation, other: Evaluation) -> "PairedComparison":
        """Compares two evaluations of the same examples, all by this process. What was not graded is left out."""
        return PairedComparison([*_accuracies(own, other), *_likelihoods(own, other)])

    def as_dict(self) -> dict[str, Any]:
        """Returns the comparison as JSON values, by measure."""
        return {each.measure: {key: value for key, value in asdict(each).items() if key != "measure"}
                for each in self.measures}  # fmt: skip

    def table(self) -> Cells:
        """Returns a row for each measure."""
        header = ("measure", "this", "other", "difference, 95 %", "alone", "p")
        return Cells(header, [each.cells() for each in self.measures])


def _accuracies(own: Evaluation, other: Evaluation) -> Iterator[Paired]:
    for label in own.accuracy:
        if label not in other.accuracy:
            continue
        one, two = ([record["accuracy"] for record in each.accuracy[label].records] for each in (own, other))
        pairs = [(bool(a), bool(b)) for a, b in zip(one, two, strict=True) if a is not None and b is not None]
        if not pairs:
            continue
        right, against = ([float(pair[which]) for pair in pairs] for which in (0, 1))
        only, only_against = pairs.count((True, False)), pairs.count((False, True))
        yield Paired(
            label,
            sum(right) / len(pairs),
            sum(against) / len(pairs),
            paired_difference(against, right),
            only=only,
            only_against=only_against,
            p=mcnemar(only, only_against),
            n=len(pairs),
        )


def _likelihoods(own: Evaluation, other: Evaluation) -> Iterator[Paired]:
    one, two = own.likelihood, other.likelihood
    if one is None or two is None or one.rows is None or two.rows is None:
        return
    name = one.name if one.name == two.name else f"{one.name} / {two.name}"
    difference = paired_difference(two.rows.nll.tolist(), one.rows.nll.tolist(), one.rows.length.tolist())
    yield Paired(name, one.estimate.value, two.estimate.value, difference)
