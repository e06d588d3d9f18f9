"""`unmask eval`."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask import paths
from unmask.cli import evaluations, options, questions
from unmask.cli.text_options import SAMPLES, TextOptions
from unmask.config.run import FEWEST_DRAWS, MOST_DRAWS, MOST_SAMPLES, RunConfig
from unmask.config.settings import check_section
from unmask.data.fingerprint import examples_digest
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig, check_guidance
from unmask.errors import RunFailed, UserError
from unmask.evaluation.evaluate import Evaluation
from unmask.evaluation.evaluate import evaluate as evaluate_model
from unmask.evaluation.paired import PairedComparison
from unmask.evaluation.text import TextMeasures
from unmask.formats import to_json
from unmask.models.denoiser import Denoiser
from unmask.progress import progress
from unmask.tasks.programs.problems import BENCHMARKS, find_problems
from unmask.tasks.task import GradedTask, Task
from unmask.training import protocol as protocols
from unmask.training.evaluating import warn_of_fewer
from unmask.training.loading import LoadedRun
from unmask.training.protocol import EvalOptions, Repeated
from unmask.types import CleanBatch


def evaluate(
    run: Annotated[
        str | None,
        typer.Argument(help="A run folder, an export, or a Hugging Face checkpoint.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="File of examples to evaluate on (default: the run's held-out examples).")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Task of the examples, such as gsm8k (default: the run's); for any model of text also humaneval, mbpp "
            "and multiple_choice."
        ),
    ] = None,
    decoder: Annotated[
        list[str] | None,
        typer.Option(
            help=options.DECODER_HELP + " May be repeated (default: each of eval.orders with each of "
            "eval.tokens_per_step)."
        ),
    ] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Number of examples (default: all of a file, or eval.examples).")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="New file of JSON lines: each example, its answer and its grades; or each sample (default: none).",
        ),
    ] = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            help="For text: another corpus (file, folder or store) for zero-shot perplexity, on --examples or "
            "eval.examples rows of it. May be repeated."
        ),
    ] = None,
    question_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--questions",
            metavar="FILE",
            help="For text and conversations: multiple choice beside the rest, on the first --examples questions of "
            "FILE (default: all). May be repeated.",
        ),
    ] = None,
    generative: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="For text: draw samples with --decoder, and score them under the Hugging Face model in FOLDER.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_SAMPLES,
            help=f"Samples to draw (default: {SAMPLES}; with --prompts, 1 for each prompt).",
        ),
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts that samples fill in, as in `unmask decode`."),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            min=FEWEST_DRAWS,
            max=MOST_DRAWS,
            help="For multiple choice: masks of each choice, at most (default: eval.choice_draws).",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Another run or export, evaluated on the same examples in the same way: their differences, with a "
            "paired bootstrap's interval, and McNemar's exact test.",
        ),
    ] = None,
    protocol: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Repeat the evaluation that wrote FILE with --json, and say what differs; RUN and --data may lie "
            "elsewhere now.",
        ),
    ] = None,
    weights: options.Weights = None,
    step: options.Step = "last",
    device: options.Device = None,
    as_json: options.AsJson = False,
    data_changed: options.DataChanged = False,
    trust_code: options.TrustCode = False,
    follow_links: options.FollowLinks = False,
) -> None:
    """Evaluate a run: NELBO under uniform masks (for a causal model the exact NLL), and accuracy for each decoder; for
    running text also perplexity and bits per byte.

    Examples:

    * `unmask eval runs/sudoku-puma`

    * `unmask eval runs/sudoku-puma --decoder margin --decoder prob,tokens_per_step=3 --json`

    * `unmask eval runs/sudoku-puma --data hard.csv --step best`

    * `unmask eval runs/sudoku-puma --against runs/sudoku-uniform --examples 1000`

    * `unmask eval runs/tinygsm-puma --task gsm8k --data test.jsonl --out answers.jsonl`

    * `unmask eval models/LLaDA-8B-Instruct --task humaneval --decoder prob,block_size=32 --out answers.jsonl`

    * `unmask eval runs/text-bell --task multiple_choice --data hellaswag.jsonl --draws 64`

    * `unmask eval runs/text-bell --questions hellaswag.jsonl --questions arc.jsonl --examples 500`

    * `unmask eval runs/text-bell --corpus reviews.jsonl --corpus speeches/ --generative models/gpt2-large`

    * `unmask eval --protocol result.json` (which `unmask eval RUN --json > result.json` wrote)
    """
    if protocol is None and run is None:
        raise UserError("RUN is missing: name a run folder, an export or a Hugging Face checkpoint")
    asked = check_section(
        EvalOptions,
        {
            "run": run or "",
            "data": data,
            "task": task,
            "decoder": decoder or (),
            "examples": examples,
            "corpus": corpus or (),
            "questions": question_files or (),
            "generative": generative,
            "samples": samples,
            "prompts": prompt_file,
            "draws": draws,
            "against": against,
            "weights": weights,
            "step": step,
            "device": device,
        },
        "eval",
    )
    repeated = None if protocol is None else Repeated.read(paths.existing_file(protocol, "--protocol "))
    _evaluate(asked if repeated is None else repeated.with_places(asked), repeated, out=out, as_json=as_json)


def _evaluate(asked: EvalOptions, repeated: Repeated | None, *, out: str | None, as_json: bool) -> None:
    """Evaluates as `asked`, and prints the result; beside that of the evaluation that is `repeated`, if any."""
    data = asked.data
    if data is not None and not (data := paths.user_path(data, "--data ")).is_dir():
        data = paths.existing_file(data, "--data ")
    if asked.task == "multiple_choice":
        questions.evaluate(asked, data, out, as_json=as_json, repeated=repeated)
        return
    plan = _Plan.make(asked, data, repeated, out)
    with nullcontext() if out is None else options.new_file(out) as file:
        result, paired = plan.evaluate()
        if file is not None:
            file.writelines(to_json(record) + "\n" for record in result.records())
    said = plan.protocol(repeated)
    if as_json:
        found = {} if paired is None else {"against": {"run": asked.against, "measures": paired.as_dict()}}
        evaluations.print_evaluation(result.as_dict() | found, said, repeated)
    else:
        _print(result, said)
        if paired is not None and plan.other is not None:
            _print_paired(paired, plan.other, len(plan.examples))
        evaluations.print_repeated(result.as_dict(), said, repeated)
    if (missing := result.say_not_graded()) is not None:
        raise RunFailed(f"{missing}; evaluate again when more of the machine is free")


@dataclass(frozen=True)
class _Plan:
    """The evaluation that is `asked` for. What can be refused is refused when it is made."""

    asked: EvalOptions
    data: Path | None
    loaded: LoadedRun
    config: RunConfig
    task: Task
    examples: CleanBatch
    decoders: list[DecodeConfig]
    """Of examples; samples have `drawing`."""
    drawing: DecodeConfig | None
    model: Denoiser
    text: TextMeasures
    other: "_Other | None"

    @staticmethod
    def make(asked: EvalOptions, data: Path | None, repeated: Repeated | None, out: str | None) -> "_Plan":
        if asked.task in BENCHMARKS:
            data = find_problems(asked.task, data, "--data ")
        loaded = evaluations.open_run(asked)
        config, task = evaluations.task_of(loaded, asked.task)
        if repeated is not None:
            repeated.check_task(asked.task or config.task.name)
        about_text = TextOptions(asked)
        text_task = about_text.check(task, config)
        written = None if asked.questions else out  # questions have right answers on every task
        decoders = _decoders(config, task, asked.decoder, written) if asked.generative is None else []
        limit = asked.examples or config.eval.examples
        examples = loaded.held_out(limit, task) if data is None else task.examples_from_file(data)[: asked.examples]
        if data is None:
            warn_of_fewer(examples, limit, "--examples " if asked.examples else "eval.examples=")
        _check_decoders(decoders)
        _check_decodable(loaded, task, decoders, rows=len(examples))
        other = None if asked.against is None else _Other.open(asked, loaded, examples, data, decoders)
        drawing = config.decode
        if asked.generative is not None:
            drawing = about_text.decode_config(config, is_causal=loaded.model.is_causal)
        used = decoders if asked.generative is None else [drawing]
        model = loaded.prepare(*used)
        text = about_text.measures(loaded, text_task, model, drawing, real=None if data is None else examples)
        drawn = None if asked.generative is None else drawing
        return _Plan(asked, data, loaded, config, task, examples, decoders, drawn, model, text, other)

    def evaluate(self) -> tuple[Evaluation, PairedComparison | None]:
        """Evaluates the run, and compares it with the other one if there is one."""
        draws = self.config.eval.nelbo_draws
        total = len(self.examples) * len(self.decoders) + self.text.count_work(self.model)
        with progress(f"Evaluating {self.asked.run}", total) as update:
            result = evaluate_model(
                self.model, self.task, self.examples, self.decoders, nelbo_draws=draws, text=self.text, update=update
            )
        if self.other is None:
            return result, None
        with progress(f"Evaluating {self.asked.against}", total) as update:
            return result, PairedComparison.of(result, self.other.evaluate(self.decoders, draws, update))

    def protocol(self, repeated: Repeated | None) -> dict[str, Any]:
        """Returns what the result depends on, and how it differs from what is `repeated`."""
        own = protocols.describe_examples(
            self.config, self.task, self.examples, self.decoders, is_causal=self.model.is_causal
        )
        own |= {
            "task": self.asked.task or self.config.task.name,
            "data": "validation" if self.data is None else str(self.data),
        }
        if self.drawing is not None:
            own["decoders"] = {self.drawing.label: self.drawing.model_dump(mode="json")}
        return protocols.describe(self.loaded, self.model, self.asked, own | self.text.protocol(self.model), repeated)


@dataclass(frozen=True)
class _Other:
    """The run of `--against`, and its own reading of the examples."""

    loaded: LoadedRun
    task: Task
    examples: CleanBatch

    @staticmethod
    def open(
        asked: EvalOptions, first: LoadedRun, chosen: CleanBatch, data: Path | None, decoders: list[DecodeConfig]
    ) -> "_Other":
        """Opens the run.

        Raises:
            UserError: more than examples is asked for, its examples are not the `chosen` ones of the `first` run, or
                its model cannot decode with one of the `decoders`.
        """
        run, task = str(asked.against), asked.task
        if asked.generative is not None or asked.corpus or asked.questions:
            raise UserError(
                f"--against {run}: compares examples; leave --generative, --corpus and --questions out (for questions: "
                "--task multiple_choice)"
            )
        loaded = evaluations.open_run(asked, run)
        config, judge = evaluations.task_of(loaded, task)
        examples = loaded.held_out(len(chosen), judge) if data is None else judge.examples_from_file(data)
        examples = examples[: len(chosen)]
        is_same = task is not None or config.task.name == first.config.task.name
        if not is_same or examples_digest(examples) != examples_digest(chosen):
            raise UserError(
                f"--against {run}: its examples are not those of {first.path}, as task, data or tokens differ; give "
                "--data FILE that both read alike, or runs of the same data"
            )
        _check_decodable(loaded, judge, decoders, rows=len(examples))
        return _Other(loaded, judge, examples)

    def evaluate(self, decoders: list[DecodeConfig], draws: int, update: Callable[[int], None]) -> Evaluation:
        """Evaluates the run as the first one was."""
        model = self.loaded.prepare(*decoders)
        return evaluate_model(model, self.task, self.examples, decoders, nelbo_draws=draws, update=update)


def _decoders(config: RunConfig, judge: Task, asked: Sequence[str], out: str | None) -> list[DecodeConfig]:
    if isinstance(judge, GradedTask):
        return [options.parse_decoder(text, config.decode) for text in asked] or config.eval.decoders(config.decode)
    for option, value in (("--decoder", asked), ("--out", out)):
        if value:
            raise UserError(
                f"{option}: the task {config.task.name} has no right answers, so nothing is decoded here; leave it "
                "out, and see what the model writes with `unmask decode`, or score samples with --generative FOLDER"
            )
    return []


def _check_decodable(loaded: LoadedRun, task: Task, decoders: list[DecodeConfig], *, rows: int) -> None:
    """Raises `UserError` if the run's model cannot decode with one of them."""
    for each in decoders:
        check_guidance(each, loaded.config.data)
        build_decoder(each, loaded.model, task.tokens, rows=rows)


def _check_decoders(decoders: list[DecodeConfig]) -> None:
    """Raises `UserError` unless all of them ask for one number format, and no two are the same."""
    first, *others = dict.fromkeys(config.dtype for config in decoders) or [None]
    if others:
        own = "the run's"
        raise UserError(
            f"--decoder: one evaluation runs in one dtype, not in {first or own} and {others[0] or own}; run it twice"
        )
    labels = [config.label for config in decoders]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise UserError(f"--decoder: {', '.join(sorted(repeated))} is asked for twice")


def _print(result: Evaluation, protocol: dict[str, Any]) -> None:
    out = options.results()
    out.print(
        f"{protocol['run']}, step {protocol['step']}, {protocol['weights']} weights, {protocol['examples']} examples"
    )
    options.print_lines(result.lines())


def _print_paired(paired: PairedComparison, other: _Other, count: int) -> None:
    out = options.results()
    loaded = other.loaded
    out.print(f"Against {loaded.path}, step {loaded.step}, {loaded.weights} weights, on the same {count} examples:")
    out.print(options.table(paired.table()))
    out.print(
        "Differences of shares in points, with a paired bootstrap's interval; alone: how many examples only this,"
    )
    out.print("and only the other run has right; p: McNemar's exact test of these two numbers.")
