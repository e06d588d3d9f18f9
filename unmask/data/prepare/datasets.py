"""The data sets that `unmask prepare` knows by name: a row each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dataset:
    """Where a data set is on the Hugging Face hub, and what its fields are called.

    Attributes:
        config: the hub's name for a variant of it, if there are several.
        test_split: rows for evaluation, which are copied as text, if there are such.
    """

    repository: str
    prompt_field: str
    answer_field: str
    config: str | None = None
    split: str = "train"
    test_split: str | None = None


DATASETS = {
    "tinygsm": Dataset("TinyGSM/TinyGSM", prompt_field="question", answer_field="code"),
    "gsm8k": Dataset("openai/gsm8k", config="main", prompt_field="question", answer_field="answer", test_split="test"),
}
