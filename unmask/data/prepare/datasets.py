"""The data sets that `unmask prepare` knows by name: a row each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dataset:
    """Where a data set is on the Hugging Face hub, and what its fields are called.

    Attributes:
        repository: its name on the hub; None: without files, the sources of Python's standard library.
        fields: those of prompt and answer; or one alone, that of running text.
        recipe: what trains on it.
        small_recipe: what does where the vocabulary is small.
        config: the hub's name for a variant of it, if there are several.
        test_split: rows for evaluation, which are copied as text, if there are such.
    """

    repository: str | None
    fields: tuple[str, ...]
    recipe: str
    small_recipe: str
    config: str | None = None
    split: str = "train"
    test_split: str | None = None

    @property
    def kind(self) -> str:
        """A key of `kinds.KINDS`."""
        return "text" if len(self.fields) == 1 else "answers"


DATASETS = {
    "tinygsm": Dataset("TinyGSM/TinyGSM", ("question", "code"), "tinygsm/puma", "tinygsm/puma_small"),
    "gsm8k": Dataset(
        "openai/gsm8k", ("question", "answer"), "tinygsm/puma", "tinygsm/puma_small", config="main", test_split="test"
    ),
    "text": Dataset(None, ("text",), "text/uniform", "text/uniform_small"),
    "lm1b": Dataset("dvruette/lm1b", ("text",), "text/lm1b_uniform", "text/uniform_small"),
    "openwebtext": Dataset("Skylion007/openwebtext", ("text",), "text/owt_uniform", "text/uniform_small"),
}
