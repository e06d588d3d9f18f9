"""The configuration of a run.

The `data`, `model` and `process` sections are checked by the `Config` of the class that `task.name`, `model.name` and
`process.name` stand for: a new method brings its own settings. `unmask.config.recipes` turns YAML files and overrides
into the tree that `RunConfig.from_tree` checks.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from unmask.config.registry import about_owners, foreign_code, resolve
from unmask.config.settings import DTypeName, Section, WeightsName, check_into, check_section, known, unknown
from unmask.decoding.config import DecodeConfig, check_guidance, without_loops
from unmask.errors import UserError
from unmask.reveal import OrderName
from unmask.training.trackers import TRACKERS

_Decay = Annotated[float, Field(ge=0, lt=1)]


class TaskChoice(Section):
    name: str = "sudoku"


class OptimConfig(Section):
    needs: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("muon_lr", "muon_momentum", "muon_heads"), "name=muon"),
        "decay_share": "schedule=wsd",
    }

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="optimizer; muon: Muon for the hidden matrices, AdamW for embeddings, head and vectors"
    )
    lr: float = Field(3e-4, gt=0, description="peak learning rate of AdamW")
    muon_lr: float = Field(
        3.0,
        gt=0,
        description="with name=muon: Muon's learning rate as a multiple of lr (updates are scaled as AdamW's)",
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="with name=muon: decay of its mean gradient (Nesterov)")
    muon_heads: bool = Field(
        False, description="with name=muon: make each head's matrices orthogonal on their own (Kimi K3, 2607.24653)"
    )
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="learning rate after the warm-up; cosine falls to 0, wsd over the last decay_share"
    )
    decay_share: float = Field(
        0.2, gt=0, le=1, description="with schedule=wsd: share of all steps over which the rate falls in a line to 0"
    )
    warmup_steps: int = Field(1000, ge=0, description="steps in which the learning rate rises from 0")
    weight_decay: float = Field(0.01, ge=0, le=1e3, description="weight decay, on matrices only")
    betas: tuple[_Decay, _Decay] = Field((0.9, 0.999), description="AdamW's decay of the mean gradient and mean square")
    grad_clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null = no clipping")

    @property
    def copies(self) -> int:
        """Tensors as large as the weights that a training holds: them, gradients, AdamW's two moments or Muon's one."""
        return 3 if self.name == "muon" else 4


class EmaConfig(Section):
    decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the averaged weights at step n: min(decay, (1 + n) / (10 + n)); 0 = no average",
    )


class TrainConfig(Section):
    alternatives = ("steps", "epochs")
    needs: ClassVar[dict[str, str]] = {"max_skips": "on_bad_numbers=skip"}

    steps: int | None = Field(None, ge=1, le=10**15, description="optimizer steps")
    epochs: float | None = Field(
        None, gt=0, description="length in epochs, if train.steps is null: steps = epochs x examples / batch_size"
    )
    max_seconds: float | None = Field(
        None, gt=0, description="end after this many seconds of training, if that is sooner"
    )
    max_examples: int | None = Field(None, ge=1, description="end after this many examples drawn, if that is sooner")
    batch_size: int = Field(128, ge=1, description="rows of the global batch")
    accumulate: int = Field(1, ge=1, description="micro-batches that a batch is split into")
    seed: int = Field(0, ge=0, description="seed of weights, batches and masks; below 2^63, as all seeds")
    dtype: DTypeName = Field(
        "auto", description="number format; auto: bfloat16 autocast if the hardware supports it, else float32"
    )
    device: str = Field("auto", description="device to train on; auto: cuda, else mps (a Mac's GPU), else cpu")
    compile: Literal["auto"] | bool = Field("auto", description="use torch.compile; auto: if a compiler works")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; null = PyTorch's choice, but no more than it may use"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="with several processes: each holds all weights (ddp), or a share of them (fsdp: FSDP2)"
    )
    cpu_offload: bool = Field(
        False, description="with fsdp: keep weights and optimizer state in CPU memory while they are not used"
    )
    timeout: float = Field(
        600.0, ge=1, le=10_000_000, description="seconds that a process waits for the others before it gives up"
    )
    init: str | None = Field(None, description="weights to start from: a run, an export, or a Hugging Face checkpoint")
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="newest checkpoints to keep, beside the best")
    keep_every: int | None = Field(None, ge=1, description="also keep every checkpoint at a multiple of this step")
    on_bad_numbers: Literal["stop", "skip"] = Field(
        "stop", description="if a loss or gradient is not finite: end the run, or skip the step's update and go on"
    )
    max_skips: int = Field(10, ge=1, description="with on_bad_numbers=skip: updates to skip before the run ends")

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.batch_size % self.accumulate:
            raise ValueError(f"train.accumulate={self.accumulate} does not divide train.batch_size={self.batch_size}")
        if self.steps and self.epochs:
            raise ValueError(f"train.steps={self.steps} and train.epochs={self.epochs}: give one of them")
        return self


MOST_SAMPLES = 1_000_000
FEWEST_DRAWS, MOST_DRAWS = 2, 4096
"""Masks of a choice whose likelihood is estimated: a single one would have no standard error."""


class GenerativeConfig(Section):
    partial_sections: ClassVar[dict[str, type[Section]]] = {"decode": DecodeConfig}

    model: str = Field(description="folder of a Hugging Face causal language model, with its tokenizer")
    samples: int = Field(64, ge=1, le=MOST_SAMPLES, description="samples to draw, always with the same noise")
    decode: dict[str, Any] = Field(
        {}, description="how they are drawn, over the section decode with order=random and temperature=1"
    )


class EvalConfig(Section):
    aliases: ClassVar[dict[str, str]] = {"confidences": "orders", "unmasking_num": "tokens_per_step"}

    every: int = Field(1000, ge=1, description="steps between evaluations")
    examples: int = Field(500, ge=1, description="held-out examples, always the same")
    orders: list[OrderName] = Field(
        ["prob"], min_length=1, description="orders of reveals, each evaluated with each of tokens_per_step"
    )
    tokens_per_step: list[Annotated[int, Field(ge=1)]] = Field(
        [1],
        min_length=1,
        description="positions revealed in a step; the first pair is eval/accuracy, and decides the best step",
    )
    weights: list[WeightsName] = Field(
        ["ema", "raw"], min_length=1, description="weights to evaluate; ema only if the run has an average"
    )
    nelbo_draws: int = Field(2, ge=1, le=100_000, description="masks per example for the NELBO")
    zero_shot: list[str] = Field(
        [], description="for text: other corpora (files, folders or stores); eval.examples rows of each are evaluated"
    )
    multiple_choice: list[str] = Field(
        [],
        description="for text and conversations: files of questions; the first eval.examples of each are answered by "
        "likelihood",
    )
    choice_draws: int = Field(
        32, ge=FEWEST_DRAWS, le=MOST_DRAWS, description="with multiple_choice: masks of each choice, at most"
    )
    generative: GenerativeConfig | None = Field(
        None, description="for text: draw samples, and score them under another model; null = off"
    )

    @field_validator("generative", mode="before")
    @classmethod
    def _check_generative(cls, given: Any) -> Any:
        return given if given is None else check_section(GenerativeConfig, given, "eval.generative")

    def decoders(self, base: DecodeConfig) -> list[DecodeConfig]:
        """Returns the grid: every order with every number of tokens a step, each once."""
        former = {*base.alternatives, *base.dependents}
        base = base.model_copy(update={key: DecodeConfig.model_fields[key].default for key in former})
        return [
            base.model_copy(update={"order": order, "tokens_per_step": tokens})
            for order in dict.fromkeys(self.orders)
            for tokens in dict.fromkeys(self.tokens_per_step)
        ]


class LogConfig(Section):
    every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(True, description="also write the numbers for TensorBoard into the run folder")
    to: list[Annotated[str, known("tracker", TRACKERS)]] = Field(
        [], description=f"trackers to send the same numbers to: {', '.join(TRACKERS)}"
    )
    project: str = Field("unmask", min_length=1, description="project of the run in the trackers")


class RunConfig(Section):
    """All that defines a run."""

    task: TaskChoice
    data: SerializeAsAny[Section]
    model: SerializeAsAny[Section]
    process: SerializeAsAny[Section]
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    def of_run(self, folder: Path) -> "RunConfig":
        """Returns these settings where the run lies in `folder`."""
        return self.model_copy(update={"data": self.data.of_run(folder)})

    def without_effect(self) -> dict[str, str]:
        """Returns what the settings need that have no effect beside the others, by dotted key."""
        sections = {key: getattr(self, key) for key in RunConfig.model_fields}
        return {f"{key}.{name}": need for key, own in sections.items() for name, need in own.without_effect().items()}

    @staticmethod
    def from_tree(tree: dict[str, Any]) -> "RunConfig":
        """Checks a nested dict of settings.

        Raises:
            UserError: names every wrong key with its value and, for an unknown one, the nearest valid name.
        """
        tree = {key: ({} if value is None else value) for key, value in tree.items()}
        checked: dict[str, Any] = {}
        problems: list[str] = []
        for key, field in RunConfig.model_fields.items():
            section = section_class(key, tree, field.annotation)
            with (
                foreign_code(*_component(key, tree), "cannot check its settings") if key in NAMED_BY else nullcontext()
            ):
                checked[key] = check_into(section, tree.get(key, {}), key, problems, partial(_owner, key, tree))
        checked["model"] = _with_block_size(checked["model"], checked["process"], problems)
        problems += [unknown(str(key), list(RunConfig.model_fields)) for key in tree if key not in checked]
        train = checked["train"]
        if train is not None and train.steps is None and train.epochs is None:
            problems.append("train.steps is missing; give train.steps or train.epochs")
        if getattr(checked["model"], "lora", None) is not None and not problems:
            problems += _about_adapters(checked["train"], checked["optim"])
        if not problems and checked["decode"].loops and getattr(checked["model"], "loops", None) is None:
            problems.append(without_loops(checked["decode"].loops))
        if problems:
            raise UserError("\n".join(problems))
        check_guidance(checked["decode"], checked["data"])
        return RunConfig(**checked)


def _about_adapters(train: TrainConfig, optim: OptimConfig) -> Iterator[str]:
    """Yields what in these settings adapters cannot be trained with."""
    if train.init is None:
        yield "train.init is missing: model.lora trains adapters on the weights that it names"
    if optim.name != "adamw":
        yield f"optim.name={optim.name}: is not for the low-rank matrices of model.lora; use adamw"
    if train.parallel != "ddp":
        yield f"train.parallel={train.parallel}: would not shard the frozen weights of model.lora; use ddp"


NAMED_BY = {"data": ("task", "sudoku"), "model": ("model", "transformer"), "process": ("process", "uniform")}
"""Sections of components: the kind of component whose name chooses their class, and its default."""


def section_class(key: str, tree: dict[str, Any], annotation: Any) -> type[Section]:
    """Returns the class that checks section `key`; for `data`, `model` and `process`, that of the named component."""
    return resolve(*_component(key, tree)).Config if key in NAMED_BY else annotation


def _component(key: str, tree: dict[str, Any]) -> tuple[str, str]:
    """Returns the kind and name of the component that has the section `key`."""
    kind, default = NAMED_BY[key]
    section = tree.get(kind, {})
    return kind, str(section.get("name", default) if isinstance(section, dict) else default)


def _owner(key: str, tree: dict[str, Any], name: str) -> str | None:
    """Says which other components of its kind have the setting `name` of the section `key`; None if none do."""
    if key not in NAMED_BY:
        return None
    kind, own = _component(key, tree)
    return about_owners(kind, own, name, f"{kind}.name")


def _with_block_size(model: Section | None, process: Section | None, problems: list[str]) -> Section | None:
    """Returns `model` in the blocks of its process, so that what is kept of a run says what the model is."""
    size = getattr(process, "block_size", None)
    if model is None or size is None or "block_size" not in type(model).model_fields:
        return model
    own = getattr(model, "block_size", None)
    if own in (None, size):
        return check_into(type(model), {**model.model_dump(), "block_size": size}, "model", problems)
    problems.append(
        f"process.block_size={size} and model.block_size={own} differ; with model.block_size=null the model takes the "
        "process's"
    )
    return None
