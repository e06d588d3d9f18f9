"""Word problems that are answered by a Python program: TinyGSM and GSM8K.

A row is a question, a separator, a program and its end. An answer is right if the program, run in a sandbox, returns
the problem's number: GSM8K's official answer, or what the row's own program returns.
Dimensions: B rows, L positions.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from unmask.data.infill import encode_prompts, encode_spans, is_infilling, pad_with_ends, record_spans
from unmask.errors import UserError
from unmask.tasks.programs.grading import judge
from unmask.tasks.task import Grades
from unmask.tasks.text_rows import TextRows, TextRowsData, number_lines, read_problems, read_prompt
from unmask.types import CleanBatch

_FORMS = (frozenset({"question"}), frozenset({"question", "program"}), frozenset({"text"}))
_NO_PROGRAM = ("no_program", "syntax")


class Gsm8kData(TextRowsData):
    """The settings of `Gsm8k`."""

    path: str | None = Field(None, description="a folder that `unmask prepare` made")
    vocab_size: int = Field(151_645, ge=2, description="ids that the model knows, the mask among them")
    mask_id: int = Field(151_644, ge=0, description="an id that no row holds")
    eos_id: int | None = Field(151_643, ge=0, description="ends an answer, and pads it")
    separator: str = Field("\n", description="between a question and its program")
    seconds: float = Field(1.0, gt=0, le=3600, description="of CPU time that a program may take")


class Gsm8k(TextRows):
    """The task of word problems that programs answer."""

    config: Gsm8kData
    Config = Gsm8kData
    prompt_key = "question"

    def __init__(self, config: Gsm8kData) -> None:
        super().__init__(config)
        self._numbers: dict[str, float | int | None] = {}

    # --- examples ----------------------------------------------------------------------------------------------------

    def examples_from_file(self, path: Path) -> CleanBatch:
        """Reads a folder that `unmask prepare` made, or a file of problems (`read_problems`), answered by numbers."""
        if path.is_dir():
            return super().examples_from_file(path)
        problems = read_problems(path)
        prompts = encode_prompts(self.vocabulary, [problem.question for problem in problems], self.config.separator)
        for number, ids in enumerate(prompts, 1):
            if self.config.mask_id in ids:
                raise UserError(f"{path}: question {number} holds the mask token; leave it out")
        canvases = self._make_canvases(prompts, f"{path}: ", "question")
        return CleanBatch(
            x0=canvases,
            prompt_mask=canvases != self.config.mask_id,
            answers=tuple(problem.answer for problem in problems),
        )

    def prompts(self, lines: Iterable[str], source: str) -> Int[Tensor, "B L"]:
        """Reads prompts: each line is a question, or a JSON object: `question`, `question` and `program`, or `text`.

        Spans to fill in, `<mask:N>`, may stand in any of them (`data/infill.py`).
        """
        prompts = [self._prompt(line, where) for line, where in number_lines(lines, source)]
        return self._make_canvases(prompts, f"{source}: ", "question")

    def _prompt(self, line: str, where: str) -> list[int]:
        """Encodes a prompt with the masks of its spans. It fits the canvas, unless it is a question without spans."""
        row = read_prompt(line, where, _FORMS)
        encode = partial(encode_spans, self.vocabulary, where=where, room=self.config.length)
        if "text" in row:
            return pad_with_ends(self.vocabulary, encode(row["text"]), where, length=self.config.length)
        ids = encode(row["question"].strip()) + self.vocabulary.encode(self.config.separator)  # as `encode_prompts`
        if "program" in row:
            ids += encode(row["program"].strip())
            return pad_with_ends(self.vocabulary, ids, where, length=self.config.length)
        return self._check_room(ids, where)

    # --- grading -----------------------------------------------------------------------------------------------------

    def grade(self, examples: CleanBatch, tokens: Int[Tensor, "B L"]) -> Grades:
        """Grades `accuracy`: the program returns the right number; `runs`: any number; `parses`: it is a program."""
        given = examples.answers
        golds, unknown = self._run_own_programs(examples) if given is None else (list(given), {})
        is_answer = ~examples.prompt_mask
        judged = judge(
            [self._answer(*row) for row in zip(tokens.cpu(), is_answer, strict=True)],
            golds,
            seconds=self.config.seconds,
        )
        for row, why in unknown.items():
            judged[row] = replace(judged[row], is_correct=False, reason="not_graded", output=f"the right answer: {why}")
        return Grades(
            {
                "accuracy": torch.tensor([judgement.is_correct for judgement in judged]),
                "runs": torch.tensor([judgement.value is not None for judgement in judged]),
                "parses": torch.tensor([judgement.reason not in _NO_PROGRAM for judgement in judged]),
            },
            [
                {
                    "program": judgement.program,
                    "value": judgement.value,
                    "gold": gold,
                    "reason": judgement.reason,
                    "output": judgement.output,
                }
                for judgement, gold in zip(judged, golds, strict=True)
            ],
            is_graded=torch.tensor([judgement.is_graded for judgement in judged]),
        )

    def _run_own_programs(self, examples: CleanBatch) -> tuple[list[float | int | None], dict[int, str]]:
        """Runs the rows' own programs; returns their numbers, None where one fails, and of each row whose program the
        machine could not run, why.
        """
        programs = [self._answer(*row) for row in zip(examples.x0, ~examples.prompt_mask, strict=True)]
        new = [program for program in dict.fromkeys(programs) if program not in self._numbers]
        judged = dict(zip(new, judge(new, [None] * len(new), seconds=self.config.seconds), strict=True))
        self._numbers |= {program: own.value for program, own in judged.items() if own.is_graded}
        unknown = {row: judged[each].output for row, each in enumerate(programs) if each not in self._numbers}
        return [self._numbers.get(program) for program in programs], unknown

    def record(self, prompt: Int[Tensor, "L"], tokens: Int[Tensor, "L"]) -> dict[str, Any]:
        if is_infilling(self.vocabulary, prompt.tolist()):
            return record_spans(self.vocabulary, prompt.tolist(), tokens.tolist())
        is_answer = prompt == self.config.mask_id
        question = self.vocabulary.decode(prompt[~is_answer].tolist())
        return {
            "question": question.removesuffix(self.config.separator),
            "text": self._answer(tokens.cpu(), is_answer.cpu()),
        }
