"""HumanEval and MBPP, asked of a model of text: it continues their prompts, and the answers run with their tests.

The model's own task encodes the prompts and decodes the answers, so that any model of text, of conversations, or one
that was imported can be asked. Dimensions: B rows, L positions.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from unmask.errors import UserError
from unmask.tasks.programs.grading import locate
from unmask.tasks.programs.problems import CodeProblem, read_code_problems
from unmask.tasks.programs.solutions import judge_solutions
from unmask.tasks.task import Grades, Task
from unmask.tasks.text_rows import TextRows
from unmask.types import CleanBatch

_STOP = re.compile(r"\n(?:class|def|#|if|print|@|import|from|```|\[DONE\])")
"""What no function's body goes on with: what a model of running text writes next."""
_FENCE_OR_END = re.compile(r"(?:\A|\n)[ \t]*(?:```|\[DONE\])")


def find_completion(text: str, problem: CodeProblem) -> str:
    """Finds the code in an answer.

    After a prompt that ends within a function, an answer whose first line is indented goes on with it, and ends where
    the next statement outside begins. Else a program is looked for, as in GSM8K's answers: the first fenced block, or
    all from the first `def` on, up to a fence or `[DONE]`. If there is none, all of the text is the code.
    """
    if problem.head:
        first = next((line for line in text.split("\n") if line.strip()), "")
        if first[:1].isspace():
            found = _STOP.search(text)
            return text if found is None else text[: found.start() + 1]
    program = locate(text)
    if program is not None:
        program = _FENCE_OR_END.split(program)[0]
        # The function is written again from its beginning; the prompt's own gets an empty body.
        return f"    pass\n\n{program}\n" if problem.head else program
    return _FENCE_OR_END.split(text)[0]


class CodeTask:
    """The problems of a benchmark, asked of a model of the task `own`. What it does not define is that task's.

    Args:
        own: the model's task, which reads prompts.
        benchmark: one of `problems.BENCHMARKS`.

    Raises:
        UserError: the task is not of text.
    """

    def __init__(self, own: Task, benchmark: str) -> None:
        if not isinstance(own, TextRows):
            raise UserError(f"--task {benchmark}: needs a model of text, of conversations, or an imported one")
        self.own, self.benchmark = own, benchmark
        self.tokens, self.canvas = own.tokens, own.canvas
        self.problems: list[CodeProblem] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def examples_from_file(self, path: Path) -> CleanBatch:
        """Reads the file's problems, and makes canvases of their prompts.

        Raises:
            UserError: the file cannot be read, or holds something else.
        """
        self.problems = list(read_code_problems(self.benchmark, path).values())
        lines = [json.dumps({self.own.prompt_key: problem.prompt}) for problem in self.problems]
        canvases = self.own.prompts(lines, str(path))
        answers = tuple(range(len(self.problems)))
        return CleanBatch(x0=canvases, prompt_mask=canvases != self.tokens.mask_id, answers=answers)

    def grade(self, examples: CleanBatch, tokens: Int[Tensor, "B L"]) -> Grades:
        """Grades `accuracy`: the code passes its tests (pass@1 of one sample); `compiles`: it is code at all."""
        assert examples.answers is not None
        problems = [self.problems[number] for number in examples.answers]
        canvases = examples.masked(self.tokens.mask_id)
        texts = [self.own.record(*row)["text"] for row in zip(canvases, tokens.cpu(), strict=True)]
        completions = [find_completion(text, problem) for text, problem in zip(texts, problems, strict=True)]
        outcomes = judge_solutions(problems, completions)
        return Grades(
            {
                "accuracy": torch.tensor([outcome.reason == "correct" for outcome in outcomes]),
                "compiles": torch.tensor([outcome.reason not in ("syntax", "not_graded") for outcome in outcomes]),
            },
            [
                {
                    "task_id": problem.name,
                    "completion": completion,
                    "reason": outcome.reason,
                    "output": outcome.output,
                }
                for problem, completion, outcome in zip(problems, completions, outcomes, strict=True)
            ],
            is_graded=torch.tensor([outcome.is_graded for outcome in outcomes]),
        )
