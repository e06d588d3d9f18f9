"""How much a step reveals, as the settings say it."""

from unmask.config import DecodeConfig
from unmask.reveal import PARALLEL_RULES, SCHEDULES, Fixed, RevealRule


def rule_from(config: DecodeConfig) -> RevealRule:
    """The rule of the one of `DecodeConfig.alternatives` that is in force."""
    key, value = config.amount
    return {**PARALLEL_RULES, "steps": SCHEDULES[config.schedule], "tokens_per_step": Fixed}[key](value)
