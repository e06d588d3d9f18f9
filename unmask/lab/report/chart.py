"""Draws line charts as SVG that takes its colours from the page, so that one drawing serves light, dark and print.

Lines differ in dash and marker as well as in colour. (Libraries that can do this add megabytes to each page.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from markupsafe import Markup, escape

from unmask.formats import printable

T = TypeVar("T")
Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 420, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 24, 12, 44
NUM_STYLES = 6
"""Number of line styles: the classes `s0`, `s1`, .. of the page's style sheet."""
LARGEST = 1e100
"""Largest size of a number that is drawn: beyond it, sums and squares could overflow."""
_MOST_POINTS = 2000
"""Most corners of a line: more than the drawing has dots."""


def shown(value: object) -> Markup:
    """Makes HTML of anything that a page shows, which may come from a stranger's file. The only way onto a page."""
    return value if isinstance(value, Markup) else escape(printable(str(value)))


def is_drawable(value: int | float) -> bool:
    """True for finite numbers of at most `LARGEST`."""
    return -LARGEST <= value <= LARGEST


@dataclass(frozen=True)
class Line:
    """A named line; `style` is the number of the method."""

    name: str
    style: int
    points: Points
    seeds: Sequence[Points] = ()
    """Lines drawn faintly behind the line itself."""
    is_reference: bool = False
    """True to draw it thin, with open markers, as the reference that others are compared with."""
    errors: Sequence[float] = ()
    """Standard error of each point's y: drawn as bars above and below, cut off at the frame."""


@dataclass(frozen=True)
class Level:
    """A named value across the whole chart, that lines are held against."""

    name: str
    y: float


@dataclass(frozen=True)
class Chart:
    """A line chart."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    is_share: bool = False
    """True if y is between 0 and 1, to be written in percent."""
    is_x_share: bool = False
    """True if x is between 0 and 1, to be written in percent."""
    is_x_log2: bool = False
    """True to draw x on a logarithmic axis; points whose x is below 1 are left out."""
    level: Level | None = None

    def svg(self) -> Markup:
        """Draws the chart, and says how many points cannot be drawn; without points, says that there are no data."""
        lines = [self._drawable(line) for line in self.lines]
        num_left_out = sum(map(_num_points, self.lines)) - sum(map(_num_points, lines))
        words = Markup('<p class="dim">{}: numbers that cannot be drawn, {} in all.</p>')
        note = words.format(shown(self.title), num_left_out) if num_left_out else Markup("")
        points = [point for line in lines for each in (line.points, *line.seeds) for point in each]
        if not points:
            return Markup("<p>{} No data yet.</p>").format(shown(self.title)) + note
        x_ticks = self._x_ticks(min(x for x, _ in points), max(x for x, _ in points))
        levels = [self.level] if self.level is not None and is_drawable(self.level.y) else []
        heights = [y for _, y in points] + [level.y for level in levels]
        low = min(heights)
        y_ticks = _ticks(min(0.0, low) if self.is_share else low, max(heights))
        scale = math.log2 if self.is_x_log2 else float
        frame = _Frame(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1], scale)
        parts = [
            *(frame.x_tick(x, _percent(x) if self.is_x_share else _short(x)) for x in x_ticks),
            *(frame.y_tick(y, _percent(y) if self.is_share else f"{y:g}") for y in y_ticks),
            *frame.labels(self.x_label, self.y_label),
            *(frame.level(level, self.is_share) for level in levels),
            *(part for line in lines for seed in line.seeds for part in frame.seed(line, seed, self.is_share)),
            *(bar for line in lines for bar in frame.bars(line)),
            *(part for line in lines for part in frame.line(line, self.is_share)),
        ]
        head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">')
        return head.format(_WIDTH, _HEIGHT, shown(self.title)) + Markup("").join(parts) + Markup("</svg>") + note

    def _drawable(self, line: Line) -> Line:
        """Leaves out the points that cannot be drawn; an error that cannot be is none."""
        least = 1.0 if self.is_x_log2 else -LARGEST

        def can_be(point: tuple[float, float]) -> bool:
            return is_drawable(point[0]) and point[0] >= least and is_drawable(point[1])

        errors = [
            error if is_drawable(error) else 0.0
            for point, error in zip(line.points if line.errors else (), line.errors, strict=True)
            if can_be(point)
        ]
        seeds = [list(filter(can_be, seed)) for seed in line.seeds]
        return replace(line, points=list(filter(can_be, line.points)), seeds=seeds, errors=errors)

    def _x_ticks(self, low: float, high: float) -> list[float]:
        if self.is_x_log2:
            steps = max(1, math.ceil(math.log2(high)))
            every = max(1, steps // 8)
            return [2.0**k for k in range(0, steps + every, every)]
        return _ticks(min(0.0, low), max(1.0, high) if self.is_x_share else high)


@dataclass(frozen=True)
class _Frame:
    """The mapping from values to places in the drawing."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    x_scale: Callable[[float], float] = float

    def x(self, value: float) -> float:
        at, low, high = map(self.x_scale, (value, self.x_low, self.x_high))
        return _LEFT + (at - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (_HEIGHT - _TOP - _BOTTOM)

    def x_tick(self, value: float, text: str) -> Markup:
        at, foot = self.x(value), _HEIGHT - _BOTTOM
        return Markup(f'<text class="tick" x="{at:.1f}" y="{foot + 16}" text-anchor="middle">{shown(text)}</text>')

    def y_tick(self, value: float, text: str) -> Markup:
        at = self.y(value)
        label = f'<text class="tick" x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{shown(text)}</text>'
        return Markup(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>{label}')

    def labels(self, x_label: str, y_label: str) -> list[Markup]:
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        below = '<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>'
        beside = '<text class="label" transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>'
        return [
            Markup(below).format((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, shown(x_label)),
            Markup(beside).format(middle, shown(y_label)),
        ]

    def level(self, level: Level, is_share: bool) -> Markup:
        """Draws a line across the chart, with its name and value above the right end, or below the chart's top."""
        at, right = self.y(level.y), _WIDTH - _RIGHT
        beside = at + 13 if at < _TOP + 12 else at - 4
        text = shown(f"{level.name} {_value(level.y, is_share)}")
        label = f'<text class="tick" x="{right}" y="{beside:.1f}" text-anchor="end">{text}</text>'
        return Markup(f'<path class="level" d="M{_LEFT} {at:.1f}H{right}"/>{label}')

    def path(self, points: Points, kind: str) -> Markup:
        corners = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in _outline(points))
        return Markup('<path class="{}" d="M{}"/>').format(kind, corners) if corners else Markup("")

    def bars(self, line: Line) -> list[Markup]:
        """Draws error bars: one standard error up and down."""
        ends = [
            ((x, max(self.y_low, y - error)), (x, min(self.y_high, y + error)))
            for (x, y), error in zip(line.points if line.errors else (), line.errors, strict=True)
        ]
        return [self.path(each, f"bar s{line.style % NUM_STYLES}") for each in ends]

    def seed(self, line: Line, points: Points, is_share: bool) -> list[Markup]:
        """Draws a thin line; a single point, whose path would be invisible, becomes a marker."""
        alone = points if len(points) == 1 else ()
        marks = [self._mark(line, x, y, is_share, is_open=True) for x, y in alone]
        return [self.path(points, f"seed s{line.style % NUM_STYLES}"), *marks]

    def line(self, line: Line, is_share: bool) -> list[Markup]:
        kind = f"line s{line.style % NUM_STYLES}" + (" reference" if line.is_reference else "")
        marks = [self._mark(line, x, y, is_share, is_open=line.is_reference) for x, y in thin(line.points, most=24)]
        return [self.path(line.points, kind), *marks]

    def _mark(self, line: Line, x: float, y: float, is_share: bool, *, is_open: bool) -> Markup:
        value = _value(y, is_share)
        return _mark(line.style, self.x(x), self.y(y), f"{line.name}: {value} at {x:,.4g}", is_open)


def _num_points(line: Line) -> int:
    return len(line.points) + sum(map(len, line.seeds))


def _outline(points: Points) -> Points:
    """Picks few enough points of a long line: the ends, and the lowest and the highest of each stretch."""
    if len(points) <= _MOST_POINTS:
        return points
    every = math.ceil(2 * len(points) / _MOST_POINTS)
    picked = {0, len(points) - 1}
    for start in range(0, len(points), every):
        stretch = range(start, min(start + every, len(points)))
        picked |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(picked)]


def thin(values: Sequence[T], most: int) -> Sequence[T]:
    """Picks at most `most` values at equal distances, the last included: so many markers do not hide a line, say."""
    every = max(1, math.ceil(len(values) / most))
    return values[::-every][::-1]


def _ticks(low: float, high: float) -> list[float]:
    """Chooses some five round values that cover low .. high: multiples of 1, 2 or 5 times a power of ten."""
    # Not so narrow that neighbouring ticks are one number.
    span = max(high - low, 1e-9 * max(abs(low), abs(high))) if high > low else abs(high) or 1.0
    span = max(span, 1e-290)
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, max(last, first + 1) + 1)]


def _percent(value: float, digits: int = 0) -> str:
    if abs(value) >= 1e4:
        return f"{100 * value:g} %"
    return f"{100 * value:.{max(digits, 0 if 100 * value == round(100 * value) else 1)}f} %"


def _value(value: float, is_share: bool) -> str:
    return _percent(value, 1) if is_share else f"{value:.4g}"


def _short(value: float) -> str:
    """Formats 1200000 as 1.2M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def legend_mark(style: int) -> Markup:
    """Draws a line's dash and marker, to stand beside its name."""
    head = Markup('<svg class="key" viewBox="0 0 44 14" aria-hidden="true"><path class="line s{}" d="M2 7H42"/>')
    return head.format(style % NUM_STYLES) + _mark(style, 22.0, 7.0) + Markup("</svg>")


def _mark(style: int, x: float, y: float, title: str = "", is_open: bool = False) -> Markup:
    number = style % NUM_STYLES
    kind = f"mark s{number}" + (" reference" if is_open else "")
    place = f'x="{x - 6:.1f}" y="{y - 6:.1f}" width="12" height="12"'
    return Markup(f'<use href="#mark{number}" class="{kind}" {place}><title>{shown(title)}</title></use>')
