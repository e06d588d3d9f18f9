"""Reads checkpoints of the PUMA paper's code, `step=N.pt` and `ema_step=N.pt`, as our transformer.

They are pickles in a zip archive of torch.save. Only tensors and plain values are read (`weights_only=True`): no code
of a file is run. Averaged weights are a list without names, in the order of the module's parameters.

Dimensions: H heads, E width of a head, P = E / 2, D width.
"""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.config.run import RunConfig
from unmask.errors import UserError
from unmask.models.cost import require_memory_for_model
from unmask.models.families import PUMA_NAMES
from unmask.models.transformer import Transformer
from unmask.models.transformer_config import TransformerConfig
from unmask.training import state
from unmask.types import TokenSpec

_MAX_PICKLE = 2**26  # bytes of what is no tensor
_WRAPPERS = ("module.", "_orig_mod.")  # names before those of the module, as DDP and torch.compile leave them
_KEPT_ANGLES = re.compile(r"\.rope\.(cos|sin)\Z")  # made anew


class PumaCheckpoint:
    """The checkpoint `file`: what it holds, of which nothing is checked but that it may be read.

    Raises:
        UserError: it is no archive of torch.save, damaged, or holds more than tensors and plain values.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        content = _load(file)
        is_bare = "model_state_dict" not in content  # its code reads these as well
        self.tensors = _tensors(content if is_bare else content["model_state_dict"], f"{file}: model_state_dict")
        self.settings: Any = None if is_bare else content.get("config")
        """The settings that it was trained with, unchecked; None if it holds none."""
        self.is_averaged = not is_bare and content.get("is_ema_snapshot") is True
        """True if the model's weights are the averaged ones."""
        self.shadows = None if is_bare else _shadows(content.get("ema_state_dict"), file)
        self.step = _step(None if is_bare else content.get("global_step"), file)
        self.is_of_blocks = not is_bare and "val_loss" in content and content["val_loss"] is None
        """True if `train_block.py` wrote it, which measures no loss."""

    def choose(self, weights: str | None) -> str:
        """Returns which weights are read, `ema` or `raw`; `weights` is what was asked for.

        Raises:
            UserError: it has not got them.
        """
        has_average = self.is_averaged or self.shadows is not None
        if weights not in (None, "ema", "raw"):
            raise UserError(f"--weights {weights}: use ema or raw")
        if weights == "ema" and not has_average:
            raise UserError(f"{self.file}: holds no averaged weights; those are in ema_step=N.pt, or use --weights raw")
        if weights == "raw" and self.is_averaged:
            raise UserError(f"{self.file}: holds averaged weights alone; the raw ones are in step=N.pt")
        return weights or ("ema" if has_average else "raw")

    def weights(self, config: RunConfig, tokens: TokenSpec, weights: str, where: str) -> dict[str, Tensor]:
        """Returns the weights in fp32, by their names in `Denoiser.state_dict()`.

        Args:
            config: the run that the settings describe.
            tokens: its tokens.
            weights: `ema` or `raw`.
            where: the file of the settings, for messages.

        Raises:
            UserError: a tensor is missing, left over, of another shape, or not finite.
        """
        assert isinstance(config.model, TransformerConfig)
        require_memory_for_model(config.model, tokens)
        with torch.device("meta"):
            ours = dict(Transformer(config.model, tokens).named_parameters())
        shapes = {PUMA_NAMES.theirs(name): tuple(each.shape) for name, each in ours.items()}
        given = self.tensors
        if weights == "ema" and not self.is_averaged:
            given = self._named_shadows(shapes)
        self._check(given, shapes, config.model, where)
        found = {}
        for name in ours:
            value = given[PUMA_NAMES.theirs(name)].detach().to(torch.float32)  # still in the file, mapped into memory
            if problem := state.not_finite(value):
                raise UserError(f"{self.file}: {PUMA_NAMES.theirs(name)} holds {problem}; use another checkpoint")
            if name.endswith(("attention.q.weight", "attention.q.bias", "attention.k.weight", "attention.k.bias")):
                value = _even_channels_first(value, config.model.head_width)
            found[f"backbone.{name}"] = value.clone(memory_format=torch.contiguous_format)
        return found

    def _named_shadows(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        assert self.shadows is not None, "`choose` has looked"
        names = [*_in_order(shapes)]
        if len(self.shadows) != len(names):
            raise UserError(
                f"{self.file}: ema_state_dict.shadow_params holds {len(self.shadows)} tensors, the model has "
                f"{len(names)} parameters; give the settings that it was trained with, or use --weights raw"
            )
        return dict(zip(names, self.shadows, strict=True))

    def _check(
        self, given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], model: TransformerConfig, where: str
    ) -> None:
        fix = f"{where} is not what it was trained with, or it is of other code"
        for name, shape in shapes.items():
            if name not in given:
                raise UserError(f"{self.file}: lacks {name}; {fix}")
            if tuple(given[name].shape) != shape:
                raise UserError(f"{self.file}: {name} has shape {tuple(given[name].shape)}, not {shape}; {fix}")
        head, embedding = (PUMA_NAMES.theirs(f"{part}.weight") for part in ("head", "embedding"))
        for name, value in given.items():
            if name == head and model.tied_head:
                if not torch.equal(value, given[embedding]):
                    raise UserError(f"{self.file}: {head} is not {embedding}, as model.tie_lm_head says; {fix}")
            elif name not in shapes and not _KEPT_ANGLES.search(name):
                raise UserError(f"{self.file}: {name} is no part of the model; {fix}")


def _even_channels_first(value: Tensor, width: int) -> Tensor:
    """Moves, in the (H E, ..) rows of each head, channels 0, 2, 4 .. before 1, 3, 5 .., so that pairs are P apart."""
    return value.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)


def _in_order(names: Mapping[str, Any]) -> Iterator[str]:
    """Yields the names of the module's parameters in its order, in which its average lists them."""
    outer = [f"{each}.weight" for each in PUMA_NAMES.outer.values()]
    inner = [f"{each}.{kind}" for each in PUMA_NAMES.inner.values() for kind in ("weight", "bias")]
    blocks = [f"{PUMA_NAMES.block.format(layer)}.{part}" for layer in range(len(names)) for part in inner]
    yield from (name for name in (outer[0], *blocks, *outer[1:]) if name in names)


# --- the file --------------------------------------------------------------------------------------------------------


def _load(file: Path) -> dict[str, Any]:
    _check_archive(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|Unsupported \w+) ([\w.]+)", str(error))
        what = f": it names {named[1][:80]}" if named else ""
        raise UserError(
            f"{file}: holds more than tensors and plain values{what}; a pickle can run code, so it is not read. If you "
            "trust it: load it yourself, and save model_state_dict and config alone"
        ) from error
    except Exception as error:  # whatever the bytes of a stranger make of torch's reader
        raise UserError(f"{file}: damaged: {' '.join(str(error).split())[:200]}; copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no dict with model_state_dict, but a {type(content).__name__}")
    return content


def _check_archive(file: Path) -> None:
    """Checks that it is an archive whose parts are no longer than they are in the file."""
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(
            f"{file}: is no complete archive of torch.save: {error}; copy it again, or save it anew with torch 1.6 or "
            "later"
        ) from error
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
            raise UserError(f"{file}: {part.filename[:80]} is compressed, as torch.save never does; save it anew")
        if part.filename.endswith(".pkl") and part.file_size > _MAX_PICKLE:
            raise UserError(f"{file}: {part.filename[:80]} has {part.file_size:,} bytes, too many for a checkpoint")


def _tensors(given: Any, where: str) -> dict[str, Tensor]:
    if not isinstance(given, dict) or not given:
        raise UserError(f"{where}: is no dict of tensors by name; this is no checkpoint of the PUMA paper's code")
    found = {str(name): _tensor(value, f"{where}.{name}") for name, value in given.items()}
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _tensor(value: Any, where: str) -> Tensor:
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not (is_plain and value.is_floating_point()):
        what = (
            f"of {value.dtype}, {value.layout}, {value.device}" if isinstance(value, Tensor) else type(value).__name__
        )
        raise UserError(f"{where[:300]}: is no tensor of plain numbers, but {what}")
    return value


def _shadows(given: Any, file: Path) -> list[Tensor] | None:
    if given is None:
        return None
    where = f"{file}: ema_state_dict.shadow_params"
    shadows = given.get("shadow_params") if isinstance(given, dict) else None
    if not isinstance(shadows, list):
        raise UserError(f"{where}: is no list of tensors; use --weights raw with a file without ema_state_dict")
    return [_tensor(value, f"{where}[{i}]") for i, value in enumerate(shadows)]


def _step(given: Any, file: Path) -> int:
    if given is None:
        return 0
    if type(given) is not int or not 0 <= given <= 2**53:
        raise UserError(f"{file}: global_step={str(given)[:60]}: must be a whole number, 0 or more")
    return given
