"""Word problems that are answered by a Python program: TinyGSM and GSM8K.

A row is a question, a separator, a program and its end. An answer is right if the program, run in a sandbox, returns
the problem's number: GSM8K's official answer, or what the row's own program returns.
Dimensions: B rows, L positions.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from rich.text import Text
from torch import Tensor

from unmask.data.infill import closed, encode_spans, infilled, is_infilling, whole_text
from unmask.data.prompts import encode_prompts
from unmask.data.vocabulary import Vocabulary, load_tokenizer
from unmask.errors import UserError
from unmask.jsonl import parse_object
from unmask.progress import warn
from unmask.tasks.problems import read_problems
from unmask.tasks.programs.judging import judge
from unmask.tasks.task import Canvas, Grades
from unmask.tasks.tokens import Tokens, TokensData
from unmask.types import CleanBatch

_VOCABULARY, _WRITTEN_LAST = "vocabulary", "vocabulary.json"
_NO_PROGRAM = ("no_program", "syntax")


class Gsm8kData(TokensData):
    path: str | None = Field(None, description="a folder that `unmask prepare` made")
    vocab_size: int = Field(151_645, ge=2, description="ids that the model knows, the mask among them")
    mask_id: int = Field(151_644, ge=0, description="an id that no row holds")
    eos_id: int | None = Field(151_643, ge=0, description="ends an answer, and pads it")
    separator: str = Field("\n", description="between a question and its program")
    tokenizer: str | None = Field(
        None, description="its folder, or its name on the hub; null = what data.path holds, or the run's own copy"
    )
    seconds: float = Field(1.0, gt=0, description="that a program may run")

    def of_run(self, folder: Path) -> "Gsm8kData":
        own = folder / _VOCABULARY
        return self.model_copy(update={"tokenizer": str(own)}) if (own / _WRITTEN_LAST).exists() else self


class Gsm8k(Tokens):
    config: Gsm8kData
    Config = Gsm8kData

    def __init__(self, config: Gsm8kData) -> None:
        super().__init__(config)
        self.canvas = Canvas(columns=8, is_text=True)
        self._numbers: dict[str, float | None] = {}

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What the ids mean.

        Raises:
            UserError: there is none, or it is not the one that the data were made with.
        """
        source = self.config.tokenizer or self.config.path
        if source is None:
            raise UserError("data.tokenizer is missing; give the folder of a tokenizer, or its name on the hub")
        folder = Path(source).expanduser()
        if (folder / _WRITTEN_LAST).exists():
            vocabulary = Vocabulary.load(folder)
        elif self.config.tokenizer is not None:
            vocabulary = self._vocabulary_of(source)
        else:
            raise UserError(
                f"{source}: does not say what its ids mean; give the tokenizer that made them as data.tokenizer (a "
                "folder, or a name such as Qwen/Qwen2-0.5B), or train on ids alone with task.name=tokens"
            )
        self._check_ids(vocabulary, source)
        return vocabulary

    def _vocabulary_of(self, source: str) -> Vocabulary:
        """All ids of a tokenizer, the mask among them or after them."""
        known = load_tokenizer(source).id_to_token
        eos = None if self.config.eos_id is None else known(self.config.eos_id)
        return Vocabulary.from_source(source, eos_token=eos, mask_token=known(self.config.mask_id))

    def _check_ids(self, vocabulary: Vocabulary, source: str) -> None:
        for key, own, needed in (
            ("fingerprint", vocabulary.fingerprint, self.config.fingerprint or vocabulary.fingerprint),
            ("mask_id", vocabulary.mask_id, self.config.mask_id),
            ("eos_id", vocabulary.eos_id, self.config.eos_id),
        ):
            if own != needed:
                raise UserError(f"{source}: is not the data's tokenizer: its {key} is {own}, where data.{key}={needed}")
        if vocabulary.vocab_size < self.config.vocab_size:
            raise UserError(
                f"{source}: is not the data's tokenizer: it has {vocabulary.vocab_size} ids, where "
                f"data.vocab_size={self.config.vocab_size}"
            )

    @property
    def original_ids(self) -> Sequence[int | None]:
        return self.vocabulary.original_ids[: self.config.vocab_size]

    def keep_files(self, folder: Path) -> None:
        """A copy of the vocabulary: to read what is decoded, and to ask new questions."""
        target = folder / _VOCABULARY
        if not (target / _WRITTEN_LAST).exists():
            target.mkdir(exist_ok=True)
            self.vocabulary.save(target)

    # --- examples ----------------------------------------------------------------------------------------------------

    def validation(self, limit: int) -> CleanBatch:
        _ = self.vocabulary  # before a run starts that could not be graded
        return super().validation(limit)

    def examples_from_file(self, path: Path) -> CleanBatch:
        """A folder that `unmask prepare` made, or a file of problems (`read_problems`), whose answers are numbers."""
        if path.is_dir():
            return super().examples_from_file(path)
        problems = read_problems(path)
        prompts = encode_prompts(self.vocabulary, [problem.question for problem in problems], self.config.separator)
        for number, ids in enumerate(prompts, 1):
            if self.config.mask_id in ids:
                raise UserError(f"{path}: question {number} holds the mask token; leave it out")
        canvases = self._canvases(prompts, f"{path}: ")
        return CleanBatch(
            x0=canvases,
            prompt_mask=canvases != self.config.mask_id,
            answers=tuple(problem.answer for problem in problems),
        )

    def prompts(self, lines: Iterable[str], source: str) -> Int[Tensor, "B L"]:
        """Each line a question, or a JSON object: `question`, `question` and `program`, or `text`.

        Spans to fill in, `<mask:N>`, may stand in any of them (`data/infill.py`).
        """
        prompts = [self._prompt(line, f"{source}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
        if not prompts:
            raise UserError(f"{source}: holds no question; write one on each line")
        return self._canvases(prompts, f"{source}: ")

    def _prompt(self, line: str, where: str) -> list[int]:
        """What is given, with the masks between. It fits the canvas, unless it is a question without spans."""
        row = _read_prompt(line, where)
        encode = partial(encode_spans, self.vocabulary, where=where, room=self.config.length)
        if "text" in row:
            return closed(self.vocabulary, encode(row["text"]), where, length=self.config.length)
        ids = encode(row["question"].strip()) + self.vocabulary.encode(self.config.separator)  # as `encode_prompts`
        if "program" in row:
            ids += encode(row["program"].strip())
            return closed(self.vocabulary, ids, where, length=self.config.length)
        if self.config.mask_id in ids and len(ids) >= self.config.length:
            raise UserError(f"{where}: {len(ids)} tokens leave no room for an answer in {self.config.length}")
        return ids

    def _canvases(self, prompts: list[list[int]], where: str) -> Int[Tensor, "B L"]:
        """Canvases to finish. Of too long a question the end is kept, and half of the canvas left for the answer."""
        length, mask_id = self.config.length, self.config.mask_id
        room = length // 2
        is_long = [len(ids) >= length and mask_id not in ids for ids in prompts]
        if any(is_long):
            warn(
                f"{where}{sum(is_long)} of {len(prompts)} questions (the first is number {is_long.index(True) + 1}) "
                f"are longer than data.length={length} tokens; only their last {room} tokens are asked"
            )
        canvases = torch.full((len(prompts), length), mask_id)
        for canvas, ids, too_long in zip(canvases, prompts, is_long, strict=True):
            kept = ids[-room:] if too_long else ids
            canvas[: len(kept)] = torch.tensor(kept)
        return canvases

    def token(self, text: str) -> int:
        """The one token that `text` is.

        Raises:
            UserError: it is several, or none.
        """
        ids = self.vocabulary.encode(text)
        if len(ids) != 1:
            parts = ", ".join(f"{self.vocabulary.decode([i])!r}" for i in ids)
            raise UserError(
                f"{text!r} is not one token, but {len(ids)}: {parts}; a word's token often begins with a space"
            )
        return ids[0]

    # --- grading -----------------------------------------------------------------------------------------------------

    def grade(self, examples: CleanBatch, tokens: Int[Tensor, "B L"]) -> Grades:
        """`accuracy`: the program returns the right number; `runs`: any number; `parses`: it is a program."""
        golds = list(examples.answers) if examples.answers is not None else self._numbers_of(examples)
        is_answer = ~examples.prompt_mask
        judged = judge(
            [self._answer(*row) for row in zip(tokens.cpu(), is_answer, strict=True)],
            golds,
            seconds=self.config.seconds,
        )
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
        )

    def _numbers_of(self, examples: CleanBatch) -> list[float | None]:
        """What the rows' own programs return; None where one fails."""
        programs = [self._answer(*row) for row in zip(examples.x0, ~examples.prompt_mask, strict=True)]
        new = [program for program in dict.fromkeys(programs) if program not in self._numbers]
        judged = judge(new, [None] * len(new), seconds=self.config.seconds)
        self._numbers |= {program: judgement.value for program, judgement in zip(new, judged, strict=True)}
        return [self._numbers[program] for program in programs]

    def _answer(self, tokens: Int[Tensor, "L"], is_answer: Bool[Tensor, "L"]) -> str:
        """The text up to the first end token; masks that are left are padding."""
        ids = tokens[is_answer].tolist()
        end = ids.index(self.config.eos_id) if self.config.eos_id in ids else len(ids)
        return self.vocabulary.decode(ids[:end])

    # --- for readers -------------------------------------------------------------------------------------------------

    def record(self, prompt: Int[Tensor, "L"], tokens: Int[Tensor, "L"]) -> dict[str, Any]:
        if is_infilling(self.vocabulary, prompt.tolist()):
            return infilled(self.vocabulary, prompt.tolist(), tokens.tolist())
        is_answer = prompt == self.config.mask_id
        question = self.vocabulary.decode(prompt[~is_answer].tolist())
        return {
            "question": question.removesuffix(self.config.separator),
            "text": self._answer(tokens.cpu(), is_answer.cpu()),
        }

    def text(self, tokens: Int[Tensor, "L"]) -> str:
        return whole_text(self.vocabulary, tokens.tolist())

    def symbol(self, token: int) -> str:
        """Line ends and the end of an answer made visible."""
        if token == self.config.mask_id:
            return ""
        return "∎" if token == self.config.eos_id else self.vocabulary.decode([token]).replace("\n", "⏎")

    def render(self, tokens: Int[Tensor, "L"], is_given: Bool[Tensor, "L"], is_new: Bool[Tensor, "L"]) -> Text:
        """The text with `_` where it is masked, up to the first end token."""
        text = Text()
        for token, given, new in zip(tokens.tolist(), is_given.tolist(), is_new.tolist(), strict=True):
            if token == self.config.eos_id:
                break
            style = "bold" if given else "black on green" if new else "green"
            text.append("_" if token == self.config.mask_id else self.vocabulary.decode([token]), style=style)
        return text


_FORMS = ({"text"}, {"question"}, {"question", "program"})


def _read_prompt(line: str, where: str) -> dict[str, str]:
    if not line.lstrip().startswith("{"):
        return {"question": line.rstrip("\n")}
    try:
        row = parse_object(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    given: dict[str, Any] = {key: row[key] for key in ("text", "question", "program") if key in row}
    if set(given) not in _FORMS:
        raise UserError(f"{where}: needs `question`, `question` and `program`, or `text` alone")
    for key, value in given.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: needs the string `{key}`")
    return given
