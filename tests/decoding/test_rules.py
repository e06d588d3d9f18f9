"""Settings of a decoder: which rule they ask for, what they are called, and which cannot be had together."""

import pytest

from unmask.config.settings import WrongSettings, check_section
from unmask.decoding.config import DecodeConfig
from unmask.reveal import CosineSteps, EntropyBound, ErrorBudget, Factor, Fixed, NumSteps, RevealRule, Threshold

AMOUNTS: list[tuple[dict[str, object], str, RevealRule]] = [
    ({}, "1", Fixed(1)),
    ({"tokens_per_step": 3}, "3", Fixed(3)),
    ({"steps": 5, "tokens_per_step": 3}, "steps5", NumSteps(5)),
    ({"steps": 5, "schedule": "cosine"}, "steps5/cosine", CosineSteps(5)),
    ({"threshold": 0.9}, "threshold0.9", Threshold(0.9)),
    ({"threshold": 0.99999999}, "threshold0.99999999", Threshold(0.99999999)),
    ({"factor": 1.0}, "factor1", Factor(1.0)),
    ({"entropy_bound": 0.0}, "entropy0", EntropyBound(0.0)),
    ({"budget": 0.1}, "budget0.1", ErrorBudget(0.1)),
]


@pytest.mark.parametrize(("settings", "label", "rule"), AMOUNTS)
def test_how_much_a_step_reveals(settings: dict[str, object], label: str, rule: RevealRule) -> None:
    config = DecodeConfig(**settings)
    assert config.rule() == rule
    assert config.label == f"prob/{label}"


SETTINGS: list[dict[str, object]] = [
    {"order": "margin"},
    {"tokens_per_step": 3},
    {"steps": 5},
    {"steps": 5, "schedule": "cosine"},
    {"steps": 5, "remask": "p2"},
    {"steps": 5, "remask": "rcr"},
    {"steps": 5, "remask": "rcr", "remask_eta": 0.5},
    {"steps": 5, "remask": "remdm_cap"},
    {"steps": 5, "remask": "remdm_cap", "remask_eta": 0.5},
    {"threshold": 0.9},
    {"threshold": 0.9 + 1e-9},
    {"factor": 0.9},
    {"entropy_bound": 0.9},
    {"budget": 0.9},
    {"temperature": 1},
    {"temperature": 1, "top_k": 2},
    {"temperature": 1, "top_p": 0.5},
    {"forbid": [12]},
    {"forbid": [1, 2]},
    {"confidence_noise": 0.5},
    {"block_size": 4},
    {"block_size": 4, "reads_ahead": False},
    {"cache": "block"},
    {"block_size": 4, "cache": "prefix"},
    {"block_size": 4, "cache": "dual"},
    {"block_size": 4, "cache": "dual", "refresh_every": 4},
    {"stop_early": False},
    {"guidance": 1.5},
    {"loops": 3},
    {"seed": 7},
]


def test_labels_tell_decoders_apart() -> None:
    assert len({DecodeConfig(**settings).label for settings in SETTINGS}) == len(SETTINGS)
    assert {key for settings in SETTINGS for key in settings} == {*DecodeConfig.model_fields} - WITHOUT_LABEL
    assert DecodeConfig(forbid=[2, 1, 2]).label == DecodeConfig(forbid=[1, 2]).label == "prob/1/forbid1+2"
    assert DecodeConfig(cache="block").label == DecodeConfig().label  # the same tokens


WITHOUT_LABEL = {"dtype", "batch_size", "compile"}
"""Not what decides the result."""

IMPOSSIBLE: list[tuple[dict[str, object], str, dict[str, object]]] = [
    ({"schedule": "cosine"}, "schedule=cosine", {"steps": 5}),
    ({"remask": "p2"}, "remask=p2", {"steps": 5}),
    ({"remask": "rcr"}, "remask=rcr", {"steps": 5}),
    ({"remask_eta": 0.5, "steps": 5}, "remask_eta=0.5", {"remask": "p2"}),
    ({"remask": "p2", "steps": 5, "block_size": 4}, "remask=p2", {"block_size": None}),
    ({"remask": "p2", "steps": 5, "cache": "block"}, "remask=p2", {"cache": "none"}),
    ({"remask": "p2", "steps": 5, "order": "margin"}, "order=margin", {"order": "prob"}),
    ({"remask": "rcr", "steps": 5, "confidence_noise": 0.5}, "confidence_noise=0.5", {"confidence_noise": 0}),
    ({"reads_ahead": False}, "reads_ahead=False", {"block_size": 4}),
    ({"reads_ahead": False, "block_size": 4, "cache": "dual"}, "reads_ahead=False", {"cache": "none"}),
    ({"reads_ahead": False, "block_size": 4, "guidance": 1.0}, "reads_ahead=False", {"guidance": 0.0}),
    ({"guidance": 1.0, "cache": "block"}, "guidance=1.0", {"cache": "none"}),
    ({"top_k": 5}, "top_k=5", {"temperature": 1}),
    ({"top_p": 0.5}, "top_p=0.5", {"temperature": 1}),
    ({"cache": "prefix"}, "cache=prefix", {"block_size": 4}),
    ({"cache": "dual"}, "cache=dual", {"block_size": 4}),
    ({"refresh_every": 2}, "refresh_every=2", {"refresh_every": None}),
    ({"refresh_every": 2, "cache": "block"}, "refresh_every=2", {"refresh_every": None}),
    ({"steps": 5, "threshold": 0.9}, "steps=5 and decode.threshold=0.9", {"steps": None}),
]


@pytest.mark.parametrize(("settings", "named", "fix"), IMPOSSIBLE)
def test_what_cannot_be_had_together(settings: dict[str, object], named: str, fix: dict[str, object]) -> None:
    with pytest.raises(WrongSettings) as error:
        check_section(DecodeConfig, settings, "decode")
    assert str(error.value).startswith(f"decode.{named}")
    assert all(key in str(error.value) for key in fix)
    check_section(DecodeConfig, settings | fix, "decode")  # the fix is one


WRONG = [
    *({"threshold": value} for value in (0, 1.1)),
    *({"factor": value} for value in (0, -1)),
    {"entropy_bound": -0.1},
    {"top_k": 0, "temperature": 1},
    *({"top_p": value, "temperature": 1} for value in (0, 1.1)),
    {"forbid": [-1]},
    {"block_size": 0},
    {"schedule": "square", "steps": 3},
    {"remask": "often", "steps": 3},
    {"remask_eta": 1.5, "steps": 3, "remask": "p2"},
    {"guidance": -1},
    {"cache": "all"},
]


@pytest.mark.parametrize("settings", WRONG)
def test_values_that_cannot_be(settings: dict[str, object]) -> None:
    with pytest.raises(WrongSettings, match=f"decode.{next(iter(settings))}"):
        check_section(DecodeConfig, settings, "decode")
