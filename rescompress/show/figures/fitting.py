"""What is shown of a table where the line is too narrow for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

_ENDLESS = 10_000


class Fitting:
    """Shows one thing where the line has room for every cell of it, and else another.

    Args:
        wide: Shown where it fits without breaking a cell.
        narrow: Shown elsewhere.
    """

    def __init__(self, wide: RenderableType, narrow: RenderableType) -> None:
        self.wide = wide
        self.narrow = narrow

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield one of the two."""
        from rich.measure import Measurement

        needed = Measurement.get(console, options.update(max_width=_ENDLESS), self.wide).maximum
        yield self.wide if needed <= options.max_width else self.narrow
