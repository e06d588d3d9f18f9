import pytest

from unmask.errors import first_line


@pytest.mark.parametrize(
    ("said", "first"),
    [
        ("no compiler\nmore", "no compiler"),
        ("backend='inductor' raised:\n\n  no header\nmore", "backend='inductor' raised: no header"),
        ("it ends with:", "it ends with:"),
        ("", "ValueError"),
    ],
)
def test_the_first_line_has_the_reason(said: str, first: str) -> None:
    assert first_line(ValueError(said)) == first
