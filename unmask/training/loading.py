"""Trained models: opening a run, an export or a Hugging Face checkpoint."""

import stat
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from unmask import formats, paths, progress
from unmask.config import registry
from unmask.config.run import RunConfig
from unmask.data.fingerprint import DataFingerprint, digest, file_sha256, read_fingerprint
from unmask.decoding.build import about_compiling, build_decoder
from unmask.decoding.config import DecodeConfig, check_guidance
from unmask.decoding.decoder import Decoder
from unmask.errors import RunFailed, UserError
from unmask.models import hf
from unmask.models.build import build_denoiser, fill
from unmask.models.denoiser import Denoiser
from unmask.models.on_demand import OnDemand, outline, outlines_of
from unmask.models.precision import resolve_device, resolve_dtype
from unmask.tasks.task import Task, build_task, check_same_data, may_change
from unmask.training import adapters, checkpoint, parallel, state
from unmask.training.adapters import Adapters
from unmask.training.digest import weights_digest
from unmask.training.folder import read_config, read_environment, resolve_config
from unmask.training.importing import Import
from unmask.training.trainer import Trainer
from unmask.types import CleanBatch, TokenSpec

_LARGE = 10**9  # numbers whose checksum takes seconds: say so


@dataclass(eq=False)
class LoadedRun:
    """A trained model with its configuration and task, from a run folder or an export (`LoadedRun.open`)."""

    path: Path
    config: RunConfig
    tensors: Mapping[str, Tensor]
    """The denoiser's state, on the CPU, perhaps read when asked for; adapters are merged into their base, and `config`
    has none then."""
    weights: str
    """`ema` or `raw`: which of the run's weights `tensors` are."""
    step: int
    device: torch.device
    checkpoint: Path | None = None
    """The checkpoint folder that was read; None for an export."""
    adapters: Adapters | None = None
    """The adapters that the run trains, if it does: merged in `tensors`."""
    kept_tokens: TokenSpec | None = None
    """An export keeps its tokens, so that its model can be built without the task's files."""
    data: DataFingerprint | None = None
    """What identifies the data that it was trained on; None for a run from before this was kept."""
    is_published: bool = False
    """True if what is made of it goes to others, as a report does: then nothing is read that may be another's."""

    @staticmethod
    def open(
        path: str | Path,
        *,
        weights: str | None = None,
        step: str = "last",
        device: str | None = None,
        warn: Callable[[str], None] = progress.warn,
        is_published: bool = False,
    ) -> "LoadedRun":
        """Reads a run as its checkpoint left it, an export, or a Hugging Face checkpoint. A run may still be training.

        Its saved settings become code in `resolve_config`, before any tensor is read.

        Args:
            path: a folder that `unmask train`, `unmask export` or `unmask import` wrote, or a Hugging Face checkpoint.
            weights: a run's `ema` or `raw`; default: `ema` where there is an average.
            step: a run's checkpoint: `last`, `best` or a number, as a string.
            device: default: `train.device` if this machine has it, else `auto`.
            warn: called with a line about each damaged checkpoint that is skipped.
            is_published: what is made of it goes to others.

        Raises:
            UserError: it is neither a run with a complete checkpoint nor an export, or lacks these weights.
        """
        if weights not in (None, "ema", "raw"):
            raise UserError(f"weights {weights!r}: use ema or raw")
        path = paths.user_path(path)
        if hf.is_checkpoint(path):
            return replace(open_checkpoint(Import(path), weights, step, device), is_published=is_published)
        if _is_export(path):
            return replace(_open_export(path, weights, step, device), is_published=is_published)
        config = read_config(path).of_run(path)
        found = checkpoint.find(path, step, warn)
        checkpoint.read_progress(found)
        saved, averaged = checkpoint.load_part(found, "model"), checkpoint.load_part(found, "ema/shadow")
        state.check_weights(saved.outlines, averaged.outlines, str(found))
        weights = _choose_weights(averaged, weights, path)
        tensors = saved
        if weights == "ema":  # of what is trained: a buffer has no average
            tensors = OnDemand(saved.outlines, lambda name: (averaged if name in averaged else saved)[name])
        trained = None
        if adapters.lora_of(config) is not None:
            config, trained = adapters.read_adapters(config, found, tensors, open_base)
            tensors = trained.merged()
        place = _device_for(config, device)
        data = _read_data(path, found)
        return LoadedRun(
            path,
            config,
            tensors,
            weights,
            checkpoint.step_of(found),
            place,
            checkpoint=found,
            adapters=trained,
            data=data,
            is_published=is_published,
        )

    @cached_property
    def task(self) -> Task:
        return build_task(self.config)

    def held_out(self, limit: int, task: Task | None = None) -> CleanBatch:
        """Returns up to `limit` of its held-out examples, as those of `task` (default: its own).

        Raises:
            UserError: the data are not those that it was trained on, or it does not say which these were.
        """
        task = task or self.task
        self._check_data(task)
        return task.validation(limit)

    def _check_data(self, task: Task) -> None:
        """Raises `UserError` unless the data are what it was trained on, or the user accepts others.

        A path that only the run names may lead to anything, as the run may be a stranger's. So it is not opened without
        a fingerprint to compare with, and its content is used only if it has that fingerprint.
        """
        path = getattr(self.config.data, "path", None)
        if path is not None and not may_change() and (self.data is None or not hasattr(task, "data_fingerprint")):
            raise UserError(
                f"{self.path}: names data.path={path}, but keeps no fingerprint of these data, so they are not opened; "
                "if the run is yours and they are what it was trained on: add --data-changed"
            )
        fix = "put the data back as they were, or name examples of your own (`unmask eval --data FILE`)"
        try:
            check_same_data(task, self.config, self.data, self.path, fix)
        except UserError:
            if path is None or not self.is_published:
                raise
            # A page must show nothing of a file that only the run names, not even a line of it in an error.
            raise UserError(
                f"{self.path}: data.path={path} is not what it was trained on; {fix}; to show it all the same: "
                "--data-changed"
            ) from None

    def digest(self) -> str:
        """Returns a SHA-256 of the files that it was read from, which tells them from all others."""
        lists_all = None if self.checkpoint is None else self.checkpoint / checkpoint.COMPLETE
        return digest(*map(file_sha256, [lists_all] if lists_all else sorted(self.path.glob("*.safetensors"))))

    def weights_digest(self, like: str | None = None) -> str:
        """Returns a SHA-256 of its tensors, the same in a run and in what is exported of it; of the kind of `like`."""
        numbers = sum(value.numel() for value in outlines_of(self.tensors).values())
        with progress.console.status("Checking the weights ..") if numbers >= _LARGE else nullcontext():
            return weights_digest(self.tensors, like)

    @property
    def tokens(self) -> TokenSpec:
        return self.kept_tokens or self.task.tokens

    @cached_property
    def model(self) -> Denoiser:
        """The denoiser with these weights, in eval mode on `device`; in the format they were saved in, until `prepare`
        or `decoder` sets another."""
        model = self._empty_model()
        return fill(model, self._checked(model), self.device).eval()

    def checked_tensors(self) -> OnDemand:
        """Returns `tensors`, each checked when it is asked for, without a model that holds them.

        Raises:
            UserError: they have other names, shapes or formats than those of its model.
        """
        return self._checked(self._empty_model())

    def _empty_model(self) -> Denoiser:
        formats = {value.dtype for value in outlines_of(self.tensors).values() if value.is_floating_point()}
        model = build_denoiser(
            self.config.model,
            self.tokens,
            dtype=resolve_dtype("float64" if torch.float64 in formats else "float32", self.device),
            is_empty=True,
        )
        if formats == {torch.bfloat16}:
            model.hold_bfloat16()
        return model

    def _checked(self, model: Denoiser) -> OnDemand:
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        outlines, where = outlines_of(self.tensors), str(self.checkpoint or self.path)
        state.check_tensors(model.state_dict(), outlines, where, finite=())

        def finite(name: str) -> Tensor:
            value = self.tensors[name]
            if name in parameters and (found := state.not_finite(value)):
                raise RunFailed(f"{where}: {name} holds {found}, so the model gives nan; use another checkpoint")
            return value

        return OnDemand(outlines, finite)

    def rounded(self) -> "LoadedRun":
        """Returns it with weights in bfloat16, each rounded when it is asked for."""
        outlines = {
            name: outline(value.shape, torch.bfloat16) if value.is_floating_point() else value
            for name, value in outlines_of(self.tensors).items()
        }
        return replace(self, tensors=OnDemand(outlines, lambda name: self.tensors[name].to(outlines[name].dtype)))

    def prepare(self, *decoders: DecodeConfig) -> Denoiser:
        """Returns the model, set to compute in their `dtype` (default: `train.dtype`), and compiled if one asks."""
        dtype = decoders[0].dtype if decoders else None
        self.model.use_dtype(resolve_dtype(dtype or self.config.train.dtype, self.device))
        if any(each.compile for each in decoders):
            self.model.compile_decoding()
        for each in decoders:
            if said := about_compiling(each, self.model):
                progress.warn(said)
        return self.model

    def decoder(self, settings: DecodeConfig, model: Denoiser | None = None, *, rows: int = 1) -> Decoder:
        """Builds the decoder that `settings` describe, and prepares the model for it.

        Args:
            settings: as in the section `decode`.
            model: another model of this run, such as its trainer's, which is used as it is; default: `self.model`.
            rows: canvases that will be decoded.

        Raises:
            UserError: the model cannot decode so, or not so many at once. Nothing has changed then.
        """
        check_guidance(settings, self.config.data)
        decoder = build_decoder(settings, model or self.model, self.tokens, rows=rows)
        if model is None:
            self.prepare(settings)
        return decoder

    def trainer(self) -> Trainer:
        """Returns a trainer as the checkpoint left it, with its model in eval mode; the same one at every call.

        It has the model, average, process and data that the next batches depend on, but no optimizer state.

        Raises:
            UserError: this is an export, or the data are gone.
        """
        return self._trainer

    @cached_property
    def _trainer(self) -> Trainer:
        if self.checkpoint is None:
            raise UserError(f"{self.path}: an export holds no training; give the run that it was made from")
        train = self.config.train.model_copy(update={"compile": False, "device": str(self.device)})
        trained = read_config(self.path).model  # with the adapters that `tensors` has merged
        config = self.config.model_copy(update={"train": train, "model": trained})
        saved, where = checkpoint.load(self.checkpoint), str(self.checkpoint)
        self._check_data(self.task)
        trainer = Trainer(config, self.tokens, self.task.train_stream(train.seed))
        trainer.check(saved, where)
        if self.adapters is not None:
            trainer.load_base(self.adapters.base)
        trainer.model.load_state_dict(saved["model"])
        trainer.load_process(saved["process"], where)
        trainer.step_number = saved["trainer"]["step_number"]
        if trainer.ema is not None:
            trainer.ema.load_state_dict(saved["ema"])
        trainer.model.eval()
        return trainer


def open_base(path: str | Path) -> LoadedRun:
    """Opens a run or an export as the base of adapters.

    Raises:
        UserError: as `LoadedRun.open`, or it has adapters itself.
    """
    folder = paths.user_path(path)
    if not _is_export(folder):
        adapters.check_whole(read_config(folder), path)
    return LoadedRun.open(folder)


def load(source: str | Path, *, weights: str | None = None, step: str = "last", trust_code: bool = False) -> Denoiser:
    """Returns the denoiser of a run or of an export, in eval mode, on the CPU.

    Args:
        source: a folder that `unmask train`, `unmask export` or `unmask import` wrote, or a Hugging Face checkpoint.
        weights: a run's `ema` or `raw`; default: `ema` where there is an average.
        step: a run's checkpoint: `last`, `best` or a number, as a string.
        trust_code: import what the run names by import path, `module:Class`; only for runs whose origin you trust.

    Beside the NLL it returns the confidence `prob`, unless the denoiser's `confidence` is set.

    Raises:
        UserError: it is neither a run with a complete checkpoint nor an export, lacks these weights, or names code that
            is not trusted.
    """

    def open_and_build() -> Denoiser:
        if trust_code:
            registry.trust_code()
        return LoadedRun.open(source, weights=weights, step=step, device="cpu").model

    return copy_context().run(open_and_build)  # trust ends with this call


def open_checkpoint(made: Import, weights: str | None, step: str, device: str | None) -> LoadedRun:
    """Opens a Hugging Face checkpoint as if it were an export."""
    if weights == "ema" or step != "last":
        raise UserError(
            f"{made.folder}: a Hugging Face checkpoint holds one set of weights; leave out --weights and --step"
        )
    config, tokens = made.config, made.tokens
    place = _device_for(config, device)
    return LoadedRun(made.folder, config, made.read_weights(), "raw", 0, place, kept_tokens=tokens)


def is_ours(folder: Path) -> bool:
    """True if `folder` holds a run or an export, not a Hugging Face checkpoint."""
    if (folder / "config.yaml").exists():
        return not hf.is_checkpoint(folder)
    try:
        return bool(hf.read_checkpoint_json(folder / "config.json").get("format") == "unmask")
    except UserError:
        return False


def has_checkpoints(path: str | Path) -> bool:
    """True if `path` is a run, of which steps and weights are chosen, not one set of weights."""
    folder = paths.user_path(path)
    return not hf.is_checkpoint(folder) and not _is_export(folder)


def _is_export(path: Path) -> bool:
    return (path / "model.safetensors").exists()


def _open_export(path: Path, weights: str | None, step: str, device: str | None) -> LoadedRun:
    file = path / "config.json"
    description: state.Export = formats.read_json(file, state.Export)
    tokens = TokenSpec(**description.tokens.model_dump())
    own_weights, own_step = description.weights, description.step
    if weights not in (None, own_weights) or step not in ("last", str(own_step)):
        raise UserError(
            f"{path}: this export holds the {own_weights} weights of step {own_step} alone; choose at export"
        )
    config = resolve_config(description.run, file).of_run(path)
    weights_file = path / "model.safetensors"
    try:
        if not stat.S_ISREG(weights_file.stat().st_mode):  # a fifo would wait for its writer
            raise UserError(f"{weights_file}: is no regular file; export it again")
        stored = parallel.read([weights_file])
        for each in stored.values():
            each.check()
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{weights_file}: damaged: {error}; export it again") from error
    tensors = parallel.on_demand(stored)
    state.check_weights(tensors.outlines, {}, str(weights_file))
    place, data = _device_for(config, device), read_fingerprint(description.data, str(file))
    return LoadedRun(path, config, tensors, own_weights, own_step, place, kept_tokens=tokens, data=data)


def _read_data(run: Path, found: Path) -> DataFingerprint | None:
    """Reads the fingerprint of the data that the checkpoint `found` keeps, or else the run."""
    for file, kept in ((found, checkpoint.load_rest(found)), (run / "environment.json", read_environment(run))):
        if (data := read_fingerprint(kept.get("data"), str(file))) is not None:
            return data
    return None


def _choose_weights(averaged: Mapping[str, Tensor], asked: str | None, run: Path) -> str:
    if asked == "ema" and not averaged:
        raise UserError(f"{run}: has no averaged weights (ema.decay=0); use --weights raw")
    return asked or ("ema" if averaged else "raw")


def _device_for(config: RunConfig, asked: str | None) -> torch.device:
    if asked is not None:
        return resolve_device(asked, "device ")
    try:
        return resolve_device(config.train.device)
    except UserError:  # trained on another machine
        return resolve_device("auto")
