"""Error curves as a picture, one panel per group: SVG, or PNG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from compress.prune.method import Curves
from rescompress.core.artifact import atomic_path, write_text

_W, _H, _PAD, _COLUMNS = 190, 120, 34, 5
_SCALE = 2
"""Pixels of the PNG per unit of the SVG."""


@dataclass(frozen=True)
class _Panel:
    """Where one group is drawn: corner, name, and the points of its curve."""

    x: float
    y: float
    title: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class _Layout:
    width: int
    height: int
    low: str
    high: str
    panels: list[_Panel]


def draw(curves: Curves, title: str, path: Path) -> None:
    """Write the picture of some curves; the suffix of `path` says which kind: ``.png``, else SVG.

    Args:
        curves: Of one network.
        title: Shown on top.
        path: The file, written whole or not at all.
    """
    if path.suffix.lower() != ".png":
        write_text(path, svg(curves, title))
        return
    from PIL import Image, ImageDraw, ImageFont

    layout = _layout(curves)
    image = Image.new("RGB", (layout.width * _SCALE, layout.height * _SCALE), "#fff")
    pen = ImageDraw.Draw(image)
    small, large = (ImageFont.load_default(size * _SCALE) for size in (10, 15))

    def at(x: float, y: float) -> tuple[float, float]:
        return x * _SCALE, y * _SCALE

    pen.text(at(_PAD, 8), title, fill="#000", font=large)
    pen.text(at(_PAD, 28), _caption(curves), fill="#555", font=small)
    for panel in layout.panels:
        x, y = panel.x, panel.y
        pen.rectangle([at(x, y), at(x + _W, y + _H)], fill="#f6f7f9", outline="#ccd")
        pen.line([at(x + _W / 2, y), at(x + _W / 2, y + _H)], fill="#dde", width=_SCALE)
        pen.text(at(x, y - 3), panel.title, fill="#000", font=small, anchor="lb")
        pen.text(at(x + _W - 3, y + 2), layout.high, fill="#888", font=small, anchor="rt")
        pen.text(at(x + _W - 3, y + _H - 2), layout.low, fill="#888", font=small, anchor="rb")
        pen.line([at(px, py) for px, py in panel.points], fill="#2563eb", width=2 * _SCALE, joint="curve")
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def svg(curves: Curves, title: str) -> str:
    """Return an SVG with the error of every group over the fraction of its channels that is gone.

    All panels share one logarithmic axis, so a network's soft places are the panels whose curve stays low.

    Args:
        curves: Of one network.
        title: Shown on top.
    """
    layout = _layout(curves)
    size = f"{layout.width} {layout.height}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="10">',
        f'<rect width="{layout.width}" height="{layout.height}" fill="#fff"/>',
        f'<text x="{_PAD}" y="22" font-size="15">{escape(title)}</text>',
        f'<text x="{_PAD}" y="38" fill="#555">{escape(_caption(curves))}</text>',
    ]
    for panel in layout.panels:
        x, y = panel.x, panel.y
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in panel.points)
        parts.append(f'<rect x="{x}" y="{y}" width="{_W}" height="{_H}" fill="#f6f7f9" stroke="#ccd"/>')
        parts.append(f'<line x1="{x + _W / 2}" y1="{y}" x2="{x + _W / 2}" y2="{y + _H}" stroke="#dde"/>')
        parts.append(f'<text x="{x}" y="{y - 4}">{escape(panel.title)}</text>')
        parts.append(f'<text x="{x + _W}" y="{y + 10}" text-anchor="end" fill="#888">{layout.high}</text>')
        parts.append(f'<text x="{x + _W}" y="{y + _H - 3}" text-anchor="end" fill="#888">{layout.low}</text>')
        parts.append(f'<polyline fill="none" stroke="#2563eb" stroke-width="1.8" points="{points}"/>')
    return "\n".join([*parts, "</svg>", ""])


def _caption(curves: Curves) -> str:
    return f"{curves.unit}, over the fraction of channels removed"


def _layout(curves: Curves) -> _Layout:
    positive = [e for c in curves.groups.values() for e in c.error if e > 0]
    high = math.ceil(math.log10(max(positive, default=1.0)))
    low = max(math.floor(math.log10(min(positive, default=1.0))), high - 6)
    rows = -(-len(curves.groups) // _COLUMNS)
    width, height = _COLUMNS * (_W + _PAD) + _PAD, rows * (_H + _PAD + 12) + 70
    return _Layout(width, height, f"1e{low}", f"1e{high}", list(_panels(curves, low, high)))


def _panels(curves: Curves, low: int, high: int) -> Iterator[_Panel]:
    for i, (name, curve) in enumerate(curves.groups.items()):
        x0 = _PAD + i % _COLUMNS * (_W + _PAD)
        y0 = 62 + i // _COLUMNS * (_H + _PAD + 12)
        units = len(curve.order)
        points = []
        for k in range(1, units):
            level = (math.log10(max(curve.error[k], 10.0**low)) - low) / max(high - low, 1)
            points.append((x0 + k / units * _W, y0 + (1 - min(max(level, 0.0), 1.0)) * _H))
        yield _Panel(x0, y0, f"{name} ({units})", points)
