"""What a run remembers of its way."""

import math
from dataclasses import dataclass


@dataclass
class Progress:
    """What a run knows of itself beside the trainer's state; saved with it."""

    step: int = 0
    seconds: float = 0.0
    """Of training: evaluation and saving apart."""
    metrics_position: int = 0
    """How long `metrics.jsonl` was."""
    skips: int = 0
    """Steps whose update was left out, because their numbers were bad."""
    evaluated_step: int = 0
    """The last one; a run that was stopped when an evaluation was due owes it."""
    best_step: int | None = None
    best_score: float = -math.inf
    best_nelbo: float = math.inf

    def is_better(self, score: float, nelbo: float) -> bool:
        """By accuracy; where that is equal (0, early on or always), by NELBO."""
        return (score, -nelbo) > (self.best_score, -self.best_nelbo)
