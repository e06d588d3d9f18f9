"""`unmask eval --task multiple_choice`."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from unmask.cli import evaluations, options
from unmask.errors import UserError
from unmask.evaluation.choices import LABEL, Answered, QuestionSet, how_scored, mean_stderr
from unmask.evaluation.evaluate import Evaluation
from unmask.evaluation.paired import PairedComparison
from unmask.formats import to_json
from unmask.models.denoiser import Denoiser
from unmask.progress import progress
from unmask.training.loading import LoadedRun
from unmask.training.protocol import EvalOptions, Repeated, describe


def evaluate(
    asked: EvalOptions, data: Path | None, out: str | None, *, as_json: bool, repeated: Repeated | None
) -> None:
    """Answers the questions in `data`, and prints the result.

    Raises:
        UserError: there is no file of questions, an option is for what is decoded, or a run cannot answer them.
    """
    for option in ("decoder", "corpus", "generative", "samples", "prompts", "questions"):
        if getattr(asked, option):
            raise UserError(
                f"--{option}: multiple choice is answered by likelihood, and nothing is decoded; leave it out"
            )
    if data is None or data.is_dir():
        raise UserError("--task multiple_choice: needs --data FILE with a question in each row")
    with nullcontext() if out is None else options.new_file(out) as file:
        first = _open(asked, asked.run, data)
        loaded, own = first.loaded, first.questions
        second = None  # opened before the first answers, which takes long
        if asked.against is not None:
            second = _open(asked.model_copy(update={"draws": own.draws}), asked.against, data)
        answered = first.answer()
        other = None if second is None else second.answer()
        evaluation = _evaluation(answered)
        if file is not None:
            file.writelines(to_json(record) + "\n" for record in evaluation.records())
    paired = None if other is None else PairedComparison.of(evaluation, _evaluation(other))
    stderr = mean_stderr(answered.accuracy)
    said = describe(loaded, first.model, asked, {"task": "multiple_choice"} | own.protocol(first.model), repeated)
    result = evaluation.as_dict() | {"loglikelihood_stderr": stderr}
    if as_json:
        found = {} if paired is None else {"against": {"run": asked.against, "measures": paired.as_dict()}}
        evaluations.print_evaluation(result | found, said, repeated)
        return
    printed = options.results()
    printed.print(f"{asked.run}, step {loaded.step}, {loaded.weights} weights, {len(own.questions)} questions")
    options.print_lines(evaluation.lines())
    printed.print(f"Likelihood: {how_scored(first.model)}; {_say_error(stderr)}; by chance {own.chance:.1%} are right")
    if paired is not None:
        printed.print(f"Against {asked.against}, on the same questions:")
        printed.print(options.table(paired.table()))
    evaluations.print_repeated(result, said, repeated)


@dataclass(frozen=True)
class _Asked:
    """A model, and the questions that it is asked."""

    run: str
    loaded: LoadedRun
    questions: QuestionSet

    @cached_property
    def model(self) -> Denoiser:
        return self.loaded.prepare()

    def answer(self) -> Answered:
        with progress(f"Evaluating {self.run}", self.questions.count_rows(self.model)) as update:
            return self.questions.answer(self.model, update)


def _open(asked: EvalOptions, run: str, data: Path) -> _Asked:
    loaded = evaluations.open_run(asked, run)
    draws = asked.draws or loaded.config.eval.choice_draws
    questions = QuestionSet.read(data, loaded.task, loaded.model, name=data.name, limit=asked.examples, draws=draws)
    return _Asked(run, loaded, questions)


def _evaluation(answered: Answered) -> Evaluation:
    return Evaluation(None, {LABEL: answered.accuracy})


def _say_error(stderr: float | None) -> str:
    return "standard error unknown" if stderr is None else f"standard error {stderr:.3g} nats of a choice"
