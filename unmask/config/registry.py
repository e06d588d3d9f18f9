"""From a name in a configuration to the class it stands for. Nothing is imported before it is asked for."""

import difflib
import importlib
from typing import Any

from unmask.errors import UserError

COMPONENTS = {
    "task": {
        "sudoku": "unmask.tasks.sudoku.task:Sudoku",
        "sudoku_moves": "unmask.tasks.sudoku.moves:SudokuMoves",
        "tokens": "unmask.tasks.tokens:Tokens",
        "text": "unmask.tasks.text:Text",
        "gsm8k": "unmask.tasks.gsm8k:Gsm8k",
        "toy": "unmask.tasks.toy:Toy",
    },
    "model": {
        "transformer": "unmask.models.transformer:Transformer",
    },
    "process": {
        "uniform": "unmask.masking.uniform:RandomMasking",
        "puma": "unmask.masking.puma:PumaPool",
        "puma_variable": "unmask.masking.puma_variable:VariablePumaPool",
        "ar": "unmask.masking.ar:NextToken",
    },
    "time": {
        "uniform": "unmask.masking.time:Uniform",
        "clipped": "unmask.masking.time:Clipped",
        "beta": "unmask.masking.time:Beta",
        "truncated_normal": "unmask.masking.time:TruncatedNormal",
        "logit_normal": "unmask.masking.time:LogitNormal",
        "table": "unmask.masking.time:Table",
        "mixture": "unmask.masking.time:Mixture",
    },
}

_PARTS = {"time": ("model_fields", "density")}
"""What makes a class a component, where that is not `Config` and `from_config`."""


def resolve(kind: str, name: str) -> Any:
    """The class behind `name`: a shipped one, or an import path `package.module:Class` of the user's own.

    Raises:
        UserError: nothing of that name, or the import fails.
    """
    known = COMPONENTS[kind]
    path = known.get(name, name)
    if ":" not in path:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        raise UserError(f"{kind}.name={name}: no such {kind}; {hint} (or an import path, package.module:Class)")
    module, _, attribute = path.partition(":")
    try:
        component = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{kind}.name={name}: cannot import it: {error}") from error
    if missing := [part for part in _PARTS.get(kind, ("Config", "from_config")) if not hasattr(component, part)]:
        raise UserError(f"{kind}.name={name}: is not a {kind}: it has no {' and no '.join(missing)}")
    return component
