"""Options that several verbs share, and what they mean."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from unmask.config import DecodeConfig, check_section
from unmask.errors import UserError

Run = Annotated[str, typer.Argument(help="A run folder (or an export).", show_default=False)]
Weights = Annotated[str | None, typer.Option(help="ema or raw; the average where there is one, unless given.")]
Step = Annotated[str, typer.Option(help="Which checkpoint: last, best, or a step.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or auto; as in training unless given.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DECODER_HELP = (
    "Settings of a decoder, such as `margin`, `margin,tokens_per_step=3` or "
    "`confidence=prob,steps=50,confidence_noise=0.5`; keys as in the section `decode`."
)


def parse_decoder(text: str, base: DecodeConfig) -> DecodeConfig:
    """A decoder from `key=value,..` over `base`; a first word without `=` is the confidence."""
    settings: dict[str, Any] = base.model_dump()
    for number, part in enumerate(text.split(",")):
        key, equals, value = part.partition("=")
        if not equals and number == 0:
            key, value = "confidence", part
        elif not equals:
            raise UserError(f"--decoder {text}: {part!r} is not key=value")
        settings[key.removeprefix("decode.")] = yaml.safe_load(value)
    return check_section(DecodeConfig, settings, f"--decoder {text}")


def check_weights(weights: str | None) -> str | None:
    if weights not in (None, "ema", "raw"):
        raise UserError(f"--weights {weights}: use ema or raw")
    return weights


def results() -> Console:
    """Where results for people to read go: stdout."""
    return Console(highlight=False, markup=False, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """One object, last, on stdout."""
    print(json.dumps(value))


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise UserError(f"--out {path}: exists already; name another file")
