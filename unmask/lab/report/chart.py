"""Draws line charts as SVG that takes its colours from the page, so that one drawing serves light, dark and print.

Lines differ in dash and marker as well as in colour. (Libraries that can do this add megabytes to each page.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 420, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 24, 12, 44
NUM_STYLES = 6
"""Number of line styles: the classes `s0`, `s1`, .. of the page's style sheet."""


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
    """True to draw x on a logarithmic axis; it is 1 or more."""

    def svg(self) -> Markup:
        """Draws the chart; without points, says that there are no data."""
        points = [point for line in self.lines for each in (line.points, *line.seeds) for point in each]
        if not points:
            return Markup("<p>{} No data yet.</p>").format(self.title)
        x_ticks = self._x_ticks(max(x for x, _ in points))
        low = 0.0 if self.is_share else min(y for _, y in points)
        y_ticks = _ticks(low, max(y for _, y in points))
        scale = math.log2 if self.is_x_log2 else float
        frame = _Frame(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1], scale)
        parts = [
            *(frame.x_tick(x, _percent(x) if self.is_x_share else _short(x)) for x in x_ticks),
            *(frame.y_tick(y, _percent(y) if self.is_share else f"{y:g}") for y in y_ticks),
            *frame.labels(self.x_label, self.y_label),
            *(part for line in self.lines for seed in line.seeds for part in frame.seed(line, seed, self.is_share)),
            *(bar for line in self.lines for bar in frame.bars(line)),
            *(part for line in self.lines for part in frame.line(line, self.is_share)),
        ]
        head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, _HEIGHT, self.title)
        return head + Markup("").join(parts) + Markup("</svg>")

    def _x_ticks(self, high: float) -> list[float]:
        if self.is_x_log2:
            return [2.0**k for k in range(max(1, math.ceil(math.log2(high))) + 1)]
        return _ticks(0.0, 1.0 if self.is_x_share else high)


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
        return Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(at, foot + 16, text)

    def y_tick(self, value: float, text: str) -> Markup:
        at = self.y(value)
        grid = Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(_LEFT, at, _WIDTH - _RIGHT)
        label = '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
        return grid + Markup(label).format(_LEFT - 6, at + 4, text)

    def labels(self, x_label: str, y_label: str) -> list[Markup]:
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        below = '<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>'
        beside = '<text class="label" transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>'
        return [
            Markup(below).format((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label),
            Markup(beside).format(middle, y_label),
        ]

    def path(self, points: Points, kind: str) -> Markup:
        corners = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)
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
        marks = [self._mark(line, x, y, is_share, is_open=line.is_reference) for x, y in _thin(line.points)]
        return [self.path(line.points, kind), *marks]

    def _mark(self, line: Line, x: float, y: float, is_share: bool, *, is_open: bool) -> Markup:
        value = _percent(y, 1) if is_share else f"{y:.4g}"
        return _mark(line.style, self.x(x), self.y(y), f"{line.name}: {value} at {x:,.4g}", is_open)


def _thin(points: Points, most: int = 24) -> Points:
    """Picks the points that get a marker: few enough not to hide the line, the last one included."""
    every = max(1, math.ceil(len(points) / most))
    return points[::-every][::-1]


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Chooses round values that cover low .. high: multiples of 1, 2 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _percent(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{max(digits, 0 if 100 * value == round(100 * value) else 1)}f} %"


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
    shape = '<use href="#mark{}" class="{}" x="{:.1f}" y="{:.1f}" width="12" height="12"><title>{}</title></use>'
    return Markup(shape).format(number, kind, x - 6, y - 6, title)
