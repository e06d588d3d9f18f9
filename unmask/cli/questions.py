"""`unmask eval --task multiple_choice`."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from unmask.cli import evaluations, options
from unmask.data.fingerprint import file_sha256
from unmask.errors import UserError
from unmask.evaluation import choices
from unmask.evaluation.choices import LABEL, PairEncoder
from unmask.evaluation.continuations import DRAWS
from unmask.evaluation.evaluate import Evaluation
from unmask.evaluation.paired import PairedComparison
from unmask.formats import to_json
from unmask.models.denoiser import Denoiser
from unmask.progress import progress
from unmask.tasks.choices import Question, read_questions
from unmask.training.loading import LoadedRun
from unmask.training.protocol import EvalOptions, Repeated, describe


@dataclass(frozen=True)
class _Answered:
    loaded: LoadedRun
    evaluation: Evaluation
    stderr: float | None
    model: Denoiser


def evaluate(
    asked: EvalOptions, data: Path | None, out: Path | None, *, as_json: bool, repeated: Repeated | None
) -> None:
    """Answers the questions in `data`, and prints the result.

    Raises:
        UserError: there is no file of questions, an option is for what is decoded, or a run cannot answer them.
    """
    for option in ("decoder", "corpus", "generative", "samples", "prompts"):
        if getattr(asked, option):
            raise UserError(
                f"--{option}: multiple choice is answered by likelihood, and nothing is decoded; leave it out"
            )
    if data is None or data.is_dir():
        raise UserError("--task multiple_choice: needs --data FILE with a question in each row")
    questions, most = read_questions(data)[: asked.examples], asked.draws or DRAWS
    with nullcontext() if out is None else options.new_file(out) as file:
        answered = _answer(asked, asked.run, questions, most)
        other = None if asked.against is None else _answer(asked, asked.against, questions, most)
        if file is not None:
            file.writelines(to_json(record) + "\n" for record in answered.evaluation.records())
    paired = None if other is None else PairedComparison.of(answered.evaluation, other.evaluation)
    loaded = answered.loaded
    own = {
        "task": "multiple_choice",
        "data": str(data),
        "data_sha256": file_sha256(data),
        "examples": len(questions),
        "draws": most,
        "seed": 0,
        "likelihood": _how(loaded),
    }
    said = describe(loaded, answered.model, asked, own)
    result = answered.evaluation.as_dict() | {"loglikelihood_stderr": answered.stderr}
    if as_json:
        found = {} if paired is None else {"against": {"run": asked.against, "measures": paired.as_dict()}}
        evaluations.print_evaluation(result | found, said, repeated)
        return
    printed = options.results()
    printed.print(f"{asked.run}, step {loaded.step}, {loaded.weights} weights, {len(questions)} questions")
    options.print_lines(answered.evaluation.lines())
    printed.print(f"Likelihood: {_how(loaded)}; {_say_error(answered.stderr)}")
    if paired is not None:
        printed.print(f"Against {asked.against}, on the same questions:")
        printed.print(options.table(paired.table()))
    evaluations.print_repeated(result, said, repeated)


def _answer(asked: EvalOptions, run: str, questions: list[Question], draws: int) -> _Answered:
    loaded = evaluations.open_run(asked, run)
    encoded = choices.encode_questions(PairEncoder.of(loaded.task), questions)
    model = loaded.prepare()
    with progress(f"Evaluating {run}", choices.count_passes(model, encoded, draws)) as update:
        accuracy = choices.answer_questions(
            model, questions, encoded, length=loaded.tokens.length, draws=draws, update=update
        )
    return _Answered(loaded, Evaluation(None, {LABEL: accuracy}), choices.mean_stderr(accuracy), model)


def _how(loaded: LoadedRun) -> str:
    if loaded.model.is_causal:
        return "exact"
    if loaded.model.block_size == 1:
        return "exact, token by token"
    return "bound under uniform masks of the choice, the same masks for all choices of a question"


def _say_error(stderr: float | None) -> str:
    return "standard error unknown" if stderr is None else f"standard error {stderr:.3g} nats of a choice"
