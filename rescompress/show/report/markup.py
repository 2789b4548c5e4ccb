"""HTML by type: only `Markup` goes into a page as it is, and only `html` makes it from text, which it escapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import LiteralString

from markupsafe import Markup, escape

from rescompress.core.text import shown

__all__ = ["Markup", "html", "joined"]

NOTHING = Markup("")


def html(template: LiteralString, /, *parts: object) -> Markup:
    """Return a template of this program with each ``{}`` filled: markup as it is, anything else as text.

    Args:
        template: Written in the program, never read from a file.
        parts: What fills it.
    """
    return Markup(template.format(*map(_safe, parts)))


def _safe(part: object) -> Markup:
    return part if isinstance(part, Markup) else escape(shown(str(part)))


def joined(parts: Iterable[Markup], between: LiteralString = "") -> Markup:
    """Return markup in a row; text among it would be escaped."""
    return Markup(between).join(parts)
