"""Turns the settings of the PUMA paper's code into a recipe that trains the same, with a comment on every key."""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.config.run import RunConfig
from unmask.errors import UserError
from unmask.formats import printable
from unmask.training.sources.puma.settings import OUR_ORDERS, Settings, orders, reveals

DEFAULT_TOKENIZER = "Qwen/Qwen2-0.5B"
"""The tokenizer that its TinyGSM is made with, and that its evaluation names."""
_WIDTH, _SHORT = 120, 60  # characters of a line of a recipe, and of a value that its comment repeats
_TEST_PUZZLES = 100_000  # of its Sudoku, of which it evaluates a share


@dataclass(frozen=True)
class Entry:
    """An entry of a recipe: a setting of ours, such as `model.dim`, the keys that it is made of, and a remark."""

    key: str
    value: Any
    source: tuple[str, ...] = ()
    remark: str = ""

    def written(self, given: dict[str, Any]) -> Iterator[str]:
        """Yields it as lines of YAML, with a comment; `given` has the values of the keys in `source`."""
        own = f"  {self.key.partition('.')[2]}: {json.dumps(self.value)}"  # JSON is YAML
        known = [(key, _one_line(given[key])) for key in self.source if key in given]
        there = ", ".join(key if len(value) > _SHORT else f"{key}: {value}" for key, value in known)
        comment = "; ".join(filter(None, (there, self.remark)))
        if not comment:
            yield own
        elif len(line := f"{own}  # {comment}") <= _WIDTH:
            yield line
        else:
            yield from textwrap.wrap(
                comment, _WIDTH, initial_indent="  # ", subsequent_indent="  # ", break_on_hyphens=False
            )
            yield own


def lines(settings: Settings, *, gpus: int = 1, tokenizer: str | None = DEFAULT_TOKENIZER) -> list[Entry]:
    """Returns the settings of a training of ours that is the one of `settings`.

    Args:
        settings: those of the paper's code.
        gpus: processes that it ran as, each with a batch of its own.
        tokenizer: that of TinyGSM's rows: a folder, or a name on the hub; None: the rows are ids alone.
    """
    return [
        *_data(settings, tokenizer),
        *_model(settings),
        *_process(settings),
        *_training(settings, gpus),
        *_evaluation(settings),
        *_logging(settings),
    ]


def tree_of(made: list[Entry]) -> dict[str, Any]:
    """Returns the settings as a tree."""
    tree: dict[str, Any] = {}
    for line in made:
        *sections, name = line.key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = line.value
    return tree


def check_as_run(settings: Settings, made: list[Entry]) -> RunConfig:
    """Checks the settings as those of a run.

    Raises:
        UserError: a setting is none that a run of ours can have.
    """
    try:
        return RunConfig.from_tree(tree_of(made))
    except UserError as error:
        raise UserError(f"{settings.where}: has no counterpart here: {error}") from error


def write_out(settings: Settings, made: list[Entry], command: str) -> str:
    """Formats the recipe; `command` is the one that made it."""
    given, name = dict(settings.given), Path(settings.where).name
    text = [
        f"# {_one_line(name, quoted=False)}, as {settings.script} of the PUMA paper's code reads it. Made by:",
        f"#   {_one_line(command, quoted=False)}",
        '# Beside a setting stands the one that it is made of; "there" is that code.',
    ]
    section = ""
    for line in made:
        if (own := line.key.partition(".")[0]) != section:
            section = own
            text.append(f"{own}:")
        text += line.written(given)
    used = {key for line in made for key in line.source}
    if rest := [key for key in given if key not in used]:
        text.append("# Of no effect:")
        text += [f"#   {key}: {_one_line(given[key])} ({_reason(key, settings)})" for key in rest]
    return "\n".join(text) + "\n"


def _one_line(value: Any, *, quoted: bool = True) -> str:
    text = json.dumps(value, ensure_ascii=False) if quoted and not isinstance(value, str) else str(value)
    return printable(" ".join(text.split()))[:200]


# --- the sections ----------------------------------------------------------------------------------------------------


def _data(settings: Settings, tokenizer: str | None) -> Iterator[Entry]:
    data, folder = settings.data, Path(settings.data.data_dir)
    is_sudoku = data.dataset == "sudoku"
    task = "sudoku" if is_sudoku else "tokens" if tokenizer is None else "gsm8k"
    yield Entry("task.name", task, ("data.dataset",))
    if is_sudoku:
        name = "sudoku-train-data.npy"
        if not (folder / name).exists() and (folder / "train_mdm.npy").exists():
            name = "train_mdm.npy"
        yield Entry("data.path", str(folder / name), ("data.data_dir",), "read where it is")
        yield Entry("data.layout", "two_grid", remark="81 clues, then 81 answers")
        yield Entry("data.augment", False, remark="no symmetries there")
    else:
        yield Entry("data.path", str(folder), ("data.data_dir",), "labels.bin, prompt_mask.bin, read where they are")
        if tokenizer is not None:
            yield Entry("data.tokenizer", tokenizer, remark="what the ids mean; its evaluation names it")
        yield Entry("data.length", settings.model.max_position, ("model.max_position",))
        yield Entry("data.vocab_size", settings.model.vocab_size, ("model.vocab_size",))
        yield Entry("data.mask_id", data.mask_id, ("data.mask_id",))
        source = ("training.eos_id", "validation.sampling.eos_id")
        remark = (
            "there only arm looks at it, and only at validation.sampling.eos_id: without, it learns all the padding"
        )
        yield Entry("data.eos_id", settings.eos_id, source, remark)
    yield Entry("data.validation_ratio", data.val_ratio, ("data.val_ratio",), "other rows than there are held out")
    yield Entry("data.seed", data.seed, ("data.seed",))


def _model(settings: Settings) -> Iterator[Entry]:
    model = settings.model
    for ours, theirs in (
        ("dim", "hidden_size"),
        ("ff_dim", "intermediate_size"),
        ("num_layers", "num_layers"),
        ("num_heads", "num_attention_heads"),
        ("num_kv_heads", "num_kv_heads"),
        ("norm_eps", "rms_norm_eps"),
        ("tied_head", "tie_lm_head"),
        ("dropout", "dropout"),
    ):
        remark = "there after attention's weights and the MLP alone" if ours == "dropout" and model.dropout else ""
        yield Entry(f"model.{ours}", getattr(model, theirs), (f"model.{theirs}",), remark)
    yield Entry("model.qkv_bias", model.bias_qkv, ("model.bias_qkv",))
    yield Entry("model.out_bias", model.bias_qkv, ("model.bias_qkv",), "the projection after attention has one too")
    layout = "as there, where a pair of channels has two angles, which is no rotation; better for a new model: standard"
    yield Entry("model.rotary_layout", "reference", remark=layout)
    yield Entry("model.init", "reference", remark="first weights as PyTorch's layers start")
    if model.causal:
        yield Entry("model.causal", True, ("model.causal",))
    if settings.is_shifted:
        source = ("model.arm_init", "model.predict_next_token")
        remark = "position i is predicted at i - 1"
        if settings.is_pool:
            remark += "; its pool reveals i by what is read at i, the confidence of i + 1"
        yield Entry("model.alignment", "next", source, remark)


def _process(settings: Settings) -> Iterator[Entry]:
    training = settings.training
    source: tuple[str, ...] = ("training.strategy",)
    if training.strategy == "arm":
        yield Entry("process.name", "ar", source)
        return
    yield Entry("process.name", "puma" if settings.is_pool else "uniform", source)
    if settings.block_size is not None:
        remark = "finished blocks see no later one here, so one pass trains all blocks; there each block is a pass"
        yield Entry("process.block_size", settings.block_size, ("training.block_size",), remark)
    if not settings.is_pool:
        return
    first, *rest = settings.stages
    if training.k_schedule:
        remark = f"K from step 0 on; the first entry's step, {training.k_schedule[0][1]}, is not read"
        if training.K is not None:
            remark += ", and neither is training.K"
        yield Entry("process.num_stages", first[0], ("training.k_schedule", "training.K"), remark)
        remark = "[step, K]; there rows in flight are thrown away and the epoch starts again, here they go on"
        yield Entry("process.stage_schedule", [[step, k] for k, step in rest], remark=remark)
    else:
        yield Entry("process.num_stages", first[0], ("training.K",))
    if training.mode == "confidence_collapse":
        source = ("training.mode", "training.confidence_threshold")
        yield Entry("process.threshold", training.confidence_threshold, source)


def _training(settings: Settings, gpus: int) -> Iterator[Entry]:
    training = settings.training
    yield Entry("optim.lr", training.learning_rate, ("training.learning_rate",))
    yield Entry("optim.schedule", "cosine", remark="to 0, as there")
    yield Entry("optim.warmup_steps", training.warmup_steps, ("training.warmup_steps",))
    remark = "there of biases and norms too"
    yield Entry("optim.weight_decay", training.weight_decay, ("training.weight_decay",), remark)
    yield Entry("optim.grad_clip", training.max_grad_norm or None, ("training.max_grad_norm",))
    yield Entry("ema.decay", training.ema or 0.0, ("training.ema",))
    remark = "of its loader's lengths: steps = epochs x rows / batch_size"
    if settings.is_pool:
        remark += "; a pool sees fewer rows than that"
    yield Entry("train.epochs", training.num_epochs, ("training.num_epochs",), remark)
    own = settings.data.training.per_gpu_batch_size
    is_own = gpus == 1 and not settings.is_pool and own is not None
    each, key = (
        (own, "data.training.per_gpu_batch_size") if is_own and own else (training.batch_size, "training.batch_size")
    )
    remark = f"of each of {gpus} GPUs" if gpus > 1 else "of each GPU there, of all here: say --gpus N for more than one"
    yield Entry("train.batch_size", each * gpus, (key,), remark)
    if training.save_steps is not None:
        remark = "the newest two and the best stay (there: all); they can be resumed (there: not)"
        yield Entry("train.checkpoint_every", training.save_steps, ("training.save_steps",), remark)
    if (initial := settings.model.initial) is not None:
        remark = "of the checkpoint: unmask import --from puma THE_FILE.pt --out THIS"
        yield Entry("train.init", str(Path(initial).with_suffix("")), ("model.arm_init",), remark)


def _evaluation(settings: Settings) -> Iterator[Entry]:
    sampling, training = settings.validation.sampling, settings.training
    source = ("validation.sampling.confidence", "validation.sampling.unmasking_num")
    chosen, counts = orders(settings), reveals(settings)
    is_causal = settings.model.causal
    remark = "the other way round there, which reveals the least sure first" if "entropy" in chosen else ""
    ours = [OUR_ORDERS[name] for name in chosen]
    if is_causal:
        ours, counts, remark = ["left_to_right"], [1], "of a causal model"
    yield Entry("decode.order", ours[0], source[:1], remark)
    yield Entry("decode.tokens_per_step", counts[0], source[1:])
    yield Entry("decode.temperature", sampling.temperature, ("validation.sampling.temperature",))
    if settings.data.dataset == "tinygsm":
        remark = "there all of a canvas is decoded, what follows the end too; true is faster"
        yield Entry("decode.stop_early", is_causal, remark="" if is_causal else remark)
        yield Entry("decode.batch_size", 32, remark="as its evaluation")
    elif (share := settings.validation.ratio) is not None:
        remark = f"of {_TEST_PUZZLES:,} there; held-out ones here: unmask eval RUN --data sudoku-test-data.npy"
        yield Entry("eval.examples", max(1, round(share * _TEST_PUZZLES)), ("validation.ratio",), remark)
    if training.eval_steps is not None:
        yield Entry("eval.every", training.eval_steps, ("training.eval_steps",))
    yield Entry("eval.orders", ours, source[:1])
    yield Entry("eval.tokens_per_step", counts, source[1:])


def _logging(settings: Settings) -> Iterator[Entry]:
    wandb = settings.wandb
    if settings.training.logging_steps is not None:
        yield Entry("log.every", settings.training.logging_steps, ("training.logging_steps",))
    if wandb.wandb:
        yield Entry("log.to", ["wandb"], ("wandb.wandb",))
        if wandb.project:
            yield Entry("log.project", wandb.project, ("wandb.project",))


# --- what is not there -----------------------------------------------------------------------------------------------

_REASONS = {
    "training.data_ratio": "nothing there reads it",
    "training.mode": "the threshold is for mode: confidence_collapse",
    "training.confidence_threshold": "it counts only with mode: confidence_collapse",
    "training.K": "it is for strategy: progressive",
    "training.k_schedule": "it is for strategy: progressive",
    "training.block_size": "train.py has no blocks: the script chooses them, not the file. If it was train_block.py, "
    "say --script train_block.py",
    "training.batch_size": "data.training.per_gpu_batch_size is taken where there is one GPU",
    "training.eos_id": "handed on there, and not used",
    "validation.sampling.eos_id": "handed on there, and not used",
    "validation.val_dir": "its folder of test rows; here: unmask eval RUN --data FILE",
    "validation.ratio": "the share of test puzzles that it evaluates",
    "data.sudoku_type": "there is but one",
    "data.mmap": "handed on there, and not used",
    "data.mask_id": "a Sudoku's mask is 10 here too",
    "data.training.per_gpu_batch_size": "with a pool, or several GPUs, training.batch_size is taken",
    "data.training.cpus": "rows are mapped into memory here, and read ahead by one thread",
    "model.vocab_size": "a Sudoku has 11 ids here too",
    "model.max_position": "a Sudoku has 162 positions",
    "model.causal": "every position sees all others, as here by default",
    "model.arm_init": "no checkpoint to start from",
    "model.predict_next_token": "set by arm_init",
    "wandb.wandb": "off, as here by default",
    "wandb.project": "wandb is off",
    "wandb.name": "here the name of the run's folder: unmask train RECIPE --out runs/NAME",
    "wandb.entity": "here from the environment: WANDB_ENTITY",
}


def _reason(key: str, settings: Settings) -> str:
    if key in ("training.mode", "training.confidence_threshold") and not settings.is_pool:
        return "it is for strategy: progressive"
    return _REASONS.get(key, "no such setting in its code, and none here is made of it")
