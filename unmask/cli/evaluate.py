"""`unmask eval`."""

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from unmask import paths
from unmask.cli import options, prompts, questions
from unmask.config.registry import found_in, resolve
from unmask.config.run import RunConfig
from unmask.config.settings import check_section
from unmask.decoding.config import DecodeConfig, check_guidance
from unmask.errors import RunFailed, UserError
from unmask.evaluation.evaluate import Evaluation
from unmask.evaluation.evaluate import evaluate as evaluate_model
from unmask.evaluation.generative import Samples, check_random, sampling_config
from unmask.evaluation.paired import PairedComparison
from unmask.evaluation.text import Generation, TextMeasures, check_text_task, read_corpora
from unmask.formats import to_json
from unmask.models.denoiser import Denoiser
from unmask.progress import progress
from unmask.tasks.code import CodeTask
from unmask.tasks.programs.problems import BENCHMARKS, find_problems
from unmask.tasks.task import GradedTask, Task, TextTask, build_task
from unmask.training.loading import LoadedRun
from unmask.types import CleanBatch

_SAMPLES = 64


def evaluate(
    run: options.Run,
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
    decoder: Annotated[list[str] | None, typer.Option(help=options.DECODER_HELP + " May be repeated.")] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Number of examples (default: all of a file, or eval.examples).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New file of JSON lines: each example, its answer and its grades; or each sample (default: none)."
        ),
    ] = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            help="For text: another corpus (file, folder or store) for zero-shot perplexity, on --examples or "
            "eval.examples rows of it. May be repeated."
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
        typer.Option(min=1, max=1_000_000, help="Samples to draw (default: 64; with --prompts, 1 for each prompt)."),
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts that samples fill in, as in `unmask decode`."),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(min=2, max=4096, help="For multiple_choice: masks of each choice, at most (default: 32)."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Another run or export, evaluated on the same examples in the same way: their differences, with a "
            "paired bootstrap's interval, and McNemar's exact test.",
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

    * `unmask eval runs/text-bell --corpus reviews.jsonl --corpus speeches/ --generative models/gpt2-large`
    """
    if data is not None and not (data := paths.user_path(data, "--data ")).is_dir():
        data = paths.existing_file(data, "--data ")
    if task == "multiple_choice":
        given = {"--decoder": decoder, "--corpus": corpus, "--generative": generative, "--samples": samples}
        questions.refuse(given | {"--prompts": prompt_file})
        places = {"weights": options.check_weights(weights), "step": step, "device": device}
        questions.evaluate(run, against, data, examples, out, draws, as_json=as_json, **places)
        return
    if draws is not None:
        raise UserError(f"--draws {draws}: goes with --task multiple_choice; a likelihood takes eval.nelbo_draws")
    data = _default_data(task, data)
    loaded = LoadedRun.open(run, weights=options.check_weights(weights), step=step, device=device)
    config, judge = _task_of(loaded, task)
    asked = _TextOptions(corpus or [], generative, samples, prompt_file, decoder or [])
    text_task = asked.check(judge, config)
    decoders = _decoders(config, judge, decoder or [], out) if generative is None else []
    if against is not None and (generative is not None or corpus):
        raise UserError(f"--against {against}: compares examples; leave --generative and --corpus out")
    for each in decoders:
        check_guidance(each, config.data)
    chosen = (
        loaded.held_out(examples or config.eval.examples, judge)
        if data is None
        else judge.examples_from_file(data)[:examples]
    )
    other = None if against is None else _Other.open(against, loaded, chosen, data, task, step, weights, device)
    drawing = asked.decode_config(config, is_causal=loaded.model.is_causal)
    used = [drawing] if generative is not None else decoders
    model = loaded.prepare(dtype=_check_decoders(used), is_compiled=any(decoder.compile for decoder in used))
    text, limit = None, examples or config.eval.examples
    if text_task is not None:
        text = asked.measures(text_task, model, drawing, limit=limit, real=None if data is None else chosen)
    total = len(chosen) * len(decoders) + (0 if text is None else text.num_samples)
    paired = None
    with nullcontext() if out is None else options.new_file(out) as file:
        with progress(f"Evaluating {run}", total) as update:
            draws = config.eval.nelbo_draws
            result = evaluate_model(model, judge, chosen, decoders, nelbo_draws=draws, text=text, update=update)
        if other is not None:
            with progress(f"Evaluating {against}", total) as update:
                paired = PairedComparison.of(result, other.evaluate(decoders, config.eval.nelbo_draws, update))
        if file is not None:
            file.writelines(to_json(record) + "\n" for record in result.records())
    protocol = _protocol(loaded, config, chosen, decoders, result) | {
        "run": str(run),
        "dtype": model.compute_dtype,
        "data": "validation" if data is None else str(data),
        "task": task or config.task.name,
    }
    if as_json:
        found = {} if paired is None else {"against": {"run": against, "measures": paired.as_dict()}}
        options.print_json(result.as_dict() | found | {"protocol": protocol})
    else:
        _print(result, protocol)
        if paired is not None and other is not None:
            _print_paired(paired, other, len(chosen))
    if (said := result.say_not_graded()) is not None:
        raise RunFailed(f"{said}; evaluate again when more of the machine is free")


@dataclass(frozen=True)
class _Other:
    """The run of `--against`, and its own reading of the examples."""

    loaded: LoadedRun
    task: Task
    examples: CleanBatch

    @staticmethod
    def open(
        run: str,
        first: LoadedRun,
        chosen: CleanBatch,
        data: Path | None,
        task: str | None,
        step: str,
        weights: str | None,
        device: str | None,
    ) -> "_Other":
        """Opens the run.

        Raises:
            UserError: its examples are not the `chosen` ones of the `first` run.
        """
        loaded = LoadedRun.open(run, weights=weights, step=step, device=device)
        config, judge = _task_of(loaded, task)
        examples = loaded.held_out(len(chosen), judge) if data is None else judge.examples_from_file(data)
        examples = examples[: len(chosen)]
        is_same = task is not None or config.task.name == first.config.task.name
        if not is_same or _sha256(examples) != _sha256(chosen):
            raise UserError(
                f"--against {run}: its examples are not those of {first.path}, as task, data or tokens differ; give "
                "--data FILE that both read alike, or runs of the same data"
            )
        return _Other(loaded, judge, examples)

    def evaluate(self, decoders: list[DecodeConfig], draws: int, update: Callable[[int], None]) -> Evaluation:
        """Evaluates the run as the first one was."""
        model = self.loaded.prepare(
            dtype=_check_decoders(decoders), is_compiled=any(decoder.compile for decoder in decoders)
        )
        return evaluate_model(model, self.task, self.examples, decoders, nelbo_draws=draws, update=update)


@dataclass(frozen=True)
class _TextOptions:
    """The options for running text, and `--decoder`."""

    corpora: list[Path]
    generative: str | None
    samples: int | None
    prompts: str | None
    decoder: list[str]

    def check(self, task: Task, config: RunConfig) -> TextTask | None:
        """Returns the task if any of the options is given.

        Raises:
            UserError: it is not running text, or an option needs another that is not given.
        """
        for option, value in (("--samples", self.samples), ("--prompts", self.prompts)):
            if value is not None and self.generative is None:
                raise UserError(f"{option} {value}: goes with --generative FOLDER, which scores the samples; add it")
        if self.generative is not None and len(self.decoder) > 1:
            raise UserError(f"--decoder: {len(self.decoder)} are given, but samples are drawn in one way; give one")
        if not self.corpora and self.generative is None:
            return None
        return check_text_task(task, config, "--corpus" if self.corpora else "--generative")

    def decode_config(self, config: RunConfig, *, is_causal: bool) -> DecodeConfig:
        """Returns the settings that samples are drawn with."""
        decode = sampling_config(config.decode, is_causal=is_causal)
        for text in self.decoder:
            decode = options.parse_decoder(text, decode)
        check_guidance(decode, config.data)
        return decode

    def measures(
        self, task: TextTask, model: Denoiser, decode: DecodeConfig, *, limit: int, real: CleanBatch | None
    ) -> TextMeasures:
        """Reads and checks the corpora, prompts and the scoring model.

        Args:
            limit: rows of a corpus.
            real: real text to score beside the samples; None: the run's held-out rows.
        """
        corpora = read_corpora(task, self.corpora, limit=limit, option="--corpus ")
        if self.generative is None:
            return TextMeasures(task, corpora)
        real = task.validation(self.samples or _SAMPLES) if real is None else real
        generation = Generation.prepare(
            model,
            task,
            self.generative,
            self._samples(task, real, decode),
            decode,
            real=real,
            option="--generative ",
            prompts=self.prompts,
        )
        return TextMeasures(task, corpora, generation)

    def _samples(self, task: TextTask, real: CleanBatch, decode: DecodeConfig) -> Samples:
        if self.prompts is None:
            number = self.samples or _SAMPLES
            check_random(decode, number, "--decoder")
            return Samples.from_nothing(real, task.tokens.mask_id, number)
        number, read = self.samples or 1, prompts.read(task, self.prompts)
        check_random(decode, number, "--decoder")
        (rows,) = read.rows(number, number * len(read.canvases))
        return Samples(rows.canvases, rows.keys)


def _protocol(
    loaded: LoadedRun,
    config: RunConfig,
    examples: CleanBatch,
    decoders: list[DecodeConfig],
    result: Evaluation,
) -> dict[str, Any]:
    """Describes what was evaluated, and how."""
    text = None if result.likelihood is None else result.likelihood.text
    return {
        "step": loaded.step,
        "weights": loaded.weights,
        "task": config.task.name,
        "data_sha256": _sha256(examples),
        "examples": len(examples),
        "nelbo": _how(result, config.eval.nelbo_draws),
        **({} if text is None else {"rows": text.rows}),
        "decoders": {decoder.label: decoder.model_dump(mode="json") for decoder in decoders},
    }


def _decoders(config: RunConfig, judge: Task, asked: list[str], out: Path | None) -> list[DecodeConfig]:
    if isinstance(judge, GradedTask):
        return [options.parse_decoder(text, config.decode) for text in asked] or config.eval.decoders(config.decode)
    for option, value in (("--decoder", asked), ("--out", out)):
        if value:
            raise UserError(
                f"{option}: the task {config.task.name} has no right answers, so nothing is decoded here; leave it "
                "out, and see what the model writes with `unmask decode`, or score samples with --generative FOLDER"
            )
    return []


def _default_data(task: str | None, data: Path | None) -> Path | None:
    """Returns the file of problems of a benchmark whose file is not given; else `data`.

    Raises:
        UserError: it comes with no package, or that is not installed.
    """
    return find_problems(task) if data is None and task in BENCHMARKS else data


def _task_of(loaded: LoadedRun, task: str | None) -> tuple[RunConfig, Task]:
    """Returns the task that examples are read and graded with, and the run's configuration with it."""
    if task in BENCHMARKS:
        return loaded.config, cast(Task, CodeTask(loaded.task, task))
    config = loaded.config if task is None else _with_task(loaded, task)
    return config, build_task(config)


def _with_task(loaded: LoadedRun, task: str) -> RunConfig:
    """Returns the run's configuration with its data settings read as those of `task`."""
    config, section = loaded.config, resolve("task", task).Config
    given = {key: value for key, value in config.data.model_dump().items() if key in section.model_fields}
    choice = config.task.model_copy(update={"name": task})
    with found_in(loaded.path):
        data = check_section(section, given, f"--task {task}: data").of_run(loaded.path)
    return config.model_copy(update={"task": choice, "data": data})


def _sha256(examples: CleanBatch) -> str:
    """Hashes the examples: prompts, and answers as far as they are known."""
    digest = hashlib.sha256(examples.x0.numpy().tobytes() + examples.prompt_mask.numpy().tobytes())
    digest.update(json.dumps(examples.answers).encode())
    return digest.hexdigest()


def _how(result: Evaluation, draws: int) -> str:
    if result.likelihood is None:
        return "none: the answers are not known as tokens"
    if result.likelihood.is_exact:
        return "exact NLL of a causal model; nats per maskable token"
    return f"uniform masks, {draws} per example; nats per maskable token"


def _check_decoders(decoders: list[DecodeConfig]) -> str | None:
    """Returns the number format that all of them ask for."""
    labels = [config.label for config in decoders]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise UserError(f"--decoder: {', '.join(sorted(repeated))} is asked for twice")
    first, *others = {config.dtype for config in decoders} or {None}
    if others:
        raise UserError(f"--decoder: one evaluation runs in one dtype, not in {first} and {others[0]}; run it twice")
    return first


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
