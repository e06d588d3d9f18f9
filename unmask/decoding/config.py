"""The settings of a section `decode`."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from unmask.config.settings import DTypeName, Section, TokenIds, known
from unmask.errors import UserError
from unmask.reveal import PARALLEL_RULES, SCHEDULES, Fixed, RevealRule, RevealSettings


class DecodeConfig(RevealSettings):
    """The settings of a section `decode`: what is revealed when, how values are chosen, what is read again."""

    section = "decode"
    exclusive = ("steps", *PARALLEL_RULES)
    alternatives = (*exclusive, "tokens_per_step")
    aliases: ClassVar[dict[str, str]] = {
        "unmasking_num": "tokens_per_step",
        "cfg_scale": "guidance",
        "block_length": "block_size",
    }
    dependents: ClassVar[dict[str, str]] = {"schedule": "steps", "remask": "steps", "remask_eta": "steps"}

    tokens_per_step: int = Field(
        1, ge=1, description="positions revealed in a step, where neither steps nor a rule such as threshold is set"
    )
    steps: int | None = Field(None, ge=1, le=1_000_000, description="number of steps")
    schedule: Annotated[str, known("schedule", SCHEDULES)] = Field(
        "linear", description=f"how the reveals are spread over the steps: {', '.join(SCHEDULES)} (few at first)"
    )
    temperature: float = Field(0.0, ge=0, description="of the sampled values; 0 = greedy")
    top_k: int | None = Field(None, ge=1, description="values are drawn from the k likeliest")
    top_p: float | None = Field(None, gt=0, le=1, description="values are drawn from the likeliest with this mass")
    forbid: TokenIds = Field([], description="ids of tokens that are never written")
    confidence_noise: float = Field(
        0.0, ge=0, description="Gumbel noise on the confidence in nats, times the share still masked (2502.06768: 0.5)"
    )
    block_size: int | None = Field(
        None, ge=1, description="decode block by block, from left to right; the last may be shorter"
    )
    cache: Literal["none", "block", "prefix", "dual"] = Field(
        "none", description="what is kept between steps: finished blocks, what precedes a block, or all beside it"
    )
    refresh_every: int | None = Field(
        None, ge=1, description="steps between readings of the whole canvas, for prefix and dual; null = once a block"
    )
    reads_ahead: bool = Field(
        True,
        description="a model that sees all positions also reads what follows its block; false: as the block models of "
        "the PUMA paper's code",
    )
    stop_early: bool = Field(
        True, description="what follows the first end token is filled in at once, where the task pads with it"
    )
    remask: Literal["none", "remdm_cap", "remdm_rescale", "remdm_confidence", "p2", "rcr"] = Field(
        "none", description="how what was revealed is masked again"
    )
    remask_eta: float = Field(1.0, ge=0, le=1, description="how much is masked again")
    loops: int | None = Field(
        None, ge=1, le=1000, description="how often the layers of model.loops are run; null = as in training at most"
    )
    guidance: float = Field(0.0, ge=0, description="of the prompt, classifier-free; 0 = off")
    seed: int = Field(0, ge=0, description="of random orders, noise and drawn values")
    dtype: DTypeName | None = Field(None, description="null = train.dtype, which evaluation during training also uses")
    batch_size: int = Field(256, ge=1, description="canvases at once; no answer depends on it")
    compile: bool = Field(
        False, description="compile the model for decoding (not training); takes ~30 s, pays off on large jobs"
    )

    @property
    def amount(self) -> tuple[str, Any]:
        """The setting that is in force for how much a step reveals, and its value."""
        return next((key, value) for key in self.alternatives if (value := getattr(self, key)) is not None)

    def rule(self) -> RevealRule:
        """Returns the rule of the alternative that is in force."""
        key, value = self.amount
        rules: dict[str, Any] = {**PARALLEL_RULES, "steps": SCHEDULES[self.schedule], "tokens_per_step": Fixed}
        return rules[key](value)

    @property
    def is_random(self) -> bool:
        """True if two answers to one prompt may differ."""
        draws_masks = self.remask.startswith("remdm") and self.remask_eta > 0
        return bool(self.temperature or self.confidence_noise or self.order == "random" or draws_masks)

    @property
    def ranks_by_token(self) -> bool:
        """True if remasking ranks by the probability of each token, and looks at no order."""
        return self.remask in ("p2", "rcr")

    @property
    def label(self) -> str:
        """A short name, unique for what decides the result: `prob/3`, `margin/steps5/T0.7/top_p0.9`.

        A cache of finished blocks is exact: it decides nothing. One evaluation has one `dtype`, which is left out.
        """
        key, value = self.amount
        parts = [f"{self.order}/{_LABELS.get(key, key)}{_shown(value)}"]
        parts += [name + _shown(getattr(self, key)) for key, name in _PART_LABELS.items() if self._decides(key)]
        return "/".join(parts)

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that decide the result, by key: order and amount, and the others that are not the default."""
        others = {key: getattr(self, key) for key in _PART_LABELS if self._decides(key)}
        return {"order": self.order, **dict([self.amount]), **others}

    def _decides(self, key: str) -> bool:
        return self._is_set(key) and (key, getattr(self, key)) != ("cache", "block")

    def _is_set(self, key: str) -> bool:
        return bool(getattr(self, key) != DecodeConfig.model_fields[key].default)

    def _needs(self) -> Iterator[tuple[str, bool, str]]:
        """Yields settings, whether each is possible beside the others, and if not, why and what to do."""
        has_steps, draws, has_cache = self.steps is not None, self.temperature > 0, self.cache != "none"
        yield "schedule", has_steps, "spreads a number of steps; set decode.steps, or decode.schedule=linear"
        yield "remask", has_steps, "needs a number of steps; set decode.steps, or decode.remask=none"
        yield "remask", not has_cache, f"changes what decode.cache={self.cache} keeps; set decode.cache=none"
        yield "remask", self.block_size is None, "masks anywhere again, not in blocks; set decode.block_size=null"
        if self.ranks_by_token:
            ranks = f"is not looked at by decode.remask={self.remask}, which ranks by the probability of each token"
            yield "order", False, f"{ranks}; set decode.order=prob"
            yield "confidence_noise", False, f"{ranks}; set decode.confidence_noise=0"
        yield "remask_eta", self.remask != "none", "says how much is masked again; set decode.remask, such as to p2"
        yield "top_k", draws, "is for values that are drawn; set decode.temperature=1, or decode.top_k=null"
        yield "top_p", draws, "is for values that are drawn; set decode.temperature=1, or decode.top_p=null"
        yield "cache", self.cache == "block" or self.block_size is not None, "keeps blocks; set decode.block_size"
        yield (
            "refresh_every",
            self.cache in ("prefix", "dual"),
            "is for decode.cache=prefix or dual; set that, or decode.refresh_every=null",
        )
        yield (
            "reads_ahead",
            self.block_size is not None,
            "is for blocks; set decode.block_size, or decode.reads_ahead=true",
        )
        yield "reads_ahead", not has_cache, f"leaves nothing for decode.cache={self.cache}; set decode.cache=none"
        yield "reads_ahead", not self.guidance, "is not for guided models; set decode.guidance=0"
        yield "guidance", not has_cache, f"cannot be had with decode.cache={self.cache}; set decode.cache=none"

    @model_validator(mode="after")
    def _check(self) -> "DecodeConfig":
        for key, is_possible, fix in self._needs():
            if self._is_set(key) and not is_possible:
                raise ValueError(f"decode.{key}={getattr(self, key)} {fix}")
        return self


_LABELS = {"tokens_per_step": "", "entropy_bound": "entropy"}


_PART_LABELS = {
    "schedule": "",
    "block_size": "block",
    "cache": "",
    "refresh_every": "refresh",
    "reads_ahead": "ahead-",
    "stop_early": "stop-",
    "remask": "",
    "remask_eta": "eta",
    "guidance": "guidance",
    "loops": "loops",
    "confidence_noise": "noise",
    "temperature": "T",
    "top_k": "top_k",
    "top_p": "top_p",
    "forbid": "forbid",
    "seed": "seed",
}
"""Names in a label of the settings that appear only if they are set."""


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return "+".join(map(str, value))
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return repr(value) if isinstance(value, float) and float(short) != value else short


def without_loops(loops: int) -> str:
    """Says that a model has nothing that `decode.loops` could run."""
    return f"decode.loops={loops}: this model has no model.loops; set decode.loops=null"


def check_guidance(decode: DecodeConfig, data: Section) -> None:
    """Checks that a model which is to be guided has learned to predict without a prompt.

    Raises:
        UserError: it was not trained on hidden prompts.
    """
    if not decode.guidance or getattr(data, "prompt_dropout", None):
        return
    if "prompt_dropout" in type(data).model_fields:
        fix = "(data.prompt_dropout=0); train one with data.prompt_dropout=0.1, or set decode.guidance=0"
    else:
        fix = "and this task cannot hide them in training; set decode.guidance=0"
    raise UserError(f"decode.guidance={decode.guidance} needs a model that has also seen hidden prompts {fix}")
