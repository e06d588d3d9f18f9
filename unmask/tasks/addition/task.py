"""Long addition as a masked-diffusion task: where an answer has to wait for carries, the order of reveals matters.

A canvas is `a+b=c`: D digits, `+`, D digits, `=`, D + 1 digits, numbers padded with zeros. Tokens are the digits, `+`
(10), `=` (11), and the mask, 12. The answer is written from its most significant digit, or from its least.
There is no file: the n-th example is a function of n (`sums.py`).
Dimensions: B rows, L = 3 D + 3 positions.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field, model_validator
from rich.text import Text
from torch import Tensor

from unmask.config.settings import OneIsBoth, Section
from unmask.data.stream import shuffled_index
from unmask.errors import UserError
from unmask.files import read_object
from unmask.formats import read_text
from unmask.machine import require_memory
from unmask.tasks.addition.sums import Sums, add, longest_chain
from unmask.tasks.task import DisplayLayout, Grades
from unmask.types import CleanBatch, TokenSpec

PLUS, EQUALS, MASK_ID = 10, 11, 12
_SYMBOLS = [*"0123456789+=", ""]
_MOST_KEPT = 2**26
"""Bytes of examples that a stream keeps."""
_LINE = re.compile(r"\s*([0-9]+)\s*\+\s*([0-9]+)\s*(?:=\s*([0-9]*)\s*)?")

_Range = Annotated[tuple[int, int], OneIsBoth]


class AdditionData(Section):
    """The settings of `Addition`."""

    digits: _Range = Field((8, 8), description="fewest and most digits of the two numbers (1 to 100)")
    examples: int = Field(20_000, ge=1, le=2**40, description="how many sums are trained on")
    chain: _Range | None = Field(
        None, description="shortest and longest carry chain of the sums trained on; null = as uniform digits fall"
    )
    test_chain: _Range | None = Field(
        None,
        description="the same for held-out sums, equally many of each length if there are; null = as uniform digits "
        "fall",
    )
    answer: Literal["natural", "reversed"] = Field(
        "natural", description="the answer begins with its most significant digit, or (reversed) its least"
    )
    validation_ratio: float = Field(0.05, ge=0.02, le=0.5, description="share of all sums that is held out")
    seed: int = Field(0, ge=0, description="of the sums and of the split")

    @model_validator(mode="after")
    def _check_ranges(self) -> "AdditionData":
        most = self.digits[1]
        for key, value, low, high in (
            ("digits", self.digits, 1, 100),
            ("chain", self.chain, 0, most),
            ("test_chain", self.test_chain, 0, most),
        ):
            if value is not None and not low <= value[0] <= value[1] <= high:
                of = "" if key == "digits" else f", the most digits that data.digits={list(self.digits)} allows"
                raise ValueError(f"data.{key}={list(value)}: give the least and the most, from {low} to {high}{of}")
        if most < 2:
            raise ValueError(f"data.digits={list(self.digits)}: too few sums to hold any out; let them have 2 or more")
        return self


class Addition:
    """Sums of two numbers. An answer is right if all its digits are."""

    Config = AdditionData

    def __init__(self, config: AdditionData) -> None:
        self.config = config
        self.num_columns = config.digits[1]
        self.tokens = TokenSpec(vocab_size=MASK_ID + 1, length=3 * self.num_columns + 3, mask_id=MASK_ID)
        self.canvas = DisplayLayout(columns=self.num_columns + 1)  # `a+` over `b=` over the answer

    @classmethod
    def from_config(cls, config: AdditionData) -> "Addition":
        return cls(config)

    def _sums(self, *, is_held_out: bool) -> Sums:
        config = self.config
        chain = config.test_chain if is_held_out else config.chain
        return Sums(config.digits, chain, config.validation_ratio, is_held_out, config.seed)

    def encode(self, a: Int[Tensor, "B D"], b: Int[Tensor, "B D"]) -> CleanBatch:
        """Makes examples of numbers given by their digits, the most significant first."""
        c = add(a, b)
        answer = c if self.config.answer == "natural" else c.flip(1)
        plus, equals = (torch.full_like(a[:, :1], token) for token in (PLUS, EQUALS))
        x0 = torch.cat([a, plus, b, equals, answer], dim=1)
        prompt_mask = torch.arange(x0.shape[1]) < x0.shape[1] - c.shape[1]
        return CleanBatch(x0=x0, prompt_mask=prompt_mask.expand(x0.shape).clone())

    def operands(self, tokens: Int[Tensor, "B L"]) -> tuple[Int[Tensor, "B D"], Int[Tensor, "B D"]]:
        """Reads the digits of the two numbers off canvases, the most significant first."""
        width = self.num_columns
        return tokens[:, :width], tokens[:, width + 1 : 2 * width + 1]

    def train_stream(self, seed: int) -> "SumStream":
        return SumStream(self, self._sums(is_held_out=False), seed)

    def synthetic_stream(self, seed: int) -> "SumStream":
        return self.train_stream(seed)

    def validation(self, limit: int) -> CleanBatch:
        require_memory(limit * self.tokens.length * 9, f"{limit} examples", "take fewer")
        a, b = self._sums(is_held_out=True).distinct(limit)
        return self.encode(a, b)

    def examples_from_file(self, path: Path) -> CleanBatch:
        """Reads sums to evaluate on, one on each line: `12345+678`, or with its answer, which is checked."""
        found = list(self._parse(read_text(path).split("\n"), str(path)))
        for where, a, b, answer in found:
            if answer and int(answer) != a + b:
                raise UserError(f"{where}: {a}+{b} is {a + b}, not {int(answer)}; correct it, or leave the answer out")
        return self._encode_numbers([(a, b) for _, a, b, _ in found], str(path))

    def prompts(self, lines: Iterable[str], source: str) -> Int[Tensor, "B L"]:
        """Reads prompts: each line is `12345+678=`, or a JSON object with such a `prompt`."""
        found = list(self._parse(lines, source))
        for where, a, b, answer in found:
            if answer:
                raise UserError(f"{where}: holds an answer; end it with the sign: {a}+{b}=")
        return self._encode_numbers([(a, b) for _, a, b, _ in found], source).masked(MASK_ID)

    def _parse(self, lines: Iterable[str], source: str) -> Iterator[tuple[str, int, int, str]]:
        """Yields the place of each line that is not empty, its two numbers, and the text of its answer."""
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{source}, line {number}"
            match = _LINE.fullmatch(_read_prompt(line, where))
            if match is None:
                raise UserError(f"{where}: is no sum of two numbers; write it as 12345+678=")
            a, b, answer = (digits.lstrip("0") for digits in match.groups(default=""))
            if max(len(a), len(b), len(answer) - 1) > self.num_columns:
                raise UserError(
                    f"{where}: a number is too long; this task has up to {self.num_columns} digits "
                    f"(data.digits={list(self.config.digits)}), and one more in answers"
                )
            yield where, int(a or "0"), int(b or "0"), (answer or "0") if match[3] else ""

    def _encode_numbers(self, pairs: list[tuple[int, int]], source: str) -> CleanBatch:
        if not pairs:
            raise UserError(f"{source}: holds no sum; give one on each line, as 12345+678=")
        width = self.num_columns
        digits = torch.tensor([[[int(digit) for digit in f"{number:0{width}}"] for number in pair] for pair in pairs])
        return self.encode(*digits.unbind(dim=1))

    def grade(self, examples: CleanBatch, tokens: Int[Tensor, "B L"]) -> Grades:
        """Grades `accuracy`: every digit of the answer is right; groups are the lengths of the longest carry chains."""
        chains = longest_chain(*self.operands(examples.x0)).tolist()
        return Grades(
            {"accuracy": (tokens.cpu() == examples.x0).all(dim=1)},
            details=[{"chain": chain} for chain in chains],
            groups=[f"longest carry chain {chain}" for chain in chains],
        )

    def record(self, prompt: Int[Tensor, "L"], tokens: Int[Tensor, "L"]) -> dict[str, Any]:
        a, b = self.operands(prompt[None])
        written = tokens[-self.num_columns - 1 :]
        answer = written if self.config.answer == "natural" else written.flip(0)
        return {
            "prompt": f"{self._text(a[0])}+{self._text(b[0])}=",
            "answer": self._text(answer),
            "right": torch.equal(answer, add(a, b)[0]),
        }

    def _text(self, digits: Int[Tensor, "D"]) -> str:
        text = "".join(self.symbol(digit) or "·" for digit in digits.tolist())
        return text.lstrip("0") or "0"

    def symbol(self, token: int) -> str:
        return _SYMBOLS[token]

    def render(self, tokens: Int[Tensor, "L"], is_given: Bool[Tensor, "L"], is_new: Bool[Tensor, "L"]) -> Text:
        """Renders the canvas as it is, with all its zeros."""
        text = Text()
        for token, given, new in zip(tokens.tolist(), is_given.tolist(), is_new.tolist(), strict=True):
            text.append(self.symbol(token) or "·", style="bold" if given else "black on green" if new else "green")
        return text


class SumStream:
    """The training examples, shuffled: every epoch visits each of `data.examples` sums once."""

    def __init__(self, task: Addition, sums: Sums, seed: int) -> None:
        self._task, self._sums, self._seed = task, sums, seed

    @property
    def epoch_size(self) -> int:
        return self._task.config.examples

    def __getitem__(self, number: Int[Tensor, "n"]) -> CleanBatch:
        index = shuffled_index(number, self.epoch_size, self._seed)
        a, b = self._sums[index] if self._kept is None else (digits[index].long() for digits in self._kept)
        return self._task.encode(a, b)

    @cached_property
    def _kept(self) -> list[Int[Tensor, "N D"]] | None:
        """All examples, unless they are many: to draw a batch takes as long as a small model's step."""
        if self.epoch_size * 2 * self._task.num_columns > _MOST_KEPT:
            return None
        parts = torch.arange(self.epoch_size).split(2**14)
        drawn = [[digits.to(torch.int8) for digits in self._sums[part]] for part in parts]
        return [torch.cat(operand) for operand in zip(*drawn, strict=True)]


def _read_prompt(line: str, where: str) -> str:
    if not line.lstrip().startswith("{"):
        return line
    prompt = read_object(line, where).get("prompt")
    if not isinstance(prompt, str):
        raise UserError(f"{where}: needs the string `prompt`, such as 12345+678=")
    return prompt
