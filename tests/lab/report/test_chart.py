"""Charts: what is drawn lies where its values say."""

import re
from itertools import pairwise

import pytest

from unmask.lab.report.chart import Chart, Level, Line, _ticks


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


@pytest.mark.parametrize(("low", "high"), [(0.965, 0.985), (-0.975, -0.95), (99.9, 100.1), (0.0001, 0.0012)])
def test_numbers_on_the_y_axis_are_clear_of_its_title(low: float, high: float) -> None:
    """The title takes the first 16 pixels; a digit is 6 to 6.5 of them wide."""
    svg = Chart("a", "x", "y", [Line("one", 0, [(0.0, low), (1.0, high)])]).svg()
    ends = re.findall(r'x="(\d+)" y="[\d.]+" text-anchor="end">([^<]+)<', svg)
    assert max(len(text) for _, text in ends) >= 5
    assert all(int(end) - 6.3 * len(text) >= 18 for end, text in ends)


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


def test_a_level_crosses_the_chart_at_its_height() -> None:
    """Also where no line comes that far; a number that cannot be drawn is no level."""
    lines = [Line("one", 0, [(0.0, 0.3), (1.0, 0.4)])]
    svg = Chart("a", "x", "y", lines, is_share=True, level=Level("by chance", 0.75)).svg()
    (height,) = re.findall(r'<path class="level" d="M66 ([\d.]+)H396"/>', svg)
    ticks = dict(re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+) %<', svg))
    by_share = {float(share): float(y) - 4 for y, share in ticks.items()}
    assert max(by_share) >= 75
    bottom, top = by_share[0.0], by_share[max(by_share)]
    assert (bottom - float(height)) / (bottom - top) == pytest.approx(75 / max(by_share), abs=0.002)  # of 0.1 pixels
    assert "by chance 75.0 %" in svg
    assert "level" not in Chart("a", "x", "y", lines, level=Level("real text", 1e300)).svg()


INF = float("inf")


@pytest.mark.parametrize("kind", [{}, {"is_share": True}, {"is_x_share": True}, {"is_x_log2": True}], ids=str)
@pytest.mark.parametrize(
    "points",
    [
        [(0.0, 1e308), (1.0, -1e308), (2.0, float("nan")), (3.0, INF)],
        [(1.0, 1e99), (2.0, -1e99)],
        [(1.0, 1e-320), (2.0, 0.0)],
        [(1.0, 5.0), (2.0, 5.000000000000001)],
        [(1e17, 1.0), (1e17 + 16, 2.0)],
        [(1e-320, 1e-319)],
        [(-5.0, -1.0), (-INF, 0.0)],
        [(1e100, 1.0)],
    ],
    ids=str,
)
def test_any_number_is_drawn_in_the_frame_or_named(points: list[tuple[float, float]], kind: dict[str, bool]) -> None:
    svg = Chart(
        "a", "x", "y", [Line("one", 0, points, seeds=[points], errors=[INF, -1.0, 0.1, 0.1][: len(points)])], **kind
    ).svg()
    assert "nan" not in svg
    assert "inf" not in svg
    drawn = svg.count("<title>")
    left_out = re.findall(r"cannot be drawn, (\d+) in all", svg)
    assert drawn >= 1 or left_out
    for x, y in re.findall(r'<use href="#mark0" class="[^"]*" x="(.*?)" y="(.*?)"', svg):
        assert -6 <= float(x) <= 420
        assert -6 <= float(y) <= 280


def test_a_long_line_keeps_its_peaks() -> None:
    points = [(float(n), 1.0 if n == 70_001 else 0.0) for n in range(100_000)]
    (path,) = re.findall(
        r'<path class="line s0" d="M(.*?)"', Chart("a", "x", "y", [Line("one", 0, points)], is_share=True).svg()
    )
    places = [tuple(map(float, place.split())) for place in path.split("L")]
    assert len(places) <= 2100
    assert min(y for _, y in places) == 12.0  # the top of the frame
    assert (places[0][0], places[-1][0]) == (66.0, 396.0)
