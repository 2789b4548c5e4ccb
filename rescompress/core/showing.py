"""Results that show themselves: one line at a prompt, a small table in a notebook and in a terminal."""

from __future__ import annotations

import abc
import html
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rescompress.core.text import one_line

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 200
"""Characters of the line at most."""


class Showing(abc.ABC):
    """Gives a class its ``repr``, its table for notebooks (``_repr_html_``) and its table for rich (``__rich__``)."""

    @abc.abstractmethod
    def shows(self) -> Mapping[str, str]:
        """Return what a person wants to see first, by the word for it."""

    def __repr__(self) -> str:
        """Return one line of at most 200 characters."""
        facts = ", ".join(f"{word} {text}" for word, text in self._lines())
        line = f"{type(self).__name__}({facts})"
        return line if len(line) <= WIDTH else f"{line[: WIDTH - 2]}…)"

    def __str__(self) -> str:
        """Return the same line."""
        return repr(self)

    def _repr_html_(self) -> str:
        """Return a table for a notebook."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(word)}</th><td style='text-align:left'>{html.escape(text)}</td></tr>"
            for word, text in self._lines()
        )
        return f"<table><caption>{html.escape(type(self).__name__)}</caption>{rows}</table>"

    def __rich__(self) -> Table:
        """Return a table for a terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=type(self).__name__, title_justify="left", show_header=False)
        for word, text in self._lines():
            table.add_row(Text(word), Text(text))
        return table

    def _lines(self) -> list[tuple[str, str]]:
        return [(one_line(word), one_line(text)) for word, text in self.shows().items()]


def prefixed(value: float) -> str:
    """Return a count with a prefix: ``41.3 M``."""
    for limit, sign in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{sign}"
    return f"{value:.3g}"
