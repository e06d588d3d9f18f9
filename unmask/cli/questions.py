"""`unmask eval --task multiple_choice`."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.cli import options
from unmask.data.fingerprint import file_sha256
from unmask.errors import UserError
from unmask.evaluation import choices
from unmask.evaluation.choices import LABEL, PairEncoder
from unmask.evaluation.continuations import DRAWS
from unmask.evaluation.evaluate import Evaluation
from unmask.evaluation.paired import PairedComparison
from unmask.formats import to_json
from unmask.progress import progress
from unmask.tasks.choices import Question, read_questions
from unmask.training.loading import LoadedRun


def refuse(given: Mapping[str, Any]) -> None:
    """Raises `UserError` if one of these options is given."""
    for option, value in given.items():
        if value:
            raise UserError(
                f"{option}: multiple choice is answered by likelihood, and nothing is decoded; leave it out"
            )


@dataclass(frozen=True)
class _Answered:
    loaded: LoadedRun
    evaluation: Evaluation
    stderr: float | None
    dtype: str


def evaluate(
    run: str,
    against: str | None,
    data: Path | None,
    examples: int | None,
    out: Path | None,
    draws: int | None,
    *,
    as_json: bool,
    **places: Any,
) -> None:
    """Answers the questions in `data`, and prints the result.

    Raises:
        UserError: there is no file of questions, or a run cannot answer them.
    """
    if data is None or data.is_dir():
        raise UserError("--task multiple_choice: needs --data FILE with a question in each row")
    asked, most = read_questions(data)[:examples], draws or DRAWS
    with nullcontext() if out is None else options.new_file(out) as file:
        answered = _answer(run, asked, most, places)
        other = None if against is None else _answer(against, asked, most, places)
        if file is not None:
            file.writelines(to_json(record) + "\n" for record in answered.evaluation.records())
    paired = None if other is None else PairedComparison.of(answered.evaluation, other.evaluation)
    loaded = answered.loaded
    protocol = {
        "run": run,
        "step": loaded.step,
        "weights": loaded.weights,
        "task": "multiple_choice",
        "data": str(data),
        "data_sha256": file_sha256(data),
        "examples": len(asked),
        "dtype": answered.dtype,
        "draws": most,
        "seed": 0,
        "likelihood": _how(loaded),
    }
    if as_json:
        found = {} if paired is None else {"against": {"run": against, "measures": paired.as_dict()}}
        own = {"loglikelihood_stderr": answered.stderr}
        options.print_json(answered.evaluation.as_dict() | own | found | {"protocol": protocol})
        return
    printed = options.results()
    printed.print(f"{run}, step {loaded.step}, {loaded.weights} weights, {len(asked)} questions")
    options.print_lines(answered.evaluation.lines())
    printed.print(f"Likelihood: {_how(loaded)}; {_say_error(answered.stderr)}")
    if paired is not None:
        printed.print(f"Against {against}, on the same questions:")
        printed.print(options.table(paired.table()))


def _answer(run: str, asked: list[Question], draws: int, places: dict[str, Any]) -> _Answered:
    loaded = LoadedRun.open(run, **places)
    encoded = choices.encode_questions(PairEncoder.of(loaded.task), asked)
    model = loaded.prepare()
    with progress(f"Evaluating {run}", choices.count_passes(model, encoded, draws)) as update:
        accuracy = choices.answer_questions(
            model, asked, encoded, length=loaded.tokens.length, draws=draws, update=update
        )
    return _Answered(loaded, Evaluation(None, {LABEL: accuracy}), choices.mean_stderr(accuracy), model.compute_dtype)


def _how(loaded: LoadedRun) -> str:
    if loaded.model.is_causal:
        return "exact"
    if loaded.model.block_size == 1:
        return "exact, token by token"
    return "bound under uniform masks of the choice, the same masks for all choices of a question"


def _say_error(stderr: float | None) -> str:
    return "standard error unknown" if stderr is None else f"standard error {stderr:.3g} nats of a choice"
