"""A checkpoint of the PUMA paper's code as a model of ours."""

import shlex
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from unmask.config.registry import found_in
from unmask.config.run import RunConfig
from unmask.errors import UserError
from unmask.models.cost import count_parameters
from unmask.models.transformer_config import TransformerConfig
from unmask.tasks.task import Task, build_task
from unmask.training.exporting import write_export
from unmask.training.loading import LoadedRun
from unmask.training.sources import in_columns
from unmask.training.sources.puma import recipe
from unmask.training.sources.puma.checkpoint import PumaCheckpoint
from unmask.training.sources.puma.settings import STRATEGIES, ModelPart, Settings, parse, read

_OF_A_TRAINING = ("process.block_size", "train.init")


class Model:
    """The checkpoint `file`.

    Args:
        file: `step=N.pt` or `ema_step=N.pt`.
        config: the YAML file that it was trained with; default: the settings that it holds.
        script: the script that it was trained with; default: as the file tells.
        weights: `ema` or `raw`; default: `ema` where there is an average.
        tokenizer: that of TinyGSM, a folder or a name on the hub; default: rows are ids alone.
        gpus: GPUs that it was trained on.

    Raises:
        UserError: as `PumaCheckpoint`; there are no settings, two different ones, or others than it was trained with.
    """

    def __init__(
        self,
        file: Path,
        *,
        config: Path | None = None,
        script: str | None = None,
        weights: str | None = None,
        tokenizer: str | None = None,
        gpus: int = 1,
    ) -> None:
        self.checkpoint = PumaCheckpoint(file)
        self.weights = self.checkpoint.choose(weights)
        self.settings = self._find_settings(config, script)
        self._lines = recipe.lines(self.settings, gpus=gpus, tokenizer=tokenizer)

    def _find_settings(self, config: Path | None, script: str | None) -> Settings:
        own, file = self.checkpoint.settings, self.checkpoint.file
        if own is None and config is None:
            raise UserError(f"{file}: holds no settings; give the file that it was trained with: --config FILE.yaml")
        kept = None if own is None else parse(own, f"{file}: config", script or self._script_of(own))
        if config is None:
            assert kept is not None
            return kept
        given = read(config, script or (kept.script if kept else None))
        if kept is not None:
            for key, value in _decisive(kept.model).items():
                if (other := _decisive(given.model)[key]) != value:
                    raise UserError(
                        f"{config}: model.{key}={other!r}, but {file} was trained with {value!r}; leave out --config"
                    )
        return given

    def _script_of(self, settings: Any) -> str | None:
        training = settings.get("training") if isinstance(settings, dict) else None
        strategy = training.get("strategy") if isinstance(training, dict) else None
        is_of_blocks = self.checkpoint.is_of_blocks and strategy in STRATEGIES["train_block.py"]
        return "train_block.py" if is_of_blocks else None

    @cached_property
    def config(self) -> RunConfig:
        """Its settings, as those of a run that trained it.

        That code has no blocks in attention: `train_block.py` feeds the module, which sees all that it is given, one
        prefix after the other. So the model is one that sees all positions, and reads none behind a block in decoding.
        """
        lines = [line for line in self._lines if line.key not in _OF_A_TRAINING]
        if self.settings.block_size is not None:
            lines.append(recipe.Entry("decode.block_size", self.settings.block_size))
            lines.append(recipe.Entry("decode.reads_ahead", False))
        with found_in(self.checkpoint.file):  # what it names is not opened
            return recipe.check_as_run(self.settings, lines)

    @cached_property
    def _task(self) -> Task:
        return build_task(self.config)

    @cached_property
    def loaded(self) -> LoadedRun:
        """The model as if a run of ours had been opened.

        Raises:
            UserError: as `PumaCheckpoint.weights`.
        """
        tokens, where = self._task.tokens, self.settings.where
        tensors = self.checkpoint.weights(self.config, tokens, self.weights, where)
        file, step, device = self.checkpoint.file, self.checkpoint.step, torch.device("cpu")
        return LoadedRun(file, self.config, tensors, self.weights, step, device, kept_tokens=tokens)

    def shown(self, target: Path | None) -> str:
        _ = self.loaded
        config, tokens, settings = self.config.model, self._task.tokens, self.settings
        assert isinstance(config, TransformerConfig)
        found = {
            "from": f"the PUMA paper's code, {settings.script}, strategy {settings.training.strategy}",
            "settings": settings.where,
            "parameters": f"{count_parameters(config, tokens):,} ({config.num_layers} layers, width {config.dim})",
            "weights": f"{self.weights}, step {self.checkpoint.step:,}",
            "a position sees": "those before it (causal)" if config.causal else "all",
            "alignment": config.alignment,
            "rotary": f"{config.rotary_layout}: two angles in a pair of channels",
            "mask": str(tokens.mask_id),
            "end": "none" if tokens.eos_id is None else str(tokens.eos_id),
            "head": "tied to the embedding" if config.tied_head else "a matrix of its own",
            "vocabulary": f"{tokens.vocab_size:,} tokens",
            "canvas": f"{tokens.length} positions",
            "task": self.config.task.name,
        }
        if settings.block_size is not None:
            found["blocks"] = f"decoded in blocks of {settings.block_size}, each without what follows it"
        return in_columns(found)

    def write(self, target: Path) -> None:
        write_export(self.loaded, target)

    def next_steps(self, target: Path | None) -> list[str]:
        if target is None:
            return ["To use it, write it: --out DIR"]
        name, kind = shlex.quote(str(target)), self.config.task.name
        prompts = {"sudoku": "puzzles.txt", "gsm8k": "questions.txt"}.get(kind, "ids.jsonl")
        lines = [f"Decode:        unmask decode {name} {prompts}"]
        if kind == "sudoku":
            lines.append(f"Evaluate it:   unmask eval {name} --data sudoku-test-data.npy")
        elif kind == "gsm8k":
            lines.append(f"Evaluate it:   unmask eval {name} --data test.jsonl")
        else:
            lines.append(
                f"To read and grade what it writes, import it with --tokenizer {recipe.DEFAULT_TOKENIZER}, or a folder"
            )
        return [*lines, f"Start from it: unmask train RECIPE train.init={name}"]


def _decisive(model: ModelPart) -> dict[str, Any]:
    """Returns the settings that a model depends on: not the path that it started from."""
    return {**model.model_dump(), "arm_init": None if model.initial is None else "set"}
