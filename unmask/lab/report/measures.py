"""The figures of evaluations that can be drawn: what they are called, and what is known of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A figure of evaluations.

    Attributes:
        name: its title.
        unit: the label of its axis.
        is_share: True for a share, which is written in percent, and of which more is better.
        has_costs: True if it tells by itself how good a model is, so that one asks what a value of it costs.
        count: key of the number of examples of a share.
        level: key of a value to hold it against, if there is one.
        level_name: what that value is.
    """

    name: str
    unit: str
    is_share: bool = False
    has_costs: bool = False
    count: str = ""
    level: str = ""
    level_name: str = ""

    @staticmethod
    def of(key: str) -> "Measure | None":
        """Returns the measure with a key of `metrics.jsonl`, such as `eval/accuracy/ema/prob/3`.

        None for what is not drawn, such as a standard error, or likelihoods of each kind of weights.
        """
        kind, *details = key.removeprefix("eval/").split("/")
        if kind == "accuracy":
            return Measure(_name_rate(details), "solved", is_share=True, has_costs=True, count="eval/examples")
        if len(details) < 2:
            return _PLAIN.get(key)
        folder, file, figure = key.rpartition("/")[0], "/".join(details[:-1]), details[-1]
        if kind == "zero_shot" and figure in _LIKELIHOODS:
            name, unit = _LIKELIHOODS[figure]
            return Measure(f"Other text, {file}: {name}", unit, has_costs=True)
        if kind == "multiple_choice" and figure in _CHOICES:
            count, chance = f"{folder}/examples", f"{folder}/chance"
            name = f"Multiple choice, {file}: {_CHOICES[figure]}"
            return Measure(name, "right", is_share=True, count=count, level=chance, level_name="by chance")
        return None

    @staticmethod
    def named(key: str) -> "Measure":
        """Returns `Measure.of(key)`, or a measure of which nothing but its key is known."""
        return Measure.of(key) or Measure(key, "")


_LIKELIHOODS = {"nelbo": ("NELBO (nats)", "nats"), "bits_per_byte": ("bits per byte", "bits per byte")}
_CHOICES = {"accuracy": "accuracy", "acc_norm": "accuracy per character"}
_REAL = "real text"
_PLAIN = {
    "eval/nelbo": Measure("NELBO (nats)", "nats", has_costs=True),
    "eval/bits_per_byte": Measure("Bits per byte", "bits per byte", has_costs=True),
    "eval/gen_ppl": Measure(
        "Generative perplexity of samples", "perplexity", level="eval/real/gen_ppl", level_name=_REAL
    ),
    "eval/unigram_entropy": Measure(
        "Unigram entropy of samples", "nats", level="eval/real/unigram_entropy", level_name=_REAL
    ),
    "eval/distinct_2": Measure(
        "Different pairs of tokens in samples", "share", level="eval/real/distinct_2", level_name=_REAL
    ),
}


def _name_rate(details: list[str]) -> str:
    """Names a rate such as `ema/prob/3` in words."""
    if len(details) < 3:
        return "Share solved"
    weights, order, amount, *rest = details
    pace = f"{amount} at a step" if amount.isdigit() else amount
    more = "".join(f", {each}" for each in rest)
    return f"Share solved, order {order}, {pace}{more}, {weights} weights"
