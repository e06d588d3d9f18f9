"""Charts: what is drawn lies where its values say."""

import re
from itertools import pairwise

import pytest

from unmask.lab.report.chart import Chart, Line, _ticks


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.0, 0.03), (0.0, 7200.0), (0.36, 2.2), (5.0, 5.0), (0.0, 921_600.0), (-3.0, 4.0)]
)
def test_ticks_are_round_and_cover_the_values(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8
    steps = {round(b - a, 9) for a, b in pairwise(ticks)}
    assert len(steps) == 1
    digits = f"{steps.pop():.3e}"
    assert float(digits[:5]) in (1, 2, 5)


def test_points_lie_in_proportion() -> None:
    svg = Chart("a", "x", "y", [Line("one", 1, [(0.0, 0.0), (50.0, 0.5), (100.0, 1.0)])], is_share=True).svg()
    marks = re.findall(r'<use href="#mark1" class="mark s1" x="([\d.]+)" y="([\d.]+)"', svg)
    (x0, y0), (x1, y1), (x2, y2) = [(float(x), float(y)) for x, y in marks]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert x0 < x2
    assert y0 > y2
    assert "one: 50.0 % at 50" in svg


def test_names_are_text() -> None:
    svg = Chart("<b>", "x", "y", [Line("<script>", 0, [(1.0, 1.0)])]).svg()
    assert "<script>" not in svg
    assert "&lt;script&gt;" in svg


def test_a_chart_without_points_says_so() -> None:
    assert "No data yet" in Chart("Nothing.", "x", "y", [Line("one", 0, [])]).svg()


def test_a_logarithmic_axis_has_powers_of_two_at_equal_distances() -> None:
    svg = Chart("a", "x", "y", [Line("one", 0, [(1.0, 0.0), (2.0, 1.0), (8.0, 1.0)])], is_x_log2=True).svg()
    first, second, last = (float(x) for x in re.findall(r'<use href="#mark0" class="mark s0" x="([\d.]+)"', svg))
    assert last - first == pytest.approx(3 * (second - first), abs=0.3)
    assert [text for text in ("1", "2", "4", "8") if f'text-anchor="middle">{text}</text>' in svg] == [
        "1",
        "2",
        "4",
        "8",
    ]


def test_bars_are_as_long_as_the_errors_and_stay_in_the_frame() -> None:
    svg = Chart("a", "x", "y", [Line("one", 0, [(0.0, 0.0), (1.0, 0.5), (2.0, 1.0)], errors=[0.1, 0.2, 9.0])]).svg()
    bars = re.findall(r'<path class="bar s0" d="M[\d.]+ ([\d.]+)L[\d.]+ ([\d.]+)"', svg)
    low, middle, high = (float(start) - float(end) for start, end in bars)
    assert middle == pytest.approx(4 * low, abs=0.5)  # of the first, the frame cuts off the lower half
    assert high == pytest.approx(10 * low, abs=1.5)  # from the bottom of the frame to its top
