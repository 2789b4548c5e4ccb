"""Charts as SVG text: scatter, bars, small curves, lines. Colours come from the page's style, so light and dark both work.

Every chart is about 420 units wide, so that its letters stay readable on a telephone, and carries a title and a
description for those who do not see it; the page adds the figures as a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal

from rescompress.show.report.markup import Markup, html, joined

Tone = Literal["plain", "base"]
Shape = Literal["circle", "diamond", "square"]

WIDTH = 420
LETTER = 6.3
"""Width of a letter of the charts' 11-unit type, for placing labels."""


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Attributes:
        title: What it shows, with the unit.
        text: A tick's value as people read it.
        from_zero: Whether it starts at zero, unless every value is far from it.
    """

    title: str
    text: Callable[[float], str]
    from_zero: bool = False


@dataclass(frozen=True)
class Point:
    """One mark of a scatter chart.

    Attributes:
        x: Cost.
        y: Accuracy.
        label: Beside the mark.
        told: Read out and shown when pointed at.
        y_interval: 95 % interval of `y`.
        x_band: Band of `x`.
        shape: By provenance: circle measured or counted, diamond predicted, square published.
        tone: ``base`` for the dense network.
        family: Points of one family may be compared; each has a front of its own.
    """

    x: float
    y: float
    label: str
    told: str
    y_interval: tuple[float, float] | None = None
    x_band: tuple[float, float] | None = None
    shape: Shape = "circle"
    tone: Tone = "plain"
    family: Hashable = None


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from `low` to `high`, at most `most` + 1 of them.

    Args:
        low: Smallest value shown.
        high: Largest, above `low`.
        most: Steps.
    """
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _extent(values: Sequence[float], *, from_zero: bool, room: float = 0.08) -> tuple[float, float]:
    low, high = min(values), max(values)
    if from_zero and 0 <= low <= high / 2:
        return 0.0, (high * (1 + room)) or 1.0
    span = (high - low) or abs(high) * 0.1 or 1.0
    return low - room * span, high + room * span


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _open(name: str, height: float, title: str, description: str, width: float = WIDTH) -> list[Markup]:
    return [
        html(
            '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="{}-t {}-d">',
            *(_number(width), _number(height), name, name),
        ),
        html('<title id="{}-t">{}</title><desc id="{}-d">{}</desc>', name, title, name, description),
    ]


_CLOSE = Markup("</svg>")
_END = Markup("</g>")


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "tick") -> Markup:
    return html('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>', kind, _number(x), _number(y), anchor, text)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return html('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>', kind, *map(_number, (x1, y1, x2, y2)))


def _path(kind: str, d: str) -> Markup:
    return html('<path class="{}" d="{}"/>', kind, d)


def _circle(x: float, y: float, radius: int) -> Markup:
    return html('<circle cx="{}" cy="{}" r="{}"/>', _number(x), _number(y), radius)


def _rect(kind: str, x: float, y: float, width: float, height: int) -> Markup:
    return html('<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>', kind, *map(_number, (x, y, width, height)))


@dataclass(frozen=True)
class _Frame:
    """A plot area and its scales."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + self.width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.top + self.height * (1 - (value - low) / (high - low))

    def grid(self, x_axis: Axis, y_axis: Axis) -> list[Markup]:
        bottom = self.top + self.height
        parts = []
        for value in ticks(*self.y_range, 5):
            parts.append(_line(self.left, self.y(value), self.left + self.width, self.y(value), "grid"))
            parts.append(_text(self.left - 6, self.y(value) + 4, y_axis.text(value), anchor="end"))
        for value in ticks(*self.x_range, 5):
            parts.append(_line(self.x(value), bottom, self.x(value), bottom + 4, "axis"))
            parts.append(_text(self.x(value), bottom + 16, x_axis.text(value), anchor="middle"))
        parts.append(_line(self.left, bottom, self.left + self.width, bottom, "axis"))
        parts.append(_text(self.left + self.width / 2, bottom + 33, x_axis.title, anchor="middle", kind="axis-title"))
        parts.append(_text(self.left - 44, self.top - 8, y_axis.title, kind="axis-title"))
        return parts


def scatter(name: str, title: str, description: str, points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> Markup:
    """Return a scatter chart with the Pareto front of each family drawn as steps.

    Args:
        name: Unique in the page.
        title: Read out.
        description: Read out.
        points: At least one.
        x_axis: Less is better.
        y_axis: More is better.
    """
    height, left, top, right, bottom = 300.0, 50.0, 26.0, 28.0, 42.0
    xs = [v for p in points for v in (p.x, *(p.x_band or ()))]
    ys = [v for p in points for v in (p.y, *(p.y_interval or ()))]
    frame = _Frame(
        left,
        top,
        WIDTH - left - right,
        height - top - bottom,
        _extent(xs, from_zero=x_axis.from_zero),
        _extent(ys, from_zero=y_axis.from_zero),
    )
    parts = _open(name, height, title, description)
    parts += frame.grid(x_axis, y_axis)
    families: dict[Hashable, list[Point]] = {}
    for point in points:
        families.setdefault(point.family, []).append(point)
    fronts = [_front(family) for family in families.values()]
    for front in fronts:
        steps = [f"M{_number(frame.x(front[0].x))} {_number(frame.y(front[0].y))}"]
        for point in front[1:]:
            steps.append(f"H{_number(frame.x(point.x))}V{_number(frame.y(point.y))}")
        if len(front) > 1:
            parts.append(_path("front", "".join(steps)))
    for point in points:
        parts += _mark(point, frame)
    parts += _labels(points, fronts, frame)
    return joined([*parts, _CLOSE])


def _front(points: Sequence[Point]) -> list[Point]:
    """Return the Pareto front from the cheapest on."""
    front: list[Point] = []
    best = -math.inf
    for _, same in groupby(sorted(points, key=lambda p: (p.x, -p.y)), key=lambda p: p.x):
        column = list(same)
        if column[0].y > best:
            best = column[0].y
            front += [p for p in column if p.y == best]
    return front


def _mark(point: Point, frame: _Frame) -> list[Markup]:
    x, y = frame.x(point.x), frame.y(point.y)
    parts = [html('<g class="mark {} {}"><title>{}</title>', point.tone, point.shape, point.told)]
    if point.y_interval is not None:
        parts.append(_line(x, frame.y(point.y_interval[0]), x, frame.y(point.y_interval[1]), "error"))
    if point.x_band is not None:
        parts.append(_line(frame.x(point.x_band[0]), y, frame.x(point.x_band[1]), y, "error"))
    if point.shape == "diamond":
        parts.append(html('<path d="M{} {}l6 6l-6 6l-6-6z"/>', _number(x), _number(y - 6)))
    elif point.shape == "square":
        parts.append(html('<rect x="{}" y="{}" width="9" height="9"/>', _number(x - 4.5), _number(y - 4.5)))
    else:
        parts.append(_circle(x, y, 5))
    return [*parts, _END]


def _labels(points: Sequence[Point], fronts: Sequence[Sequence[Point]], frame: _Frame) -> list[Markup]:
    """Return the labels, each on the side of its mark where it covers least."""
    taken = [(frame.x(p.x) - 6, frame.y(p.y) - 6, 12.0, 12.0) for p in points]
    for point in points:
        if point.y_interval is not None:
            bottom, top = (frame.y(v) for v in point.y_interval)
            taken.append((frame.x(point.x) - 2, top, 4.0, bottom - top))
    for a, b in (pair for front in fronts for pair in pairwise(front)):
        taken.append((frame.x(a.x), frame.y(a.y) - 2, frame.x(b.x) - frame.x(a.x), 4.0))
    parts = []
    for point in sorted((p for p in points if p.label), key=lambda p: p.x):
        x, y, width = frame.x(point.x), frame.y(point.y), LETTER * len(point.label)
        choices = [
            (x + 9, y + 4, "start", (x + 9, y - 7)),
            (x - 9, y + 4, "end", (x - 9 - width, y - 7)),
            (x + 5, y - 9, "start", (x + 5, y - 19)),
            (x + 5, y + 17, "start", (x + 5, y + 7)),
            (x - 5, y - 9, "end", (x - 5 - width, y - 19)),
            (x - 5, y + 17, "end", (x - 5 - width, y + 7)),
            (x, y - 20, "middle", (x - width / 2, y - 30)),
            (x, y + 28, "middle", (x - width / 2, y + 18)),
        ]

        def covered(choice: tuple[float, float, str, tuple[float, float]], width: float = width) -> float:
            left, top = choice[3]
            outside = max(0.0, frame.left - left) + max(0.0, left + width - WIDTH) + max(0.0, 10 - top)
            outside += max(0.0, top + 12 - frame.top - frame.height)
            return 40 * outside + sum(_overlap((left, top, width, 12.0), box) for box in taken)

        at = min(choices, key=covered)
        taken.append((*at[3], width, 12.0))
        parts.append(_text(at[0], at[1], point.label, anchor=at[2], kind="label"))
    return parts


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return across * down if across > 0 and down > 0 else 0.0


@dataclass(frozen=True)
class Bar:
    """One bar: a value, and the value before, drawn behind it.

    Attributes:
        label: On the left.
        value: Length.
        before: Length of the paler bar behind.
        text: On the right.
    """

    label: str
    value: float
    before: float | None
    text: str


def bars(name: str, title: str, description: str, rows: Sequence[Bar]) -> Markup:
    """Return horizontal bars, one row each, in the order given."""
    step = 20.0
    label_width = min(150.0, 8 + LETTER * max(len(_short(r.label)) for r in rows))
    text_width = 8 + LETTER * max(len(r.text) for r in rows)
    room = WIDTH - label_width - text_width
    most = max(max(r.value, r.before or 0.0) for r in rows) or 1.0
    parts = _open(name, step * len(rows) + 4, title, description)
    for i, row in enumerate(rows):
        y = step * i + 2
        parts.append(html("<g><title>{}: {}</title>", row.label, row.text))
        parts.append(_text(label_width - 6, y + 13, _short(row.label), anchor="end"))
        if row.before is not None:
            parts.append(_rect("before", label_width, y + 1, room * row.before / most, 15))
        parts.append(_rect("after", label_width, y + 4, room * row.value / most, 9))
        parts.append(_text(label_width + room * max(row.value, row.before or 0.0) / most + 6, y + 13, row.text))
        parts.append(_END)
    return joined([*parts, _CLOSE])


def _short(label: str) -> str:
    return label if len(label) <= 22 else "…" + label[-21:]


def curve(name: str, label: str, errors: Sequence[float], chosen: int | None, extent: tuple[float, float]) -> Markup:
    """Return one small error curve on a logarithmic scale, with a mark at what was removed.

    Args:
        name: Unique in the page.
        label: The group.
        errors: Error of removing 0, 1, 2, ... channels.
        chosen: How many were removed, or None if unknown.
        extent: Least and greatest error of the scale, both above zero.
    """
    width, height, top, bottom = 150.0, 92.0, 18.0, 14.0
    low, high = (math.log10(e) for e in extent)
    last = max(len(errors) - 1, 1)

    def place(k: int) -> tuple[float, float]:
        share = (math.log10(max(errors[k], extent[0])) - low) / ((high - low) or 1.0)
        return 4 + (width - 8) * k / last, top + (height - top - bottom) * (1 - min(max(share, 0.0), 1.0))

    described = f"Error from {errors[0]:.2g} with nothing removed to {errors[-1]:.2g} with {len(errors) - 1} removed."
    if chosen is not None and chosen < len(errors):
        described += f" {chosen} were removed, at an error of {errors[chosen]:.2g}."
    parts = _open(name, height, f"Error curve of {label}", described, width)
    parts.append(_text(4, 11, _short(label), kind="label"))
    path = "".join(f"{'L' if k else 'M'}{_number(x)} {_number(y)}" for k, (x, y) in enumerate(map(place, range(len(errors)))))
    base = height - bottom
    parts.append(_line(4, base, width - 4, base, "axis"))
    parts.append(_path("curve", path))
    if chosen is not None and chosen < len(errors):
        x, y = place(chosen)
        parts.append(_line(x, y, x, base, "error"))
        parts += [Markup('<g class="mark front">'), _circle(x, y, 4), _END]
    parts.append(_text(4, height - 3, "0"))
    parts.append(_text(width - 4, height - 3, f"{len(errors) - 1} removed", anchor="end"))
    return joined([*parts, _CLOSE])


def lines(
    name: str,
    title: str,
    description: str,
    values: Sequence[tuple[float, float, str]],
    x_axis: Axis,
    y_axis: Axis,
) -> Markup:
    """Return a line through (x, y, what is told) triples.

    Args:
        name: Unique in the page.
        title: Read out.
        description: Read out.
        values: In order of x; at least one.
        x_axis: Time, epochs, runs.
        y_axis: The figure.
    """
    height, left, top, right, bottom = 210.0, 50.0, 26.0, 20.0, 42.0
    xs, ys = [v[0] for v in values], [v[1] for v in values]
    frame = _Frame(
        left,
        top,
        WIDTH - left - right,
        height - top - bottom,
        _extent(xs, from_zero=False, room=0.03),
        _extent(ys, from_zero=y_axis.from_zero),
    )
    parts = _open(name, height, title, description)
    parts += frame.grid(x_axis, y_axis)
    path = "".join(f"{'L' if i else 'M'}{_number(frame.x(x))} {_number(frame.y(y))}" for i, (x, y, _) in enumerate(values))
    parts.append(_path("curve", path))
    radius = 4 if len(values) <= 60 else 2
    for x, y, told in values:
        parts += [html('<g class="mark plain"><title>{}</title>', told), _circle(frame.x(x), frame.y(y), radius), _END]
    return joined([*parts, _CLOSE])
