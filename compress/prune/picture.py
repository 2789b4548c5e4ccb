"""Error curves as a picture: SVG, one panel per group."""

from __future__ import annotations

import math
from html import escape

from compress.prune.method import Curves

_W, _H, _PAD, _COLUMNS = 190, 120, 34, 5


def svg(curves: Curves, title: str) -> str:
    """Return an SVG with the error of every group over the fraction of its channels that is gone.

    All panels share one logarithmic axis, so a network's soft places are the panels whose curve stays low.

    Args:
        curves: Of one network.
        title: Shown on top.
    """
    positive = [e for c in curves.groups.values() for e in c.error if e > 0]
    high = math.ceil(math.log10(max(positive, default=1.0)))
    low = max(math.floor(math.log10(min(positive, default=1.0))), high - 6)
    rows = -(-len(curves.groups) // _COLUMNS)
    width, height = _COLUMNS * (_W + _PAD) + _PAD, rows * (_H + _PAD + 12) + 70
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{_PAD}" y="22" font-size="15">{escape(title)}</text>',
        f'<text x="{_PAD}" y="38" fill="#555">{escape(curves.unit)}, over the fraction of channels removed</text>',
    ]
    for i, (name, curve) in enumerate(curves.groups.items()):
        x0 = _PAD + i % _COLUMNS * (_W + _PAD)
        y0 = 62 + i // _COLUMNS * (_H + _PAD + 12)
        units = len(curve.order)
        points = []
        for k in range(1, units):
            level = (math.log10(max(curve.error[k], 10.0**low)) - low) / max(high - low, 1)
            points.append(f"{x0 + k / units * _W:.1f},{y0 + (1 - min(max(level, 0.0), 1.0)) * _H:.1f}")
        parts.append(f'<rect x="{x0}" y="{y0}" width="{_W}" height="{_H}" fill="#f6f7f9" stroke="#ccd"/>')
        parts.append(f'<line x1="{x0 + _W / 2}" y1="{y0}" x2="{x0 + _W / 2}" y2="{y0 + _H}" stroke="#dde"/>')
        parts.append(f'<text x="{x0}" y="{y0 - 4}">{escape(name)} ({units})</text>')
        parts.append(f'<text x="{x0 + _W}" y="{y0 + 10}" text-anchor="end" fill="#888">1e{high}</text>')
        parts.append(f'<text x="{x0 + _W}" y="{y0 + _H - 3}" text-anchor="end" fill="#888">1e{low}</text>')
        parts.append(f'<polyline fill="none" stroke="#2563eb" stroke-width="1.8" points="{" ".join(points)}"/>')
    return "\n".join([*parts, "</svg>", ""])
