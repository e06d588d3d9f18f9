import pytest
import torch

from unmask.models import precision


def test_auto_takes_bf16_only_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for has_bf16, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(precision, "_cpu_has_bf16", lambda has=has_bf16: has)
        assert precision.resolve_dtype("auto", cpu) == expected
        assert precision.resolve_dtype("float64", cpu) == "float64"


def test_autocast_rounds_products_and_keeps_parameters() -> None:
    layer = torch.nn.Linear(4, 4)
    with precision.autocast("bfloat16", torch.device("cpu")):
        assert layer(torch.randn(2, 4)).dtype == torch.bfloat16
    assert layer.weight.dtype == precision.parameter_dtype("bfloat16") == torch.float32
    with precision.autocast("float32", torch.device("cpu")):
        assert layer(torch.randn(2, 4)).dtype == torch.float32
