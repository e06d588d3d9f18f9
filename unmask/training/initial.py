"""Reads the weights that a training starts from, `train.init`: all of them, or the frozen base of adapters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unmask import paths
from unmask.config.run import RunConfig
from unmask.config.settings import Section
from unmask.errors import UserError
from unmask.formats import to_yaml_line
from unmask.models import hf
from unmask.models.families import LLAMA_NAMES, TensorNames
from unmask.models.hf_weights import read_weights
from unmask.models.lora import LoraConfig
from unmask.models.on_demand import OnDemand, outline, outlines_of
from unmask.models.transformer import Transformer
from unmask.models.transformer_config import TransformerConfig
from unmask.tasks.task import Task
from unmask.training import state
from unmask.training.digest import WeightsDigest, is_older
from unmask.training.hf_tokens import with_own_mask

OpenRun = Callable[[str], Any]
"""`LoadedRun.open`, which itself reads the base of a run that has adapters."""


def read_initial_weights(
    source: str, task: Task, settings: Section, own: Mapping[str, Tensor], open_run: OpenRun
) -> OnDemand:
    """Reads the weights of a model of these `settings` from a run, an export or a Hugging Face folder.

    Each is read, in the model's format, when it is asked for. Tensors that start at 0, and the bias after attention,
    may be missing there: they are 0 then.

    Args:
        source: the folder.
        task: the task that the model is for.
        settings: the section `model`.
        own: tensors of the names, shapes and formats of the model's.
        open_run: opens a run or an export.

    Raises:
        UserError: `source` is none of them, or is of another vocabulary or shape; the message says which. When a
            tensor is asked for: it is not finite.
    """
    folder = paths.user_path(source, "train.init=")
    weights: Mapping[str, Tensor]
    if hf.is_checkpoint(folder):
        weights = _from_hugging_face(source, task, settings)
    else:
        weights = _from_run(source, task, settings, open_run)
    there = outlines_of(weights)
    may_be_missing = (*Transformer.STARTS_AT_ZERO, "attention.out.bias")  # a model without them has 0 there
    missing = [name for name in own if name.endswith(may_be_missing) and name not in there]
    same_format = {
        name: outline(value.shape, own[name].dtype) if name in own and value.is_floating_point() else value
        for name, value in there.items()
    }
    outlines = same_format | {name: outline(own[name].shape, own[name].dtype) for name in missing}
    if named := state.differences(own, outlines):
        raise UserError(
            f"train.init={source}: its model differs from this one: {named}; set `model` as it has it, or name another"
        )

    def read(name: str) -> Tensor:
        if name not in there:
            return torch.zeros_like(outlines[name], device="cpu")
        value = weights[name]
        if found := state.not_finite(value):
            raise UserError(f"train.init={source}: {name} holds {found}; name another checkpoint")
        return value.to(outlines[name].dtype)

    return OnDemand(outlines, read)


def _from_run(source: str, task: Task, settings: Section, open_run: OpenRun) -> Mapping[str, Tensor]:
    found = open_run(source)
    theirs, ours = found.tokens, task.tokens
    if (theirs.fingerprint, theirs.vocab_size) != (ours.fingerprint, ours.vocab_size):
        raise UserError(
            f"train.init={source}: its ids mean other tokens (task.name={found.config.task.name}, {theirs.vocab_size} "
            f"ids; here {ours.vocab_size}); name a run of this task with the same tokens (of text: data prepared with "
            "the same tokenizer and vocabulary)"
        )
    if differing := _other_settings(found.config.model, settings):
        them = "it" if len(differing) == 1 else "them"
        raise UserError(f"train.init={source}: its model has {', '.join(differing)}; set {them} so")
    tensors: Mapping[str, Tensor] = found.tensors
    return tensors


def _other_settings(theirs: Section, ours: Section) -> list[str]:
    """Returns the settings that `theirs` needs and `ours` has otherwise, but for those whose weights may be missing."""
    if not (isinstance(theirs, TransformerConfig) and isinstance(ours, TransformerConfig)):
        return []
    names = {"num_kv_heads": "key_heads", "head_dim": "head_width"}  # which hold for null, too
    needed = ("dim", "ff_dim", "num_layers", "num_heads", *names, "qkv_bias", "qk_norm", "tied_head", "rotary")
    needed += ("rope_theta", "rotary_layout", "learned_positions", "norm_eps", "alignment")
    idle = theirs.without_effect().keys() & ours.without_effect().keys()
    values = {name: [getattr(each, names.get(name, name)) for each in (theirs, ours)] for name in needed}
    # Weights that were trained in loops need them; others may begin to be looped. How often is free, as in decoding.
    if theirs.loops is not None and (ours.loops is None or ours.loops.layers != theirs.loops.layers):
        values["loops"] = [None if each is None else each.model_dump() for each in (theirs.loops, ours.loops)]
    return [
        f"model.{name}={to_yaml_line(their)} (not {to_yaml_line(our)})"
        for name, (their, our) in values.items()
        # A width that neither names follows from what is listed.
        if name not in idle and their != our and getattr(theirs, name) != getattr(ours, name)
    ]


def _from_hugging_face(source: str, task: Task, settings: Section) -> OnDemand:
    folder = paths.user_path(source, "train.init=")
    if not isinstance(settings, TransformerConfig):
        raise UserError(f"train.init={folder}: is for model.name=transformer, not for a model of your own")
    hf.check_settings(folder, settings)
    original_ids = with_own_mask(hf.read_checkpoint(folder), getattr(task, "original_ids", None), task.tokens)
    return read_weights(folder, original_ids=original_ids, vocab_size=task.tokens.vocab_size)


class BaseTensors(OnDemand):
    """The tensors of a base, whose digest is computed while they are read, and compared if `compare` was called.

    Who reads all of them in the order of their names, in which they are given, reads each once. Who asks for one before
    its turn waits until all are read and compared.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        outlines = outlines_of(tensors)
        super().__init__({name: outlines[name] for name in sorted(outlines)}, tensors.__getitem__)
        self._check: Callable[[str], None] | None = None
        self._begin(None)

    def _begin(self, like: str | None) -> None:
        self._digest = WeightsDigest(like)
        self._left = sorted(self.outlines, reverse=True)

    def compare(self, like: str | None, check: Callable[[str], None]) -> None:
        """Calls `check` with the digest, made in the same way as `like`, once all is read.

        If it raises, then it is called again whenever a tensor is asked for.
        """
        is_read = not self._left
        if is_older(like) != self._digest.is_older:
            self._begin(like)
        self._check = check
        if is_read:
            self.read_all()

    @property
    def sha256(self) -> str:
        self.read_all()
        return self._digest.hexdigest()

    def read_all(self) -> None:
        """Reads what was not yet, and compares."""
        while self._left:
            self._read_next()
        if self._check is not None:
            self._check(self._digest.hexdigest())
            self._check = None

    def __getitem__(self, name: str) -> Tensor:
        if self._check is not None and name in self._left[:-1]:  # before its turn
            self.read_all()
        is_next = self._left[-1:] == [name]
        value = self._read_next() if is_next else super().__getitem__(name)
        if not self._left:
            self.read_all()
        return value

    def _read_next(self) -> Tensor:
        value = super().__getitem__(self._left[-1])
        self._digest.add(self._left.pop(), value)
        return value


@dataclass(frozen=True)
class Base:
    """The frozen weights under a run's adapters."""

    source: str
    tensors: BaseTensors
    """Each is read when it is asked for, in fp32."""
    mask_is_new: bool
    """True if the checkpoint has no row for the mask: it starts as the mean of all rows."""
    mask_row: int
    """The checkpoint's row of the mask; the one after its last for a new one."""
    names: TensorNames = field(default=LLAMA_NAMES, repr=False)
    """The names that the checkpoint has for our parameters."""

    def trains_mask_row(self, lora: LoraConfig) -> bool:
        return self.mask_is_new if lora.mask_row == "auto" else lora.mask_row

    def kept(self) -> dict[str, str]:
        """Returns what a checkpoint says of it."""
        return {"source": self.source, "sha256": self.tensors.sha256}

    def check(self, kept: Any, where: str) -> None:
        """Raises `UserError` unless it is the base that the checkpoint `where` keeps the name of: once all is read."""
        sha256 = kept.get("sha256") if isinstance(kept, dict) else None

        def check(own: str) -> None:
            if sha256 != own:
                raise UserError(
                    f"{where}: its adapters were trained on weights with SHA-256 {str(sha256)[:12]}.., those of "
                    f"train.init={self.source} have {own[:12]}..; put back the weights that were there"
                )

        self.tensors.compare(sha256, check)


def read_base(config: RunConfig, task: Task, open_run: OpenRun) -> Base:
    """Reads the base of the adapters that `config` describes.

    Raises:
        UserError: as `read_initial_weights`, or it has adapters itself.
    """
    assert isinstance(config.model, TransformerConfig), "adapters are the transformer's"
    assert config.train.init is not None, "RunConfig asks for it"
    source, tokens = config.train.init, task.tokens
    settings = config.model.model_copy(update={"lora": None})
    with torch.device("meta"):
        own = {f"backbone.{name}": each for name, each in Transformer(settings, tokens).named_parameters()}
    weights = BaseTensors(read_initial_weights(source, task, settings, own, open_run))
    folder = paths.user_path(source, "train.init=")
    if not hf.is_checkpoint(folder):
        return Base(source, weights, mask_is_new=False, mask_row=tokens.mask_id)
    found = hf.read_checkpoint(folder)
    ids = with_own_mask(found, getattr(task, "original_ids", None), tokens)
    row = tokens.mask_id if ids is None else ids[tokens.mask_id]
    is_new = row is None or row >= found.num_rows
    mask_row = found.num_rows if row is None or is_new else row
    return Base(source, weights, mask_is_new=is_new, mask_row=mask_row, names=found.family.names)
